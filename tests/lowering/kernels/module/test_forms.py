"""What the kernels' target recognises in a graph, and what it must not."""

import operator

import pytest
import torch
from torch.fx import Node

import qcompiler as qc
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.graph import Graph, is_op, is_quantized_weight
from qcompiler.ir.kv_cache import float_caches as find_float_caches
from qcompiler.ir.kv_cache import quantize_cache
from qcompiler.ir.qtensor import Affine, Codebook
from qcompiler.lowering.kernels.module.forms import (
    AppendedCache,
    appended_caches,
    cache_reads,
    hides_nothing,
    input_rounding,
    stored_weight,
)
from qcompiler.passes import RTN, Assign, InsertQDQ, SqueezeLLM
from tests.tiny_graphs import language_model

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
GROUPED = ("w4a16-g8", "w4a16-g5", "w4a16-g8-asym", "w2a16-g16")
TOKENS = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(1))


def quantized(scheme: str, *passes) -> Graph:
    passes = passes or (RTN(),)
    calibration = qc.Calibration.from_tokens(TOKENS)
    return qc.compile(language_model(layers=1), [Assign(scheme), *passes], calibration).graph


def linears(graph: Graph) -> list[Node]:
    return [node for node in graph.fx.nodes if is_op(node, _canonical.linear.default)]


@pytest.mark.parametrize(
    "scheme",
    [*GROUPED, "w8a16", "w3a16-channel", "w8a16-tensor-asym", "fp8", "fp8-block", "fp8-e5m2"],
)
def test_weights_come_back_as_they_were_given(scheme):
    graph = quantized(scheme, RTN(), *([InsertQDQ(observer="minmax")] if scheme.startswith("fp8") else []))
    found = 0
    for node in linears(graph):
        weight = node.args[1]
        form = stored_weight(graph, weight)
        if not is_quantized_weight(weight):
            assert form is None
            continue
        codes, scale, zero, *place = (
            graph.weights.read(str(a.target)) if isinstance(a, Node) else a for a in weight.args
        )
        expected = _canonical.dequantize(codes, scale.float(), zero, *place[:2], torch.float32)
        assert isinstance(form, Affine)
        assert torch.equal(form.dequantize(), expected)
        assert form.scale_dtype == scale.dtype
        found += 1
    assert found == 7


def test_codebooks_come_back_with_their_sparse_part():
    graph = quantized("w3a16-lut", SqueezeLLM())
    weights = [node.args[1] for node in linears(graph) if is_quantized_weight(node.args[1])]
    sparse = 0
    for weight in weights:
        form = stored_weight(graph, weight)
        assert isinstance(form, Codebook)
        assert (form.spec.bits, form.spec.codebook) == (3, True)
        sparse += form.sparse is not None
        codes = graph.weights.read(str((weight.args[0] if form.sparse else weight).args[0].target))
        assert torch.equal(form.codes, codes)
    assert sparse == sum(is_op(weight, _canonical.sparse_add.default) for weight in weights) > 0


def test_other_weights_have_no_form():
    graph = quantized("nvfp4a16")
    assert all(stored_weight(graph, node.args[1]) is None for node in linears(graph))
    graph = quantized("w4a16-g8")
    weight = next(node.args[1] for node in linears(graph) if is_quantized_weight(node.args[1]))
    arguments = weight.args
    weight.args = (*arguments[:3], 0, 8, arguments[5])  # groups of rows
    assert stored_weight(graph, weight) is None
    weight.args = (arguments[0], graph.fx.call_function(_aten.mul.Tensor, (arguments[1], 2)), *arguments[2:])
    assert stored_weight(graph, weight) is None  # a scale that is computed


@pytest.mark.parametrize(
    ("scheme", "observer", "granularity", "symmetric", "dynamic"),
    [
        ("w8a8", "minmax", "per_tensor", False, False),
        ("w8a8-actsym", "minmax", "per_tensor", True, False),
        ("w8a8-dynamic", None, "per_token", True, True),
        ("w8a8-dyntensor", None, "per_tensor", False, True),
        ("w4a4-actasym-clip90", None, "per_token", False, True),
        ("fp8", "minmax", "per_tensor", True, False),
        ("fp8-dynamic", None, "per_token", True, True),
    ],
)
def test_rounded_activations(scheme, observer, granularity, symmetric, dynamic):
    graph = quantized(scheme, RTN(), InsertQDQ(observer=observer))
    found = [input_rounding(node.args[0], node.meta["weight_shape"][1]) for node in linears(graph)]
    expected = graph.schemes["0.q"].activation
    for rounding in found[:7]:
        assert rounding is not None
        spec = rounding.spec
        assert (spec.granularity, spec.symmetric, spec.dynamic) == (granularity, symmetric, dynamic)
        assert (spec.dtype, spec.clip) == (expected.dtype, expected.clip)
        assert (rounding.zero_point is None) is symmetric
    assert found[7] is None  # the head is left in float
    q, gate, down = found[0], found[4], found[6]
    is_one_operator = not dynamic or (granularity == "per_token" and symmetric)
    assert [r.norm is not None for r in (q, gate, down)] == [is_one_operator, is_one_operator, False]


def test_a_norm_that_others_read_stays_apart():
    graph = quantized("w8a8-dynamic", RTN(), InsertQDQ(observer=None))
    first = linears(graph)[0]
    norm = input_rounding(first.args[0], 16).norm
    assert norm is not None
    with graph.fx.inserting_after(norm):
        graph.fx.call_function(_aten.neg.default, (norm,))
    assert input_rounding(first.args[0], 16).norm is None


def test_near_misses_are_no_rounding():
    graph = quantized("w8a8-dynamic", RTN(), InsertQDQ(observer=None))
    first = linears(graph)[0]
    assert input_rounding(first.args[0], 8) is None  # one scale for every eight
    dequantize = first.args[0]
    quantize = dequantize.args[0]
    other = next(n for n in graph.fx.nodes if is_op(n, operator.getitem) and n is not quantize.args[1])
    quantize.update_arg(1, other)
    assert input_rounding(dequantize, 16) is None  # quantized by one scale, dequantized by another
    dequantize.update_arg(1, other)
    assert input_rounding(dequantize, 16) is None  # the range of something else


FORMATS = [
    CacheFormat("int8"),
    CacheFormat("int8", group_size=2, symmetric=False),
    CacheFormat("int4", group_size=2),
    CacheFormat("int4", symmetric=False),
    CacheFormat("float8_e4m3fn"),
]


def cached(spec: CacheFormat | None, *, rotated: bool = False) -> tuple[Graph, list[AppendedCache]]:
    graph = language_model(layers=2)
    if spec is not None:
        for cache in find_float_caches(graph):
            quantize_cache(graph, cache, spec, rotated=rotated and cache.can_rotate)
    return graph, appended_caches(graph)


@pytest.mark.parametrize("spec", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("rotated", [False, True])
def test_caches(spec, rotated):
    graph, found = cached(spec, rotated=rotated)
    assert [(c.port.layer, c.port.part) for c in found] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    parts = 1 if spec is None else 2 if spec.symmetric else 3
    past = [node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role == "past"]
    assert sorted(n.name for c in found for n in c.past) == sorted(node.name for node in past)
    for cache in found:
        assert cache.spec == (
            None if spec is None else CacheFormat(spec.dtype, group_size=spec.group_size, symmetric=spec.symmetric)
        )
        assert (cache.width, len(cache.past), len(cache.appends)) == (4, parts, parts)
        (read,) = cache_reads(cache)
        attention = next(user for user in read.users if is_op(user, _canonical.attention.default))
        assert read is attention.args[1 if cache.port.part == "key" else 2]


def test_caches_with_stored_scales():
    graph = language_model(layers=1)
    key, value = find_float_caches(graph)
    graph.weights.set("s", torch.ones(1, 2, 1, 4))
    graph.weights.set("z", torch.ones(1, 2, 1, 4, dtype=torch.uint8))
    graph.weights.set("t", torch.tensor(2.0))
    quantize_cache(graph, key, CacheFormat("int8", "static", symmetric=False), "s", "z")
    quantize_cache(graph, value, CacheFormat("float8_e4m3fn", "static"), "t")
    first, second = appended_caches(graph)
    assert (first.spec, second.spec) == (
        CacheFormat("int8", "static", symmetric=False),
        CacheFormat("float8_e4m3fn", "static"),
    )
    assert (first.scale.target, first.zero_point.target, second.scale.target) == ("s", "z", "t")
    assert len(list(cache_reads(first))) == len(list(cache_reads(second))) == 1


def test_what_is_no_cache():
    graph, found = cached(CacheFormat("int8"))
    append = found[0].appends[0]
    past = append.args[0]
    with graph.fx.inserting_before(append):
        twice = graph.fx.call_function(_aten.add.Tensor, (past, past))
    assert found[0].port not in [cache.port for cache in appended_caches(graph)]  # something else reads what came in
    graph.fx.erase_node(twice)
    assert found[0].port in [cache.port for cache in appended_caches(graph)]
    read = next(cache_reads(found[0]))
    read.update_arg(1, found[1].appends[1])  # by the scales of another cache
    assert not list(cache_reads(found[0]))
    output = graph.fx.output_node()
    results = list(output.args[0])
    results[1], results[3] = results[3], results[1]
    output.args = (tuple(results),)
    assert found[0].port not in [cache.port for cache in appended_caches(graph)]  # leaves by another port


def test_masks_that_hide_padding_alone():
    graph = language_model(layers=1)
    padding = graph.inputs[1]
    attention = next(node for node in graph.fx.nodes if is_op(node, _canonical.attention.default))
    mask = attention.args[3]
    assert hides_nothing(None, padding)
    assert hides_nothing(mask, padding)
    call = graph.fx.call_function
    with graph.fx.inserting_before(attention):
        inverted = call(_aten.logical_not.default, (mask,))
        again = call(_aten.logical_not.default, (inverted,))
        absent = call(_aten.eq.Scalar, (padding, 0))
        lower = call(_aten.tril.default, (mask,))
        additive = call(_aten.to.dtype, (mask, torch.float32))
    assert hides_nothing(again, padding)
    assert not any(hides_nothing(node, padding) for node in (inverted, absent, lower, additive, graph.inputs[0]))
