"""The table of checkpoints and readers."""

import sys
from pathlib import Path

import pytest

import qcompiler as qc
from benchmarks import formats
from benchmarks.formats import Row, measure, render
from qcompiler.errors import VerificationError
from qcompiler.passes import RTN
from tests.tiny_checkpoint import save_checkpoint


def test_readers_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(save_checkpoint(tmp_path / "model", layers=1), [RTN(bits=8)])
    (tmp_path / "engines" / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "engines" / "vllm" / "bin" / "python").symlink_to(sys.executable)
    transformers, missing = measure(result, "w8a16", "compressed-tensors", tmp_path / "one", tmp_path / "engines")
    assert (transformers.reader, transformers.loads) == ("transformers", "yes")
    assert float(transformers.largest) <= float(transformers.tolerance)
    assert (missing.reader, missing.loads) == ("vllm", "no: no module vllm")
    (refused,) = measure(result, "w8a16", "awq", tmp_path / "two", None)
    assert refused.loads.startswith("refused: AWQ checkpoints hold integers of 4 bits")

    found = {"max_difference": 0.012, "tolerance": 0.05, "kl_divergence": 0.0004, "greedy_tokens": 7}
    monkeypatch.setattr(formats, "compare", lambda *_, **__: found)
    _, read = measure(result, "w8a16", "compressed-tensors", tmp_path / "three", tmp_path / "engines")
    assert read.cells()[:8] == ["w8a16", "compressed-tensors", "vllm", "yes", "1.2e-02", "5.0e-02", "0.400", "7"]

    def fail(*_: object, **__: object) -> None:
        raise VerificationError("vllm does not read this checkpoint", got="RuntimeError: no kernel")

    monkeypatch.setattr(formats, "compare", fail)
    _, read = measure(result, "w8a16", "compressed-tensors", tmp_path / "four", tmp_path / "engines")
    assert read.loads == "no: RuntimeError: no kernel"


def test_table() -> None:
    table = render([Row("w8a16", "gptq", "vLLM", "yes", megabytes="7.9").cells()])
    assert table.splitlines()[2] == "| w8a16 | gptq | vLLM | yes |  |  |  |  | 7.9 |"
    assert len({line.count("|") for line in table.splitlines()}) == 1
