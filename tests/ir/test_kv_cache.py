"""Caches in a graph: which are found, what rewriting one changes, formats that mean nothing."""

import pytest
import torch

from qcompiler.errors import PipelineError, RecipeError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.graph import is_op
from qcompiler.ir.kv_cache import cache_rounding, float_caches, keep_range, kept_range, quantize_cache
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import language_model, residual_mlp

ops = torch.ops.qcompiler
INT8 = CacheFormat("int8")


def targets(graph):
    return [node.target for node in graph.fx.nodes if node.op == "call_function"]


def test_every_cache_is_found_once_in_graph_order():
    graph = copy_graph(canonical_graph("llama"))
    caches = float_caches(graph)
    assert sorted(cache.name for cache in caches) == [f"cache.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    order = {node: place for place, node in enumerate(graph.fx.nodes)}
    assert [order[cache.append] for cache in caches] == sorted(order[cache.append] for cache in caches)
    assert {(cache.heads, cache.width) for cache in caches} == {(2, 8)}
    assert all(cache.append.args == (cache.past, cache.new) for cache in caches)
    assert all(is_op(node, ops.attention.default) for cache in caches for node in cache.readers)
    assert [cache.can_rotate for cache in caches] == [cache.part == "key" for cache in caches]
    assert float_caches(residual_mlp()) == []


def test_a_cache_that_something_else_reads_is_left_alone():
    graph = language_model()
    first, second, third, _ = float_caches(graph)
    with graph.fx.inserting_after(first.past):
        graph.fx.call_function(torch.ops.aten.neg.default, (first.past,))
    results = list(graph.outputs)
    results[results.index(second.append)] = third.append
    graph.fx.output_node().args = (tuple(results),)
    assert [cache.name for cache in float_caches(graph)] == ["cache.1.value"]


def test_one_cache_is_rewritten_and_no_other():
    graph = language_model()
    keys, values, *_ = float_caches(graph)
    readers = values.readers
    quantize_cache(graph, values, INT8)
    assert keys.append.target is ops.kv_append.default
    assert values.append.target is ops.dequantize.default  # whoever read the cache reads what it stands for
    assert values.readers == readers
    graph.fx.lint()
    ports = {port.name: port.dtype for port in (*graph.signature.inputs, *graph.signature.outputs)}
    assert (ports["present.0.key"], ports["present.0.value"]) == ("float32", "int8")
    assert len(graph.inputs) == len(graph.signature.inputs)
    place = [port.name for port in graph.signature.outputs].index("present.0.value")
    assert is_op(graph.outputs[place], ops.kv_append.default)
    assert [cache.name for cache in float_caches(graph)] == ["cache.0.key", "cache.1.key", "cache.1.value"]
    assert [port.name for port in graph.signature.inputs].index("past_key_values.0.value_scale") == 5


def test_rounding_is_what_lies_between_floats_and_codes():
    graph = language_model()
    keys, values, *_ = float_caches(graph)
    assert cache_rounding(graph.fx.nodes) == set()
    quantize_cache(graph, keys, CacheFormat("int4", "per_token", 2, symmetric=False))
    found = cache_rounding(graph.fx.nodes)
    assert sorted(str(node.target) for node in found) == [
        f"qcompiler.{name}.default" for name in ("dequantize", "pack_nibbles", "quantize", "unpack_nibbles")
    ]
    quantize_cache(graph, values, INT8)
    assert len(cache_rounding(graph.fx.nodes)) == 6


def test_static_scales_are_stored_tensors():
    graph = language_model()
    keys, *_ = float_caches(graph)
    graph.weights.set("s", torch.rand(1, 2, 1, 4))
    before = len(graph.signature.inputs)
    quantize_cache(graph, keys, CacheFormat("int8", "static"), "s")
    assert "s" in graph.weight_names()
    assert len(graph.signature.inputs) == before
    assert ops.choose_block_qparams.default not in targets(graph)


def test_a_range_is_kept_with_the_graph():
    graph = language_model()
    keys, *_ = float_caches(graph)
    low, high = -torch.rand(2, 4), torch.rand(2, 4)
    keep_range(graph, keys, low, high)
    assert "cache.0.key_range" in graph.weight_names()  # so it is saved
    found = kept_range(graph, 0, "key")
    assert torch.equal(found[0], low)
    assert torch.equal(found[1], high)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int2"}, "unknown format"),
        ({"dtype": "int8", "scales": "per_layer"}, "unknown scales"),
        ({"dtype": "int8", "group_size": 0}, "groups of a cache"),
        ({"dtype": "int8", "group_size": 4, "scales": "static"}, "groups of a cache"),
        ({"dtype": "float8_e4m3fn", "symmetric": False}, "no zero point"),
    ],
)
def test_formats_that_mean_nothing(fields, message):
    with pytest.raises(RecipeError, match=message):
        CacheFormat(**fields)


def test_heads_and_readers_that_do_not_fit():
    graph = language_model()
    keys, values, *_ = float_caches(graph)
    with pytest.raises(RecipeError, match="have to divide"):
        quantize_cache(graph, keys, CacheFormat("int8", group_size=3))
    with pytest.raises(PipelineError, match="attention alone"):
        quantize_cache(graph, values, INT8, rotated=True)
    with pytest.raises(RecipeError, match="share a byte"):
        CacheFormat("int4").check_width(5, "here")
