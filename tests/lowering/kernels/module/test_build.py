"""The module that is made of a graph: which nodes become what, and that nothing else changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import qcompiler as qc
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.feeding import feed
from qcompiler.ir.graph import Graph
from qcompiler.ir.kv_cache import float_caches, quantize_cache
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear
from qcompiler.lowering.kernels.module.build import BuiltModule, build_module
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention
from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.passes import RTN, Assign, InsertQDQ, SqueezeLLM
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import interpret, language_model

_aten, _canonical, _kernels = torch.ops.aten, torch.ops.qcompiler, torch.ops.qcompiler_kernels
CPU = torch.device("cpu")
IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))


def quantized(scheme: str, *passes: Any, graph: Graph | None = None) -> Graph:
    calibration = qc.Calibration.from_tokens(torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(2)))
    start = language_model(width=32) if graph is None else graph
    return qc.compile(start, [Assign(scheme), *(passes or (RTN(),))], calibration).graph


def run(made: BuiltModule, ids: torch.Tensor, capacity: int = 16, past: int = 0, tensors: Any = None) -> Any:
    batch = ids.shape[0]
    if tensors is None:
        tensors = [
            torch.full((batch, slot.heads, capacity if slot.is_buffer else 0, slot.width), 7, dtype=slot.dtype)
            for slot in made.slots
        ]
    with torch.no_grad():
        results = made.module(ids, torch.tensor([past], dtype=torch.int32), past, *tensors)
    return results, tensors


def logits(graph: Graph, ids: torch.Tensor) -> torch.Tensor:
    return interpret(graph, feed(graph, ids))[graph.outputs[0].name]


def calls(made: BuiltModule) -> Counter[Any]:
    return Counter(
        type(made.module.get_submodule(node.target)) if node.op == "call_module" else node.target
        for node in made.module.graph.nodes
        if node.op in ("call_function", "call_module")
    )


def test_in_float32_the_arithmetic_is_that_of_the_graph():
    graph = quantized("w4a16-g16")
    made = build_module(graph, CPU, torch.float32)
    (found,), _ = run(made, IDS)
    torch.testing.assert_close(found, logits(graph, IDS), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("scheme", "passes", "kind", "count"),
    [
        ("w4a16-g32", (RTN(),), WeightOnlyLinear, 14),
        ("w8a16", (RTN(),), WeightOnlyLinear, 14),
        ("w3a16-lut", (SqueezeLLM(),), CodebookLinear, 14),
        ("w8a8-dynamic", (RTN(), InsertQDQ(observer=None)), ScaledLinear, 14),
        ("w8a8", (RTN(), InsertQDQ(observer="minmax")), ScaledLinear, 14),
        ("w8a8-dyntensor", (RTN(), InsertQDQ(observer=None)), ScaledLinear, 14),
        ("fp8", (RTN(), InsertQDQ(observer="minmax")), ScaledLinear, 14),
        ("nvfp4", (RTN(), InsertQDQ(observer="minmax")), nn.Module, 0),
    ],
)
def test_every_quantized_layer_becomes_a_module(scheme, passes, kind, count):
    made = build_module(quantized(scheme, *passes), CPU, torch.bfloat16)
    found = calls(made)
    assert found[kind] == count
    assert found[CachedAttention] == 2
    assert found[_canonical.linear.default] == 15 - count  # the head, and what has no kernel
    assert found[_canonical.dequantize.default] == 0
    assert len(made.sites) == 15
    assert made.sites[-1]["implementation"] == "float"


def test_one_quantizer_serves_all_that_read_a_value_and_norms_make_their_own():
    found = calls(build_module(quantized("w8a8-dynamic", RTN(), InsertQDQ(observer=None)), CPU, torch.bfloat16))
    assert found[_kernels.rms_norm_quantize_rows.default] == 4  # ahead of q, k, v and of gate, up
    assert found[_kernels.quantize_rows.default] == 4  # ahead of o and of down
    assert found[_canonical.rms_norm.default] == 1  # ahead of the head
    assert found[_canonical.choose_qparams.default] == found[_canonical.quantize.default] == 0
    static = build_module(quantized("w8a8", RTN(), InsertQDQ(observer="minmax")), CPU, torch.bfloat16)
    assert (calls(static)[_kernels.rms_norm_quantize_static.default], static.fused_norms) == (4, 4)
    each = build_module(quantized("w8a8-dyntensor", RTN(), InsertQDQ(observer=None)), CPU, torch.bfloat16)
    assert (calls(each)[_canonical.choose_qparams.default], each.fused_norms) == (8, 0)


def test_a_layer_with_weights_alone_in_codes_reads_rounded_activations():
    graph = quantized("w4a8-dynamic-g32", RTN(), InsertQDQ(observer=None))
    made = build_module(graph, CPU, torch.bfloat16)
    found = calls(made)
    assert (found[WeightOnlyLinear], found[ScaledLinear]) == (14, 0)
    assert found[_canonical.dequantize.default] == found[_canonical.quantize.default] == 8
    assert "rounded activations" in made.sites[0]["reason"]
    float32 = build_module(graph, CPU, torch.float32)
    torch.testing.assert_close(run(float32, IDS)[0][0], logits(graph, IDS), rtol=1e-2, atol=1e-2)  # a code may differ


def test_masks_that_hide_nothing_are_not_computed():
    made = build_module(quantized("w4a16-g32"), CPU, torch.bfloat16)
    assert calls(made)[_aten.to.dtype] == len(
        [n for n in made.module.graph.nodes if n.target is _aten.to.dtype and n.args[1] != torch.bool]
    )
    assert not any("ones" in str(node.target) for node in made.module.graph.nodes)


def test_a_mask_of_another_form_stays():
    graph = quantized("w4a16-g32")
    attention = next(node for node in graph.fx.nodes if node.target is _canonical.attention.default)
    with graph.fx.inserting_before(attention):  # the first two tokens are hidden
        position = graph.fx.call_function(_aten.cumsum.default, (graph.inputs[1], 1))
        late = graph.fx.call_function(_aten.gt.Scalar, (position, 2))
        for _ in range(2):
            late = graph.fx.call_function(_aten.unsqueeze.default, (late, 1))
    attention.update_arg(3, late)
    made = build_module(graph, CPU, torch.float32)
    assert calls(made)[CachedAttention] == 1
    assert calls(made)[_canonical.attention.default] == 1
    assert len(made.caches) == 1
    (whole,), _ = run(made, IDS)
    torch.testing.assert_close(whole, logits(graph, IDS), rtol=1e-5, atol=5e-6)
    (first,), tensors = run(made, IDS[:, :5])
    (rest,), _ = run(made, IDS[:, 5:], past=5, tensors=tensors)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "spec", [None, CacheFormat("int8"), CacheFormat("int4", group_size=4, symmetric=False)], ids=str
)
def test_buffers_hold_what_the_graph_would_cache(spec):
    graph = quantized("w8a16")
    for cache in float_caches(graph) if spec is not None else []:
        quantize_cache(graph, cache, spec)
    made = build_module(graph, CPU, torch.float32)
    assert all(slot.is_buffer for slot in made.slots)
    expected = interpret(graph, feed(graph, IDS))
    (found,), tensors = run(made, IDS)
    torch.testing.assert_close(found, expected[graph.outputs[0].name], rtol=1e-5, atol=5e-6)
    for tensor, node in zip(tensors, graph.outputs[1:], strict=True):
        torch.testing.assert_close(tensor[:, :, : IDS.shape[1]], expected[node.name], rtol=1e-5, atol=5e-6)
        assert (tensor[:, :, IDS.shape[1] :] == 7).all()  # what lies behind is not touched


def test_a_cache_that_something_else_reads_is_read_from_its_buffer():
    graph = quantized("w8a16")
    for cache in float_caches(graph):
        quantize_cache(graph, cache, CacheFormat("int8"))
    attention = next(node for node in graph.fx.nodes if node.target is _canonical.attention.default)
    with graph.fx.inserting_before(attention):
        value = graph.fx.call_function(_aten.neg.default, (attention.args[2],))
    attention.update_arg(2, value)
    made = build_module(graph, CPU, torch.float32)
    assert calls(made)[_canonical.attention.default] == calls(made)[CachedAttention] == 1
    (whole,), _ = run(made, IDS)
    torch.testing.assert_close(whole, logits(graph, IDS), rtol=1e-5, atol=5e-6)


def test_a_cache_that_grows_otherwise_is_passed_on():
    graph = quantized("w8a16")
    append = next(node for node in graph.fx.nodes if node.target is _canonical.kv_append.default)
    append.target, append.args = _aten.cat.default, ([*append.args], 2)
    made = build_module(graph, CPU, torch.float32)
    assert [slot.is_buffer for slot in made.slots] == [False, True, True, True]
    (first, longer), tensors = run(made, IDS[:, :5])
    assert longer.shape[2] == 5
    (rest, longer), _ = run(made, IDS[:, 5:], past=5, tensors=[longer, *tensors[1:]])
    assert longer.shape[2] == 7
    torch.testing.assert_close(torch.cat((first, rest), 1), logits(graph, IDS), rtol=1e-5, atol=5e-6)


def test_a_weight_that_two_layers_share_is_one_module():
    graph = quantized("w8a16")
    linears = [node for node in graph.fx.nodes if node.target is _canonical.linear.default]
    first, second = (n for n in linears[:-1] if str(n.args[1].args[0].target).endswith(".o.weight_codes"))
    second.update_arg(1, first.args[1])
    made = build_module(graph, CPU, torch.bfloat16)
    targets = [node.target for node in made.module.graph.nodes if node.op == "call_module"]
    layers = [t for t in targets if isinstance(made.module.get_submodule(t), WeightOnlyLinear)]
    assert (len(layers), len(set(layers))) == (14, 13)


def test_the_graph_is_not_changed():
    graph = quantized("w8a8-dynamic", RTN(), InsertQDQ(observer=None))
    before = graph.to_dict()
    build_module(graph, CPU, torch.bfloat16)
    assert graph.to_dict() == before


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "opt"])
def test_families(family):
    graph = qc.compile(copy_graph(canonical_graph(family)), [RTN(bits=8)]).graph
    vocab = int(graph.signature.outputs[0].shape[-1])
    ids = torch.randint(vocab, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = logits(graph, ids)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        made = build_module(graph, CPU, dtype)
        (first,), tensors = run(made, ids[:, :6])
        (rest,), _ = run(made, ids[:, 6:], past=6, tensors=tensors)
        found = torch.cat((first, rest), 1)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
