"""Weights and activations of a graph replaced by their quantized forms."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from qcompiler.errors import PipelineError
from qcompiler.ir.graph.nodes import is_stored, quantized_value
from qcompiler.ir.qtensor import Codebook, QuantizedTensor
from qcompiler.numerics import QuantSpec

if TYPE_CHECKING:
    from qcompiler.ir.graph.graph import Graph
    from qcompiler.ir.graph.sites import Site

__all__ = ["quantize_input", "set_stored_weight", "set_weight"]

_canonical = torch.ops.qcompiler


def set_weight(graph: "Graph", site: "Site", quantized: QuantizedTensor) -> None:
    """See `Graph.set_weight`."""
    expected = (site.out_features, site.in_features)
    if tuple(quantized.codes.shape) != expected:
        raise PipelineError(
            "codes of the wrong shape", where=site.name, got=tuple(quantized.codes.shape), expected=expected
        )
    _replace_weight(graph, site, lambda: _place_weight(graph, site, quantized))


def set_stored_weight(graph: "Graph", site: "Site", spec: QuantSpec) -> None:
    """See `Graph.set_stored_weight`."""
    codes = graph.weights.info(f"{site.weight}_codes")
    if codes.shape != (site.out_features, site.in_features) or codes.dtype != spec.stored_dtype:
        raise PipelineError(
            "stored codes are not those of the format",
            where=codes.name,
            got=f"{codes.dtype} {codes.shape}",
            expected=f"{spec.stored_dtype} {(site.out_features, site.in_features)}",
        )
    _replace_weight(graph, site, lambda: _weight_node(graph, site, spec))


def _replace_weight(graph: "Graph", site: "Site", place: Callable[[], Node]) -> None:
    """Lets a site read what ``place`` makes at the graph's insertion point, instead of its float weight."""
    if any(not is_stored(node.args[1]) for node in site.nodes):
        raise PipelineError(
            "this weight is quantized already",
            where=site.name,
            expected="one weight quantizer per site",
            remedy="drop one of the passes, or keep them apart with schemes",
        )
    with graph.fx.inserting_before(site.nodes[0]):
        weight_node = place()
    for node in site.nodes:
        old = node.args[1]
        node.update_arg(1, weight_node)
        assert isinstance(old, Node)
        if not old.users:
            graph.fx.erase_node(old)
    if not any(node.target == site.weight for node in graph.fx.nodes if node.op == "get_attr"):
        graph.weights.remove(site.weight)


def _place_weight(graph: "Graph", site: "Site", quantized: QuantizedTensor) -> Node:
    """Stores the parts of a quantized weight and makes the node that computes it, at the graph's insertion point."""
    if isinstance(quantized, Codebook):
        return _place_codebook(graph, site, quantized)
    spec, store = quantized.spec, graph.weights
    store.set(f"{site.weight}_codes", quantized.codes, dtype=spec.stored_dtype)
    if spec.is_fp4:
        store.set(f"{site.weight}_scale", quantized.stored_scale)
        if quantized.factor is not None:
            store.set(f"{site.weight}_factor", quantized.factor)
        return _weight_node(graph, site, spec)
    scale, zero_point = quantized.scale, quantized.zero_point
    if spec.granularity == "per_block":
        scale = quantized.stored_scale
    elif spec.granularity == "per_channel":
        scale = scale[:, 0]
        zero_point = None if zero_point is None else zero_point[:, 0]
    elif spec.granularity == "per_tensor":
        scale = scale.reshape(())
        zero_point = None if zero_point is None else zero_point.reshape(())
    store.set(f"{site.weight}_scale", scale.to(quantized.scale_dtype))
    if zero_point is not None:
        store.set(f"{site.weight}_zero_point", zero_point, dtype=spec.stored_dtype)
    return _weight_node(graph, site, spec)


def _weight_node(graph: "Graph", site: "Site", spec: QuantSpec) -> Node:
    """The node that computes a weight from its stored parts, at the graph's insertion point."""
    parts = ("codes", "scale", "factor" if spec.is_fp4 else "zero_point")
    names = [f"{site.weight}_{part}" for part in parts]
    is_there = (True, True, spec.has_factor if spec.is_fp4 else not spec.symmetric)
    sources = [graph.stored_node(name) if there else None for name, there in zip(names, is_there, strict=True)]
    if spec.is_fp4:
        weight = graph.fx.call_function(_canonical.fp4_dequantize.default, (*sources, spec.group_of(site.in_features)))
    else:
        arguments = (*sources, *spec.place(site.in_features), torch.float32)
        weight = graph.fx.call_function(_canonical.dequantize.default, arguments)
    return _described(weight, "float32", (site.out_features, site.in_features))


def _place_codebook(graph: "Graph", site: "Site", quantized: Codebook) -> Node:
    graph.weights.set(f"{site.weight}_codes", quantized.codes, dtype=quantized.spec.stored_dtype)
    graph.weights.set(f"{site.weight}_table", quantized.table)
    sources = tuple(graph.stored_node(f"{site.weight}_{part}") for part in ("codes", "table"))
    weight = graph.fx.call_function(_canonical.codebook_dequantize.default, sources)
    _described(weight, "float32", quantized.codes.shape)
    if quantized.sparse is None:
        return weight
    parts = {
        "sparse_values": quantized.sparse.values,
        "sparse_columns": quantized.sparse.columns,
        "sparse_row_offsets": quantized.sparse.row_offsets,
    }
    for part, tensor in parts.items():
        graph.weights.set(f"{site.weight}_{part}", tensor)
    sources = (weight, *(graph.stored_node(f"{site.weight}_{part}") for part in parts))
    weight = graph.fx.call_function(_canonical.sparse_add.default, sources)
    return _described(weight, "float32", quantized.codes.shape)


def quantize_input(
    graph: "Graph", value: Node, readers: Sequence[Node], spec: QuantSpec, scale: str | None, zero_point: str | None
) -> Node:
    """See `Graph.quantize_input`."""
    for node in readers:
        if quantized_value(node.args[0]) is not None:
            raise PipelineError(
                "this activation is quantized already",
                where=node.name,
                expected="one pass that quantizes activations",
                remedy="drop one of the passes",
            )
    if spec.is_fp4:
        result = _round_to_fp4(graph, value, readers[0], spec, scale)
        for node in readers:
            node.update_arg(0, result)
        return result
    width = readers[0].meta["weight_shape"][1]
    axis, block = spec.input_place(width)
    shape, code_dtype = value.meta.get("shape"), str(spec.code_dtype).removeprefix("torch.")
    with graph.fx.inserting_before(readers[0]):
        if spec.dynamic:
            wanted = (value, *spec.range_options(width))
            chosen = graph.fx.call_function(_canonical.choose_qparams.default, wanted)
            range_shape = () if not block or shape is None else (*shape[:-1], -(-width // block))
            scale_node = _described(graph.fx.call_function(operator.getitem, (chosen, 0)), "float32", range_shape)
            zero_node = None
            if not spec.symmetric:
                zero_node = graph.fx.call_function(operator.getitem, (chosen, 1))
                _described(zero_node, code_dtype, range_shape)
        else:
            assert scale is not None
            scale_node = graph.stored_node(scale)
            zero_node = None if zero_point is None else graph.stored_node(zero_point)
        codes = graph.fx.call_function(
            _canonical.quantize.default,
            (value, scale_node, zero_node, axis, block, spec.code_dtype, *spec.narrow_bits()),
        )
        result = graph.fx.call_function(
            _canonical.dequantize.default, (codes, scale_node, zero_node, axis, block, torch.float32)
        )
    if shape is not None:
        _described(codes, code_dtype, shape)
        _described(result, "float32", shape)
    for node in readers:
        node.update_arg(0, result)
    return result


def _round_to_fp4(graph: "Graph", value: Node, reader: Node, spec: QuantSpec, factor: str | None) -> Node:
    """Puts ``fp4_dequantize(fp4_quantize(value, scale), scale)`` ahead of a reader, the scale computed from it."""
    shape = value.meta.get("shape")
    block = spec.group_of(reader.meta["weight_shape"][1])
    with graph.fx.inserting_before(reader):
        factor_node = None if factor is None else graph.stored_node(factor)
        wanted = (value, factor_node, block, spec.exponent == "floor")
        scale = graph.fx.call_function(_canonical.fp4_scale.default, wanted)
        codes = graph.fx.call_function(_canonical.fp4_quantize.default, (value, scale, factor_node, block))
        result = graph.fx.call_function(_canonical.fp4_dequantize.default, (codes, scale, factor_node, block))
    if shape is not None:
        groups = -(-reader.meta["weight_shape"][1] // block)
        _described(scale, "float8_e4m3fn" if spec.has_factor else "uint8", (*shape[:-1], groups))
        _described(codes, "uint8", shape)
        _described(result, "float32", shape)
    return result


def _described(node: Node, dtype: str, shape: Iterable[int | str]) -> Node:
    node.meta.update(dtype=getattr(torch, dtype), shape=tuple(shape))
    return node
