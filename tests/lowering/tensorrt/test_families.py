"""Families of models under the builder: what has no form of ours falls back to what builds, and computes the same."""

from pathlib import Path

import pytest
import torch

import qcompiler as qc
from qcompiler.lowering.onnx import OnnxArtifact
from qcompiler.passes import RTN, Assign
from tests.models import canonical_graph, copy_graph

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("family", "fused"),
    [
        ("mixtral", "24 of 24"),  # no rows that are found as the model runs
        ("gemma2", "14 of 14"),  # capped logits, windows
        ("bert", "13 of 13"),  # no cache
        pytest.param("phi", "12 of 12", marks=pytest.mark.slow),
        pytest.param("gpt2", "8 of 8", marks=pytest.mark.slow),
        pytest.param("falcon_alibi", "8 of 8", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "24 of 24", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "24 of 24", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "22 of 24", marks=pytest.mark.slow),  # behind attention with sinks, written out
    ],
)
def test_engine_and_numbers(family: str, fused: str, tmp_path: Path) -> None:
    result = qc.compile(copy_graph(canonical_graph(family)), [Assign("w4a16-g16"), RTN()], device="cpu")
    report = qc.lower(result, "tensorrt", tmp_path / "out", length=40, verify=False)
    assert report["engines"]["89"]["fused_linears"] == fused
    behind = "o_proj" if family == "gpt_oss" else "attention"
    assert all(behind in found["where"] for found in report["findings"])  # heads of 8 channels: no kernel
    ids = torch.randint(3, 60, (2, 9))
    wanted, found = result.artifact().forward(ids), OnnxArtifact(tmp_path / "out").forward(ids)
    assert (found - wanted).abs().max() < 1e-2 * wanted.abs().max()
