"""OpenVINO computes of our portable ONNX what we do: a second runtime that shares no code with the first."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import qcompiler as qc
from qcompiler.passes import RTN, Assign, InsertQDQ
from tests.engines import made

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

TOKENS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
CASES: dict[str, list[Any]] = {
    "w4a16-g32": [Assign("w4a16-g32"), RTN()],
    "w4a16-g32-asym": [Assign("w4a16-g32-asym"), RTN()],
    "w8a16": [Assign("w8a16"), RTN()],
    "w8a8": [Assign("w8a8"), RTN(), InsertQDQ(observer="minmax")],
}
"""OpenVINO (2026.4) does not convert scales that are measured per token, of activations or caches."""


def computed(folder: Path, scratch: Path) -> Any:
    python = made.ENVIRONMENTS / "openvino" / "bin" / "python"
    if not python.exists():
        pytest.skip("OpenVINO is not there: `make test-engines` makes its environment")
    np.save(scratch / "tokens.npy", TOKENS.numpy())
    driver = str(Path(__file__).with_name("read_openvino.py"))
    command = [str(python), driver, str(folder), str(scratch / "tokens.npy"), str(scratch / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(scratch / "out.npz")


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str, opset: int, model: Path, tmp_path: Path) -> None:
    """Float32 on both sides; where inputs are rounded, one now and then falls to the other side of a border."""
    result = qc.compile(qc.capture(model), CASES[name], qc.Calibration.from_tokens(TOKENS[:, :16]), device="cpu")
    qc.lower(result, "onnx", tmp_path / "out", opset=opset, verify=False)
    wanted = result.artifact().forward(TOKENS).numpy()
    largest = np.abs(wanted).max()
    tolerance = 5e-2 if name == "w8a8" else 1e-5
    found = computed(tmp_path / "out", tmp_path)
    assert np.abs(found["whole"] - wanted).max() < tolerance * largest
    assert np.abs(found["step"][:, 0] - wanted[:, -1]).max() < tolerance * largest


def test_damage_is_seen(model: Path, tmp_path: Path) -> None:
    result = qc.compile(qc.capture(model), CASES["w4a16-g32"], device="cpu")
    qc.lower(result, "onnx", tmp_path / "out", verify=False)
    file = tmp_path / "out" / "model.onnx.data"
    codes = bytearray(file.read_bytes())
    codes[len(codes) // 2 : len(codes) // 2 + 4096] = bytes(4096)
    file.write_bytes(codes)
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    wanted = result.artifact().forward(TOKENS).numpy()
    assert np.abs(computed(tmp_path / "out", tmp_path)["whole"] - wanted).max() > 1e-3 * np.abs(wanted).max()
