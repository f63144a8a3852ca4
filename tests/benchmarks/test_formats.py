"""The table of checkpoints and readers."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

import qcompiler as qc
from benchmarks import formats
from benchmarks.formats import Row, measure, refusal, render
from qcompiler.errors import VerificationError
from qcompiler.lowering.checkpoint.readers import ENGINES
from qcompiler.passes import RTN
from tests.tiny_checkpoint import save_checkpoint


def test_readers_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(save_checkpoint(tmp_path / "model", layers=1), [RTN(bits=8)])
    (tmp_path / "engines" / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "engines" / "vllm" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setitem(formats.READERS, "compressed-tensors", ("vllm",))
    transformers, missing = measure(result, "w8a16", "compressed-tensors", tmp_path / "one", tmp_path / "engines")
    assert (transformers.reader, transformers.loads) == ("transformers, float32", "yes")
    assert float(transformers.largest) <= float(transformers.tolerance)
    assert (missing.reader, missing.loads) == ("vllm", "no: no module vllm")
    (refused,) = measure(result, "w8a16", "awq", tmp_path / "two", None)
    assert refused.loads.startswith("refused: AWQ checkpoints hold integers of 4 bits")

    found = {"max_difference": 0.012, "tolerance": 0.05, "mean_difference": 0.003, "mean_tolerance": 0.02}
    found |= {"kl_divergence": 0.0004, "greedy_tokens": 7, "version": 32}
    monkeypatch.setattr(formats, "compare", lambda *_, **__: found)
    _, read = measure(result, "w8a16", "compressed-tensors", tmp_path / "three", tmp_path / "engines")
    assert read.cells()[2:-1] == ["vllm", "yes", "1.2e-02", "5.0e-02", "3.0e-03", "2.0e-02", "0.400", "7"]

    def fail(*_: object, **__: object) -> None:
        raise VerificationError("vllm does not read this checkpoint", got="RuntimeError: no kernel")

    monkeypatch.setattr(formats, "compare", fail)
    _, read = measure(result, "w8a16", "compressed-tensors", tmp_path / "four", tmp_path / "engines")
    assert read.loads == "no: RuntimeError: no kernel"


def test_what_no_layout_holds_is_known_ahead_of_all_work() -> None:
    assert refusal("w4a16-rtn", "gguf") == ""
    assert refusal("w3a16-gptq", "awq").startswith("AWQ checkpoints hold integers of 4 bits")
    options = Namespace(model=Path("nowhere"), calib=Path("nowhere"), engines=None)
    (rows,) = formats.rows_of("w3a16-squeezellm", options, [])
    assert [row.layout for row in rows] == list(formats.READERS)
    assert all(row.loads.startswith("refused: ") and not row.reader for row in rows)


def test_what_stands_is_not_measured_again() -> None:
    options = Namespace(model=Path("nowhere"), calib=Path("nowhere"), engines=None)
    rows = [Row("w4a16-rtn", layout, "qcompiler", "yes") for layout in formats.READERS]
    assert list(formats.rows_of("w4a16-rtn", options, rows)) == []
    said = Row("w4a16-rtn", "awq", "vllm", "no: it has no kernel")
    vllm, *_ = (engine for engine in ENGINES if engine.name == "vllm")
    assert formats.lacking([said], "w4a16-gptq", "awq", vllm) == "no, as w4a16-rtn"
    differs = Row("w4a16-rtn", "awq", "vllm", "no: 0.3; at most 0.2")
    assert not formats.lacking([differs, Row("w4a16-awq", "awq", "vllm", "yes")], "w4a16-gptq", "awq", vllm)
    assert not formats.lacking([said], "w4a16-gptq", "gptq", vllm)
    assert not formats.lacking([said], "w8a16", "awq", vllm)
    rounds = Row("w8a8-rtn", "awq", "vllm", "no: a layer kept its input")
    assert not formats.lacking([rounds], "w8a8-smoothquant", "awq", vllm)


def test_table() -> None:
    rows = [Row("w8a16", "gptq", "vllm", "yes", megabytes="7.9", version="0.32"), Row("fp8", "awq", "", "refused: no")]
    lines = render(rows, Namespace(model=Path("some/model"))).splitlines()
    assert "vllm 0.32" in " ".join(lines[2:6])
    assert "| w8a16 | gptq | vllm | yes |  |  |  |  |  |  | 7.9 |" in lines
    assert "| fp8 | awq | no |" in lines
    assert len({line.count("|") for line in lines if line.startswith("| ")}) == 2
