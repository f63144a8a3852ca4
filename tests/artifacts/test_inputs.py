"""Models without token ids: compiled on inputs from a file, lowered, verified, measured against the original."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from qcompiler.artifacts.inputs import GivenInputs, check_by_inputs, fit_inputs, made_inputs
from qcompiler.errors import CalibrationError, InputError, VerificationError
from qcompiler.ir import Graph, Port, Signature
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.passes import RTN
from qcompiler.protocol import Lowered, Reader
from tests.tiny_checkpoint import command

RECIPES = ("w8a8-smoothquant", "w4a16-gptq")


class Vision(nn.Module):
    """A patch embedding, and a block of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, stride=4, padding=2), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class MLP(nn.Module):
    """Two inputs, one of which meets the other behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x) * y))
        return out


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``vision.onnx`` and ``inputs.npz``."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Vision().eval(), (torch.randn(2, 3, 8, 8),), str(folder / "vision.onnx"), dynamo=False,
            input_names=["pixels"], output_names=["features"], opset_version=17,
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}},
        )  # fmt: skip
    np.savez(folder / "inputs.npz", pixels=torch.randn(70, 3, 8, 8).numpy())
    return folder


@pytest.fixture(scope="module")
def mlp() -> Graph:
    torch.manual_seed(0)
    return qc.capture(MLP().eval(), (torch.randn(4, 24), torch.randn(4, 32)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_vision_model_from_file_to_file(vision: Path, tmp_path: Path, recipe: str) -> None:
    result = qc.compile(vision / "vision.onnx", recipe, qc.Calibration.from_inputs(vision / "inputs.npz"))
    assert {site.site for site in result.report.sites} == {"up", "down"}
    assert result.report.calibration == {"source": "inputs", "samples": 3}  # 70 samples in batches of 32
    parity = qc.lower(result, "onnx", tmp_path / "onnx")["parity"]
    assert parity["max_difference"] <= parity["tolerance"] < 0.1
    assert list(parity["outputs"]) == ["features"]
    close = qc.evaluate_inputs(result, vision / "vision.onnx", vision / "inputs.npz")
    assert 0.99 < close.outputs["features"] < 1
    apart = qc.evaluate_inputs(result, vision / "vision.onnx", vision / "inputs.npz", "max")
    assert 0 < apart.outputs["features"] < 0.2
    assert close.batches == 3


def test_on_the_command_line(vision: Path, tmp_path: Path) -> None:
    inputs, original, out = vision / "inputs.npz", vision / "vision.onnx", tmp_path / "out"
    done = command("compile", original, "-o", out, "-r", "w4a16-gptq", "--calib", inputs, "--to", "onnx")
    assert done.status == 0, done.errors
    report = json.loads((out / "native" / "report.json").read_text())
    assert report["calibration"] == {"source": "inputs", "samples": 3}
    assert report["targets"]["onnx"]["parity"]["max_difference"] < 1e-3
    for form in ("native", "onnx/model.onnx"):
        options = ("--against", original, "--inputs", inputs, "--metric", "top1")
        measured = command("evaluate", out / form, *options, "--json")
        assert measured.status == 0, measured.errors
        assert 0.8 < measured.result["outputs"]["features"] <= 1
    assert "top1 of features" in command("evaluate", out, *options).output
    alone = command("evaluate", out, "--inputs", inputs)
    assert (alone.status, "--against" in alone.errors) == (2, True)


def test_a_function_of_the_user_and_the_model_itself(mlp: Graph) -> None:
    batches = [{"input_1": torch.rand(5, 32), "input_0": torch.randn(5, 24)}, (torch.randn(1, 24), torch.rand(1, 32))]
    result = qc.compile(mlp, [RTN(bits=4)], qc.Calibration.from_inputs(batches))
    for metric, best in (("cosine", 1.0), ("max", 0.0), ("top1", 1.0)):
        same = qc.evaluate_inputs(mlp, mlp, batches, metric)
        assert same.outputs == pytest.approx({"output_0": best})

    def mean_of_rows(found: Tensor, expected: Tensor) -> float:
        return float(len(found))

    found = qc.evaluate_inputs(result, mlp, batches, mean_of_rows)
    assert (found.metric, found.outputs) == ("mean_of_rows", {"output_0": (5 * 5 + 1) / 6})
    assert found.bits_per_weight < 32
    with pytest.raises(InputError, match="unknown metric"):
        qc.evaluate_inputs(result, mlp, batches, "cosin")


PORTS = Signature(
    (Port("x", "other", "float32", ("n", 4)), Port("index", "other", "int64", ("n",))),
    (Port("y", "other", "float32", ("n", 4)),),
)


@pytest.mark.parametrize(
    ("arrays", "got"),
    [
        ({"x": np.zeros((6, 4), "f")}, "x"),
        ({"x": np.zeros((6, 4), "f"), "indices": np.zeros(6, int)}, "x, indices"),
        ({"x": np.zeros((6, 4), "f"), "index": np.zeros(5, int)}, "6 in x, 5 in index"),
        ({"x": np.zeros((0, 4), "f"), "index": np.zeros(0, int)}, "0 in x, 0 in index"),
        ({"x": np.zeros((6, 5), "f"), "index": np.zeros(6, int)}, "float32 [6, 5]"),
        ({"x": np.zeros((6, 4), "f"), "index": np.zeros(6, "f")}, "float32 [6]"),
    ],
)
def test_arrays_that_do_not_fit_the_ports(tmp_path: Path, arrays: dict[str, Any], got: str) -> None:
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(CalibrationError) as caught:
        list(GivenInputs.of(tmp_path / "inputs.npz").batches(PORTS))
    assert caught.value.got == got


def test_one_symbol_has_one_size() -> None:
    with pytest.raises(CalibrationError) as caught:
        fit_inputs(PORTS, (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)), "here")
    assert (caught.value.where, caught.value.expected) == ("here: index", "int64 ['n'] with {'n': 3}")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x04."])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "inputs.npz").write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read"):
        qc.Calibration.from_inputs(tmp_path / "inputs.npz")


def test_inputs_are_made_as_the_ports_ask() -> None:
    x, index = made_inputs(PORTS)
    assert (tuple(x.shape), x.dtype, index.dtype) == ((2, 4), torch.float32, torch.int64)
    assert set(index.tolist()) <= {0, 1}
    fit_inputs(PORTS, (x, index), "made")
    summed = Signature((Port("x", "other", "float32", ("a + b",)),), ())
    with pytest.raises(CalibrationError, match="cannot be made"):
        made_inputs(summed)


class _Off:
    """A module that is off in one value."""

    def __init__(self, by: float) -> None:
        self._by = by

    def run(self, inputs: Any) -> list[Tensor]:
        torch.manual_seed(0)
        (module,) = [MLP().eval()]
        out = module(*inputs).detach()
        out[0, 0] += self._by * out.abs().max()
        return [out]


@pytest.mark.parametrize("by", [0.0, 0.01, float("nan")])
def test_what_computes_something_else_is_refused(mlp: Graph, by: float) -> None:
    lowered = Lowered({}, readers=[Reader(lambda: None, open_for_inputs=lambda: _Off(by))])  # type: ignore[arg-type, return-value]
    if by == 0:
        check_by_inputs(mlp, lowered)
        assert lowered.report["parity"]["max_difference"] < 1e-5
        return
    with pytest.raises(VerificationError, match="does not compute"):
        check_by_inputs(mlp, lowered)


@pytest.mark.parametrize("target", ["ort", OnnxTarget(opset=23)])
def test_other_targets_verify_them_too(mlp: Graph, tmp_path: Path, target: Any) -> None:
    result = qc.compile(mlp, [RTN(bits=4, group_size=8)])
    parity = qc.lower(result, target, tmp_path / "out")["parity"]
    assert parity["max_difference"] < 1e-3
