"""Cheap steps on the CPU against the same module without them."""

from typing import Any

import pytest
import torch
from torch import nn

import qcompiler as qc
from qcompiler.ir.graph import Graph
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention
from qcompiler.lowering.kernels.module.cpu_calls import PackedProduct, PlainAttention
from qcompiler.lowering.kernels.module.model import KernelModel, lower
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.passes import RTN, Assign, QuantizeKVCache
from tests.models import canonical_graph
from tests.tiny_graphs import language_model

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def quantized(graph: Graph, scheme: str, *passes: Any) -> Graph:
    tokens = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(2))
    return qc.compile(graph, [Assign(scheme), *passes, RTN()], qc.Calibration.from_tokens(tokens)).graph


def stepwise(model: KernelModel) -> torch.Tensor:
    """Logits of a prompt, of three single tokens, and of two at once."""
    found, cache = model.prefill(IDS[:, :3])
    logits = [found]
    for part in (slice(3, 4), slice(4, 5), slice(5, 6), slice(6, 8)):
        found, cache = model.step(IDS[:, part], cache)
        logits.append(found)
    return torch.cat(logits, dim=1)


def modules(model: KernelModel, kind: type[nn.Module]) -> list[Any]:
    called = {str(node.target) for node in model.module.graph.nodes if node.op == "call_module"}
    return [module for name, module in model.module.named_modules() if name in called and isinstance(module, kind)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gptj", "phi3", "mixtral"])
def test_in_float32_every_step_gives_what_it_gave(family):
    graph = canonical_graph(family)
    torch.testing.assert_close(
        stepwise(lower(graph, device=CPU, dtype="float32")),
        stepwise(KernelModel(graph, CPU, torch.float32)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
@pytest.mark.parametrize("passes", [(), (QuantizeKVCache("int8"),)])
def test_merged_products_and_attention_in_place_are_as_near_as_bfloat16_is(scheme, passes):
    graph = quantized(language_model(width=64, kv_heads=4), scheme, *passes)
    cheap, portable = lower(graph, device=CPU), KernelModel(graph, CPU, torch.bfloat16)
    expected = stepwise(portable)
    torch.testing.assert_close(stepwise(cheap), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert len(modules(cheap, PackedProduct)) == 8  # q, k and v; o; gate and up; down: in two layers
    assert not modules(cheap, WeightOnlyLinear)
    assert len(modules(cheap, CachedAttention if passes else PlainAttention)) == 2


def test_merged_products_are_those_of_the_layers_to_the_bit():
    graph = quantized(language_model(width=64, kv_heads=4), "w4a16-g32")
    q, k, v = modules(KernelModel(graph, CPU, torch.bfloat16), WeightOnlyLinear)[:3]
    x = torch.randn(2, 3, 64).bfloat16()
    torch.testing.assert_close(
        PackedProduct([q, k, v])(x), torch.cat([layer(x) for layer in (q, k, v)], dim=-1), rtol=0, atol=0
    )


def test_layers_of_several_formats_or_of_broken_blocks_are_not_merged():
    passes = [Assign("w4a16-g32", overrides={"*.k": "w8a16", "*.up": None}), RTN()]
    graph = qc.compile(language_model(width=64, kv_heads=4), passes).graph
    cheap, expected = lower(graph, device=CPU), stepwise(KernelModel(graph, CPU, torch.bfloat16))
    torch.testing.assert_close(stepwise(cheap), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert len(modules(cheap, PackedProduct)) == 10  # q and v; k; o; gate; down: in two layers
    narrow = quantized(language_model(width=32), "w4a16-g32")  # 32 queries and 16 keys share a block
    cheap, expected = lower(narrow, device=CPU), stepwise(KernelModel(narrow, CPU, torch.bfloat16))
    torch.testing.assert_close(stepwise(cheap), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    assert len(modules(cheap, PackedProduct)) == 12  # gate and up alone, of 64 each


def test_no_operator_in_python_is_left_in_a_step_over_float_caches():
    graph = quantized(canonical_graph("llama"), "w4a16-g32")
    cheap = lower(graph, device=CPU)
    targets = {str(node.target) for node in cheap.module.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if target.startswith("qcompiler")]
    before = len(cheap.module.graph.nodes)
    cheap.module.graph.eliminate_dead_code()
    assert len(cheap.module.graph.nodes) == before, "an append is no dead code"
