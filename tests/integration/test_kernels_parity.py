"""What the parity of kernels allows: honest models pass, and planted faults are seen at the tolerance that is used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qcompiler as qc
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.artifacts.noise import with_noise
from qcompiler.artifacts.parity import check_parity
from qcompiler.errors import VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.kernels.module.model import KernelModel
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache
from qcompiler.protocol.pass_base import Pass
from tests.families import COMMON, SPECS
from tests.models import copy_graph

CPU = torch.device("cpu")
DYNAMIC = InsertQDQ(observer=None)
RECIPES: dict[str, list[Pass]] = {
    "weights": [Assign("w4a16-g16-asym"), RTN()],
    "int8 activations": [Assign("w8a8-dynamic"), RTN(), DYNAMIC],
    "int4 activations": [Assign("w4a4-dynamic"), RTN(), DYNAMIC],
    "fp8 caches": [Assign("w4a16-g16-asym"), QuantizeKVCache("fp8"), RTN()],
}


CHAOTIC = ("llama", "int4 activations")
"""Roundings that fall differently move these logits as far as a fault does, in float32 too."""


def compiled(family: str, recipe: str, seed: int = 0, change: Callable[[Any], None] | None = None) -> Graph:
    torch.manual_seed(seed)
    kind, config, own = SPECS[family]
    settings = getattr(transformers, config)(**{**COMMON, "num_hidden_layers": 2, **own})
    model: nn.Module = getattr(transformers, kind)(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        if change is not None:
            change(model)
    return qc.compile(qc.capture(model), RECIPES[recipe], device="cpu").graph


def parity(graph: Graph, lowered: Graph, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """As `qcompiler.lower` compares them; ``lowered`` is what kernels are made of."""
    model = KernelModel(lowered, CPU, dtype)
    noisy = [NativeArtifact(with_noise(graph, model.rounded, model.dtype, sample=sample)) for sample in range(3)]
    rounds = graph.signature.has_quantized_cache or any(s.activation for s in graph.schemes.values())
    unrounded = NativeArtifact(graph, round_activations=False) if rounds else None
    return check_parity(NativeArtifact(graph), model, tolerance=0.0, unrounded=unrounded, noisy=noisy)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_a_mixture_of_experts_in_bfloat16_passes(seed: int) -> None:
    graph = compiled("mixtral", "weights", seed)
    assert parity(graph, graph)["mean_tolerance"] < 0.15


@pytest.mark.parametrize(
    ("family", "recipe"),
    [(family, recipe) for recipe in RECIPES for family in ("llama", "gpt2")],
)
def test_honest_models_pass(family: str, recipe: str) -> None:
    graph = compiled(family, recipe)
    dtype = torch.float32 if recipe == "int4 activations" else torch.bfloat16
    found = parity(graph, graph, dtype)
    assert found["kl_divergence"] < 0.01
    if (family, recipe) != CHAOTIC:
        assert found["mean_tolerance"] < 0.5
        assert found["unrounded_divergence"] is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_logits_say_nothing_the_divergence_from_the_unrounded_model_decides(
    seed: int, dtype: torch.dtype
) -> None:
    graph = compiled(*CHAOTIC, seed)
    found = parity(graph, graph, dtype)
    assert 0 < found["unrounded_divergence"] <= found["unrounded_divergence_allowed"] < 1


def test_a_large_weight_does_not_make_everything_pass() -> None:
    def large(model: Any) -> None:
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = 3e4

    graph = compiled("llama", "int8 activations", change=large)
    assert parity(graph, graph)["mean_tolerance"] < 0.25


def permuted(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0)


FAULTS: dict[str, tuple[str, str, str, Callable[[Tensor], Tensor]]] = {
    "a permuted scale": ("llama", "weights", "layers.0.mlp.down_proj.weight_scale", permuted),
    "a wrong zero point": ("llama", "weights", "layers.1.mlp.up_proj.weight_zero_point", lambda t: t ^ 4),
    "a dropped bias": ("gpt2", "weights", "h.1.mlp.c_proj.bias", torch.zeros_like),
    "heads mixed up": ("llama", "weights", "layers.1.self_attn.o_proj.weight_codes", lambda t: t.roll(16, 1)),
    "a scale under int8": ("llama", "int8 activations", "layers.1.mlp.down_proj.weight_scale", lambda t: t * 2),
    "a bias under int8": ("gpt2", "int8 activations", "h.1.mlp.c_proj.bias", torch.zeros_like),
    "a scale under int4": ("llama", "int4 activations", "layers.0.mlp.down_proj.weight_scale", lambda t: t * 2),
    "heads under int4": (
        "llama",
        "int4 activations",
        "layers.1.self_attn.o_proj.weight_codes",
        lambda t: t.roll(16, 1),
    ),
    "a bias under int4": ("gpt2", "int4 activations", "h.1.mlp.c_proj.bias", torch.zeros_like),
    "a scale beside fp8": ("llama", "fp8 caches", "layers.1.mlp.up_proj.weight_scale", lambda t: t * 2),
    "heads beside fp8": ("llama", "fp8 caches", "layers.1.self_attn.o_proj.weight_codes", lambda t: t.roll(16, 1)),
    "heads behind experts": ("mixtral", "weights", "layers.1.self_attn.o_proj.weight_scale", lambda t: t * 2),
    "an expert": ("mixtral", "weights", "layers.1.mlp.experts.down_proj.0.weight_scale", lambda t: t * 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str) -> None:
    family, recipe, tensor, change = FAULTS[name]
    graph = compiled(family, recipe)
    damaged = copy_graph(graph)
    (found,) = [item for item in graph.weight_names() if item.endswith(tensor)]
    value = graph.weights.read(found)
    damaged.weights.set(found, change(value).contiguous(), graph.weights.info(found).dtype)
    with pytest.raises(VerificationError, match=r"does not compute what|further from the unrounded"):
        parity(graph, damaged, torch.float32 if recipe == "int4 activations" else torch.bfloat16)
