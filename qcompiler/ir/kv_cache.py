"""Key-value caches in a graph: where they are, how they are quantized, and what is known of their ranges.

A float cache is ``present = kv_append(past, new)``, read by attention. A quantized one keeps codes,

    present = kv_append(past, quantize(new, scale))         read as   dequantize(present, scale)

so that the ports themselves become small. With a range per token the scales are ports too, appended alike; with static
ranges they are stored tensors. Codes of 4 bits lie two in a byte, packed before they are appended and unpacked before
they are dequantized.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import PipelineError, RecipeError
from qcompiler.ir.cache_format import FLOAT_CACHES, CacheFormat
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Part,
    Port,
    Signature,
)
from qcompiler.numerics import factors_of

__all__ = ["Cache", "cache_rounding", "float_caches", "keep_range", "kept_range", "quantize_cache"]

_canonical = torch.ops.qcompiler
_aten = torch.ops.aten


@dataclass(frozen=True)
class Cache:
    """A cache in float, of keys or of values.

    Attributes:
        layer, part: as its ports say.
        append: the ``kv_append`` node.
        past: the placeholder it grows from.
        new: what is appended, ``[B, H, S, D]``.
        heads, width: H and D.
    """

    layer: int
    part: Literal["key", "value"]
    append: Node
    past: Node
    new: Node
    heads: int
    width: int

    @property
    def name(self) -> str:
        """What reports and stored tensors call it."""
        return f"cache.{self.layer}.{self.part}"

    @property
    def readers(self) -> list[Node]:
        """What reads its values, but for the graph's output."""
        return [node for node in self.append.users if node.op != "output" and not is_op(node, _aten.sym_size.int)]

    @property
    def can_rotate(self) -> bool:
        """Whether attention alone reads it, as its keys."""
        return all(
            is_op(node, _canonical.attention.default)
            and node.args[1] is self.append
            and node.args[2] is not self.append
            for node in self.readers
        )


def float_caches(graph: Graph) -> list[Cache]:
    """The caches in float that leave as ``kv_append`` of what came in, which nothing else reads; in graph order."""
    past = {_place(port): node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True)}
    found: dict[Node, Cache] = {}
    for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
        source = past.get(("past", *_place(port)[1:]))
        if port.role != "present" or source is None or not is_op(node, _canonical.kv_append.default):
            continue
        readers = [user for user in source.users if not is_op(user, _aten.sym_size.int)]
        if readers != [node] or graph.outputs.count(node) > 1:
            continue
        if node.args[0] is not source or port.part not in ("key", "value") or port.dtype not in FLOAT_CACHES:
            continue
        new = node.args[1]
        assert isinstance(new, Node)
        assert port.layer is not None
        _, heads, _, width = port.shape
        found[node] = Cache(port.layer, port.part, node, source, new, int(heads), int(width))
    return [found[node] for node in graph.fx.nodes if node in found]


def _place(port: Port) -> tuple[Any, ...]:
    return port.role, port.layer, port.part


def quantize_cache(
    graph: Graph,
    cache: Cache,
    spec: CacheFormat,
    scale: str | None = None,
    zero_point: str | None = None,
    *,
    rotated: bool = False,
) -> None:
    """Makes a float cache one of codes; the ``kv_append`` node becomes the ``dequantize`` that its readers read.

    Args:
        graph: rewritten in place: nodes, ports and signature.
        cache: in float.
        spec: its new format.
        scale, zero_point: stored tensors, where ranges are static: 0-D, ``[1, H, 1, 1]`` or ``[1, H, 1, D]``; no zero
            point where the format is symmetric.
        rotated: turn every head of what is cached by a Hadamard matrix, and queries with it; for keys that attention
            alone reads.

    Raises:
        RecipeError: if the format does not fit the heads, or there is no Hadamard matrix of their width.
        PipelineError: if keys are to be rotated that something else than attention reads.
    """
    spec.check_width(cache.width, cache.name)
    append, fx = cache.append, graph.fx
    value, new_shape, shape = cache.new, _shape("new", cache), _shape("all", cache)
    if rotated:
        value = _rotate(graph, cache, new_shape)
    ports = [_port(cache, cache.part, spec.port_dtype, cache.width // 2 if spec.is_packed else cache.width)]
    groups = cache.width // spec.block(cache.width)
    with fx.inserting_before(append):
        zero_node = None
        axis, block = spec.place(cache.width)
        if spec.scales == "per_token":
            wanted = (value, spec.code_dtype, block, spec.bits)
            chosen = fx.call_function(_canonical.choose_block_qparams.default, wanted)
            scale_node = _call(graph, operator.getitem, (chosen, 0), "float16", (*new_shape[:3], groups))
            if not spec.symmetric:
                zero_node = _call(graph, operator.getitem, (chosen, 1), spec.code_dtype, (*new_shape[:3], groups))
        else:
            assert scale is not None
            scale_node = graph.stored_node(scale)
            zero_node = None if zero_point is None else graph.stored_node(zero_point)
        arguments = (value, scale_node, zero_node, axis, block, spec.code_dtype, spec.bits)
        codes = _call(graph, _canonical.quantize.default, arguments, spec.code_dtype, new_shape)
        if spec.is_packed:
            packed = (*new_shape[:3], cache.width // 2)
            codes = _call(graph, _canonical.pack_nibbles.default, (codes,), "uint8", packed)
        kept = [_append(graph, cache.past, codes, ports[0], shape)]
        if spec.scales == "per_token":
            parts: list[tuple[Part, Node | None]] = [
                ("key_scale" if cache.part == "key" else "value_scale", scale_node),
                ("key_zero_point" if cache.part == "key" else "value_zero_point", zero_node),
            ]
            for part, node in parts:
                if node is not None:
                    dtype = str(node.meta["dtype"]).removeprefix("torch.")
                    ports.append(_port(cache, part, dtype, groups))
                    past = _placeholder(graph, kept[-1].args[0], ports[-1])
                    kept.append(_append(graph, past, node, ports[-1], shape))
            scale_node = _call(graph, _aten.to.dtype, (kept[1], torch.float32), "float32", (*shape[:3], groups))
            zero_node = kept[2] if zero_node is not None else None
        read = kept[0]
        if spec.is_packed:
            read = _call(graph, _canonical.unpack_nibbles.default, (read, spec.symmetric), spec.code_dtype, shape)
    output = fx.output_node()
    results: list[Node] = list(output.args[0])  # type: ignore[arg-type]
    place = results.index(append)
    output.args = ((*results[:place], *kept, *results[place + 1 :]),)
    graph.signature = _with_ports(graph.signature, cache, ports)
    append.target = _canonical.dequantize.default
    append.args = (read, scale_node, zero_node, axis, block, torch.float32)


def _shape(which: Literal["new", "all"], cache: Cache) -> tuple[int | str, ...]:
    """``[B, H, S or T, D]``."""
    return BATCH, cache.heads, SEQUENCE if which == "new" else TOTAL, cache.width


def _call(graph: Graph, target: Any, args: tuple[Any, ...], dtype: str | torch.dtype, shape: Iterable[Any]) -> Node:
    node = graph.fx.call_function(target, args)
    node.meta.update(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, shape=tuple(shape))
    return node


def _append(graph: Graph, past: Node, new: Node, port: Port, shape: tuple[int | str, ...]) -> Node:
    """``kv_append`` of what a port brings; the placeholder takes the port's dtype and width."""
    dtype: torch.dtype = getattr(torch, port.dtype)
    if "shape" in past.meta:
        past.meta.update(dtype=dtype, shape=(*past.meta["shape"][:3], port.shape[3]))
    return _call(graph, _canonical.kv_append.default, (past, new), dtype, (*shape[:3], port.shape[3]))


def _placeholder(graph: Graph, behind: Any, port: Port) -> Node:
    with graph.fx.inserting_after(behind):
        node = graph.fx.placeholder(port.name.replace(".", "_"))
    node.meta.update(dtype=getattr(torch, port.dtype), shape=port.shape)
    return node


def _port(cache: Cache, part: Part, dtype: str, width: int) -> Port:
    """The port that enters."""
    shape = (BATCH, cache.heads, PAST, width)
    return Port(f"past_key_values.{cache.layer}.{part}", "past", dtype, shape, cache.layer, part)


def _with_ports(signature: Signature, cache: Cache, ports: list[Port]) -> Signature:
    """The signature with these ports in the place of the float cache's, entering and leaving."""

    def replaced(port: Port) -> list[Port]:
        if (port.layer, port.part) != (cache.layer, cache.part) or port.role not in ("past", "present"):
            return [port]
        stem = port.name.removesuffix(cache.part)
        return [
            replace(
                port,
                name=f"{stem}{new.part}",
                dtype=new.dtype,
                part=new.part,
                shape=(*port.shape[:3], new.shape[3]),
            )
            for new in ports
        ]

    inputs = [new for port in signature.inputs for new in replaced(port)]
    outputs = [new for port in signature.outputs for new in replaced(port)]
    return Signature(tuple(inputs), tuple(outputs))


def _rotate(graph: Graph, cache: Cache, shape: tuple[int | str, ...]) -> Node:
    """Turns queries and what is appended; returns the latter."""
    width = cache.width
    if factors_of(width) is None:
        raise RecipeError(
            "no Hadamard matrix is known for heads of this width", where=cache.name, got=width, remedy="rotate=False"
        )
    if not cache.can_rotate:
        raise PipelineError("keys are rotated only where attention alone reads them", where=cache.name)
    for attention in cache.readers:
        query = attention.args[0]
        assert isinstance(query, Node)
        with graph.fx.inserting_before(attention):
            rotated = graph.fx.call_function(_canonical.hadamard.default, (query, width))
        rotated.meta.update({key: query.meta[key] for key in ("dtype", "shape") if key in query.meta})
        attention.update_arg(0, rotated)
    with graph.fx.inserting_before(cache.append):
        return _call(graph, _canonical.hadamard.default, (cache.new, width), torch.float32, shape)


def cache_rounding(nodes: Iterable[Node]) -> set[Node]:
    """Of some nodes, those between float keys and values and the codes of a quantized cache, on either side.

    Each gives, of what it is given first, another form; passed through, they leave a cache in float.
    """
    return {node for node in nodes if _is_cache_rounding(node)}


def _is_cache_rounding(node: Node) -> bool:
    append, pack, unpack = (_canonical.kv_append.default, _canonical.pack_nibbles.default, _canonical.unpack_nibbles)
    if is_op(node, _canonical.quantize.default, pack):
        users = {user for reader in node.users for user in (reader.users if is_op(reader, pack) else [reader])}
        return any(is_op(user, append) for user in users)
    if is_op(node, _canonical.dequantize.default, unpack.default):
        source: Any = node.args[0]
        return is_op(source.args[0] if is_op(source, unpack.default) else source, append)
    return False


def keep_range(graph: Graph, cache: Cache, low: Tensor, high: Tensor) -> None:
    """Stores the range of every channel of a cache beside the weights, for targets whose caches have static scales.

    The node that holds it is read by nobody.

    Args:
        graph: rewritten in place.
        cache: before or after it is quantized.
        low, high: float32 ``[H, D]``.
    """
    graph.weights.set(f"{cache.name}_range", torch.stack((low, high)))
    with graph.fx.inserting_before(cache.append):
        graph.stored_node(f"{cache.name}_range")


def kept_range(graph: Graph, layer: int, part: Literal["key", "value"]) -> tuple[Tensor, Tensor] | None:
    """What `keep_range` stored: the least and the largest value seen, float32 ``[H, D]``; None where nothing was."""
    name = f"cache.{layer}.{part}_range"
    if name not in graph.weights:
        return None
    low, high = graph.weights.read(name).unbind()
    return low, high
