"""Causal attention over a cache that grows, as GroupQueryAttention, with the rotary embeddings ahead of it."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Stretch, ancestors, float_caches, is_op, quantized_caches
from qcompiler.lowering.onnx.emitter import argument
from qcompiler.lowering.ort.fusing.operators import (
    group_query_attention,
    matmul_nbits,
    merge_heads,
    rotary_embedding,
    split_heads,
)
from qcompiler.lowering.ort.fusing.rotary import Tables, rotary_tables
from qcompiler.lowering.ort.support import is_of_own_cache

__all__ = ["fuse_attention"]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_CPU = torch.device("cpu")
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)
_HEAD_MULTIPLE, _ROTARY_MULTIPLE = 8, 16


@dataclass(frozen=True)
class _Kept:
    """A cache that GroupQueryAttention can keep.

    Attributes:
        past: the input that it grows from.
        new: what is appended, float ``[B, H, S, D]``.
        append: the output.
        bits: of codes; None: in float.
        scale: name of a quantized one's.
    """

    past: fx.Node
    new: fx.Node
    append: fx.Node
    bits: int | None = None
    scale: str | None = None


def fuse_attention(graph: Graph, length: int | None) -> None:
    """Replaces every attention that the operator computes, and every rotary embedding with tables, in place."""
    tables = rotary_tables(graph, length)
    kept = _kept_caches(graph)
    for node in list(graph.fx.nodes):
        if is_op(node, _canonical.attention.default):
            _fuse(graph, node, kept, tables)
    for node, table in tables.items():
        if node.users:
            _rotate_outside(graph, node, table)


def _kept_caches(graph: Graph) -> dict[fx.Node, _Kept]:
    """By the node that attention reads."""
    found = {cache.append: _Kept(cache.past, cache.new, cache.append) for cache in float_caches(graph)}
    outputs: dict[tuple[object, object], fx.Node] = {
        (port.layer, port.part): node
        for node, port in zip(graph.outputs, graph.signature.outputs, strict=True)
        if port.role == "present"
    }
    for cache in quantized_caches(graph):
        append = outputs[cache.layer, cache.part]
        readers = _readers(append)
        if readers and is_op(readers[0], _canonical.unpack_nibbles.default):
            readers = _readers(readers[0])
        past = append.args[0]
        if len(readers) == 1 and isinstance(past, fx.Node) and is_of_own_cache(cache.format):
            found[readers[0]] = _Kept(past, cache.value, append, cache.format.bits, cache.scale)
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the value of a node, but for the graph's output."""
    return [user for user in node.users if user.op != "output" and not is_op(user, _aten.sym_size.int)]


def _fuse(graph: Graph, node: fx.Node, caches: dict[fx.Node, _Kept], tables: dict[fx.Node, Tables]) -> None:
    q, k, v, mask, scale, causal = node.args[:6]
    assert isinstance(q, fx.Node)
    if k not in caches or v not in caches or k is v or not causal:
        return
    key, value = caches[k], caches[v]  # type: ignore[index]
    shapes = [item.meta.get("shape", ()) for item in (q, key.new, value.new)]
    if any(len(shape) != 4 for shape in shapes):
        return
    heads, kv_heads, width = shapes[0][1], shapes[1][1], shapes[0][-1]
    fits = all(isinstance(size, int) for size in (heads, kv_heads, width)) and {s[-1] for s in shapes} == {width}
    if not fits or heads % kv_heads or width % _HEAD_MULTIPLE or key.bits != value.bits:
        return
    if any(_readers(read) != [node] for read in (k, v)):  # type: ignore[arg-type]
        return
    padding = _padding_input(graph, mask)
    if padding is None:
        return
    queries, keys, table = q, key.new, None
    if q in tables and keys in tables and tables[q] == tables[keys] and width % _ROTARY_MULTIPLE == 0:
        table, queries, keys = tables[q], q.args[0], keys.args[0]  # type: ignore[assignment]
    options = {
        "heads": heads,
        "kv_heads": kv_heads,
        "width": width,
        "scale": scale,
        "window": argument(node, 6, "window"),
        "softcap": argument(node, 7, "softcap"),
        "interleaved": table is not None and table.interleaved,
        "bits": key.bits,
    }
    with graph.fx.inserting_before(node):
        parts = _packed(queries, keys, value.new) or [_merged(graph, part) for part in (queries, keys, value.new)]
        names = (None, None) if table is None else (table.cos, table.sin)
        stored = [None if name is None else graph.stored_node(name) for name in (*names, key.scale, value.scale)]
        made = graph.fx.call_function(group_query_attention, (*parts, key.past, value.past, padding, *stored), options)
        made.meta.update(dtype=node.meta["dtype"])
        result, *presents = (graph.fx.call_function(operator.getitem, (made, place)) for place in range(3))
    batch, _, sequence, _ = node.meta["shape"]
    result.meta.update(dtype=node.meta["dtype"], shape=(batch, sequence, heads * width))
    _replace_result(graph, node, result, heads)
    for cache, present in zip((key, value), presents, strict=True):
        present.meta.update(cache.append.meta)
        _replace_output(graph, cache.append, present)
    graph.fx.erase_node(node)


def _packed(*parts: fx.Node) -> list[fx.Node | None] | None:
    """The product that queries, keys and values leave side by side, where nothing else reads it."""
    flat = [found for part in parts if (found := _flat(part)) is not None]
    if len(flat) < len(parts) or not all(is_op(item, operator.getitem) and len(item.users) == 1 for item in flat):
        return None
    product = flat[0].args[0]
    if not isinstance(product, fx.Node) or not is_op(product, matmul_nbits) or len(product.users) != len(flat):
        return None
    if [item.args for item in flat] != [(product, place) for place in range(len(flat))]:
        return None
    product.kwargs = {**product.kwargs, "split": False}
    return [product, None, None]


def _flat(node: fx.Node) -> fx.Node | None:
    """``[B, S, N·H]``, of which a node is the heads, ``[B, N, S, H]``; None where it is something else."""
    split = _swapped(node)
    if split is None or not is_op(split, *_RESHAPES, _aten.unflatten.int):
        return None
    flat = split.args[0]
    assert isinstance(flat, fx.Node)
    batch, sequence, heads, width = split.meta["shape"]
    return flat if flat.meta["shape"] == (batch, sequence, heads * width) else None


def _swapped(node: fx.Node) -> fx.Node | None:
    """``[B, S, N, H]``, where a node swaps its axes."""
    is_swap = is_op(node, _aten.transpose.int) and {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]
    is_swap = is_swap or (is_op(node, _aten.permute.default) and list(node.args[1]) == [0, 2, 1, 3])  # type: ignore[arg-type]
    return node.args[0] if is_swap else None  # type: ignore[return-value]


def _merged(graph: Graph, node: fx.Node) -> fx.Node:
    """``[B, S, N·H]`` of ``[B, N, S, H]``."""
    if (flat := _flat(node)) is not None:
        return flat
    swapped = _swapped(node)
    source = node if swapped is None else swapped
    made = graph.fx.call_function(merge_heads, (source,), {"swapped": swapped is None})
    batch, heads, sequence, width = node.meta["shape"]
    made.meta.update(dtype=node.meta["dtype"], shape=(batch, sequence, heads * width))
    return made


def _replace_result(graph: Graph, node: fx.Node, result: fx.Node, heads: int) -> None:
    """Lets what reads the result of an attention, ``[B, N, S, H]``, read ``[B, S, N·H]``."""
    flat = result.meta["shape"]
    for swap in list(node.users):
        if _swapped(swap) is not node:
            continue
        for reader in list(swap.users):
            if is_op(reader, *_RESHAPES, _aten.flatten.using_ints) and reader.meta["shape"] == flat:
                reader.replace_all_uses_with(result)
                graph.fx.erase_node(reader)
        if not swap.users:
            graph.fx.erase_node(swap)
    if node.users:
        with graph.fx.inserting_after(result):
            apart = graph.fx.call_function(split_heads, (result,), {"heads": heads})
        apart.meta.update(node.meta)
        node.replace_all_uses_with(apart)


def _replace_output(graph: Graph, append: fx.Node, present: fx.Node) -> None:
    output = graph.fx.output_node()
    results: Sequence[fx.Node] = output.args[0]  # type: ignore[assignment]
    output.args = (tuple(present if result is append else result for result in results),)


def _padding_input(graph: Graph, mask: object) -> fx.Node | None:
    """The input ``[B, T]`` that a padding mask ``[B, 1, 1, T]`` is made of, and of nothing else."""
    if not isinstance(mask, fx.Node) or mask.meta.get("dtype") != torch.bool:
        return None
    ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    sources = [node for node in ancestors([mask]) if node.op in ("placeholder", "get_attr")]
    if len(sources) != 1 or sources[0] not in ports or ports[sources[0]].role != "mask":
        return None
    stretch = Stretch(list(graph.fx.nodes), [mask])
    given = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]])
    found: Tensor = stretch.run({sources[0]: given}, stretch.load(graph.weights.read, _CPU), _CPU)[mask]
    return sources[0] if torch.equal(found, given.bool()[:, None, None]) else None


def _rotate_outside(graph: Graph, node: fx.Node, table: Tables) -> None:
    with graph.fx.inserting_before(node):
        stored = [graph.stored_node(name) for name in (table.cos, table.sin)]
        arguments = (node.args[0], table.positions, *stored)
        made = graph.fx.call_function(rotary_embedding, arguments, {"interleaved": table.interleaved})
    made.meta.update({key: node.meta[key] for key in ("dtype", "shape")})
    node.replace_all_uses_with(made)
    graph.fx.erase_node(node)
