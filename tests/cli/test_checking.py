"""`qcompiler check`: its table, its object, its status."""

import sys
from pathlib import Path

import onnx
import pytest

from tests.lowering.tensorrt.legality.linear_graphs import Linear
from tests.tiny_checkpoint import command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def test_what_is_fused(file: Path) -> None:
    onnx.save(Linear().model, file)
    outcome = command("check", file, "--for", "tensorrt:sm=80+89")
    assert outcome.status == 0
    assert "fused: INT4 weights: 1" in outcome.output
    assert "it builds" in outcome.output


def test_what_is_refused_ends_with_status_3(file: Path) -> None:
    onnx.save(Linear(zero="other").model, file)
    outcome = command("check", file, "--for", "tensorrt:sm=89")
    assert outcome.status == 3
    assert "refused" in outcome.output
    assert "zero-point: quantization is symmetric" in outcome.output
    assert "it does not build" in outcome.output


def test_what_is_unfused_builds(file: Path) -> None:
    onnx.save(Linear(block="channel").model, file)
    outcome = command("check", file, "--for", "tensorrt", "--json")
    assert outcome.status == 0
    assert outcome.fields["ok"]
    (finding,) = outcome.fields["result"]["findings"]
    assert (finding["rule"], finding["verdict"], finding["count"]) == ("int4-one-block", "unfused", 1)
    assert outcome.fields["result"]["builds"] is True


def test_the_object_comes_with_status_3_too(file: Path) -> None:
    onnx.save(Linear("fp8", "channel").model, file)
    outcome = command("check", file, "--for", "tensorrt:sm=86", "--json")
    assert outcome.status == 3
    assert outcome.fields["result"]["builds"] is False
    assert outcome.fields["result"]["findings"][0]["sm"] == [86]


@pytest.mark.parametrize(
    "target", ["onnx", "tensorrt:float=float16", "tensorrt:sm=", "tensorrt:sm=8.9", "tensorrt:sm=90"]
)
def test_other_targets_are_errors(file: Path, target: str) -> None:
    onnx.save(Linear().model, file)
    outcome = command("check", file, "--for", target, "--json")
    assert outcome.status == 2
    assert outcome.error["type"] == "TargetError"


def test_a_broken_file_is_an_error(file: Path) -> None:
    file.write_bytes(b"nothing of ONNX's")
    outcome = command("check", file, "--for", "tensorrt:sm=89", "--json")
    assert outcome.status == 2
    assert outcome.error["type"] == "InputError"


def test_without_onnx(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(Linear().model, file)
    for name in [name for name in sys.modules if name.startswith("qcompiler.lowering.tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    outcome = command("check", file, "--for", "tensorrt:sm=89", "--json")
    assert outcome.status == 2
    assert outcome.error["remedy"] == "pip install onnx onnx-ir"
