"""Float16 models are held to float16 arithmetic, which ONNX Runtime does not compute in on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompiler as qc
from qcompiler.artifacts.parity import check_parity
from qcompiler.errors import VerificationError
from qcompiler.lowering.onnx import OnnxArtifact, lower
from qcompiler.passes import RTN, Assign, QuantizeKVCache
from tests.models import build


def compiled(model: nn.Module, *passes: Any) -> qc.CompileResult:
    return qc.compile(qc.capture(model), [*(passes or (RTN(bits=4, group_size=16),))], device="cpu")


def large_residual(model: Any) -> None:
    """Every norm divides it away again: in float32 nothing changes but what eps does."""
    embedding = model.model.embed_tokens.weight
    factor = 30000 / embedding.abs().max()
    embedding *= factor
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= factor
        layer.mlp.down_proj.weight *= factor


def large_products(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj.weight *= 2.0**16
        layer.mlp.down_proj.weight *= 2.0**-12


def large_scores(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 2.0**9
        layer.self_attn.k_proj.weight *= 2.0**9


def hardly_fitting(model: Any) -> None:
    """Close to what float16 holds: finite on these tokens, hardly on others."""
    model.model.embed_tokens.weight *= 50000 / model.model.embed_tokens.weight.abs().max()


@pytest.mark.parametrize("plant", [large_residual, large_products, large_scores, hardly_fitting])
def test_what_float16_cannot_hold_is_refused_with_its_place(plant: Callable[[Any], None], tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        plant(model)
    result = compiled(model)
    lower(result.graph, tmp_path / "unverified", float_dtype="float16")
    check_parity(result.artifact(), OnnxArtifact(tmp_path / "unverified"), tolerance=2e-2)  # ONNX Runtime sees nothing
    with pytest.raises(VerificationError, match="does not fit float16") as caught:
        qc.lower(result, "onnx", tmp_path / "out", float_dtype="float16")
    assert "float_dtype='float32'" in str(caught.value)
    assert "output_0" in str(caught.value)
    assert "parity" in qc.lower(result, "onnx", tmp_path / "wide")


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("mixtral", "gemma2"))]
)
def test_honest_models_pass(family: str, tmp_path: Path) -> None:
    written = qc.lower(compiled(build(family)), "onnx", tmp_path / "out", float_dtype="float16")
    found = written["float16_parity"]
    assert 0 < found["max_difference"] <= found["tolerance"]
    assert found["tokens"] == 16


@pytest.mark.parametrize("cache", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "int4"))])
def test_quantized_caches_are_evaluated_too(cache: Any, tmp_path: Path) -> None:
    result = compiled(build("llama"), Assign("w4a16-g16"), QuantizeKVCache(cache), RTN())
    written = qc.lower(result, "onnx", tmp_path / "out", float_dtype="float16")
    assert written["float16_parity"]["max_difference"] <= written["float16_parity"]["tolerance"]
