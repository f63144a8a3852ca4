"""The shipped model with rounded activations, from the directory to ONNX Runtime."""

from pathlib import Path

import pytest
import torch

import qcompiler as qc


@pytest.mark.parametrize(
    ("recipe", "status", "divergence"), [("w8a8-rtn", "fused", 0.01), ("fp8-dynamic", "runs", 0.005)]
)
def test_journey(recipe, status, divergence, booklm: Path, tmp_path):
    calibration = qc.Calibration.self_generated(samples=8, length=64)
    result = qc.compile(booklm, recipe, calibration, targets=["onnx"])
    result.save(tmp_path / "native")
    report = qc.lower(tmp_path / "native", "onnx", tmp_path / "onnx")
    assert {site["status"] for site in report["sites"].values()} == {status}
    assert report["parity"]["max_difference"] <= report["parity"]["tolerance"] < 0.2
    tokens = torch.randint(4096, (4, 48), generator=torch.Generator().manual_seed(1))
    native, onnx = (
        qc.evaluate(tmp_path / place, tokens=tokens, against=booklm, cached=True) for place in ("native", "onnx")
    )
    assert native.kl_divergence is not None
    assert onnx.kl_divergence is not None
    assert 0 < native.kl_divergence < divergence
    assert abs(onnx.kl_divergence - native.kl_divergence) < 0.25 * native.kl_divergence
