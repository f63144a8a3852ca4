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
from qcompiler.graph import Graph, is_op
from qcompiler.hadamard import factors_of
from qcompiler.signature import BATCH, PAST, SEQUENCE, TOTAL, Part, Port, Signature

__all__ = [
    "FLOAT_CACHES",
    "Cache",
    "CacheFormat",
    "cache_rounding",
    "float_caches",
    "keep_range",
    "kept_range",
    "quantize_cache",
]

_canonical = torch.ops.qcompiler
_aten = torch.ops.aten
FLOAT_CACHES = ("float32", "float16", "bfloat16")
"""Dtypes of caches that are not quantized."""
_BITS = {"int8": 8, "int4": 4, "float8_e4m3fn": 8}
_TOKEN_SCALE_BYTES, _ZERO_POINT_BYTES = 2, 1


@dataclass(frozen=True)
class CacheFormat:
    """The number format of cached keys, or of cached values.

    Attributes:
        dtype: of the codes: ``int8``, ``int4`` or ``float8_e4m3fn``.
        scales: ``per_token``: one scale, float16, for every token and head, or for every group of channels of those,
            computed when the token comes; ``static``: calibrated, one per channel of every head for integers, one per
            tensor for floats.
        group_size: channels that share a scale per token; None: all of a head.
        symmetric: without a zero point.

    Raises:
        RecipeError: for a combination that means nothing.
    """

    dtype: Literal["int8", "int4", "float8_e4m3fn"]
    scales: Literal["per_token", "static"] = "per_token"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise RecipeError("unknown format of a cache", got=self.dtype, expected=", ".join(_BITS))
        if self.scales not in ("per_token", "static"):
            raise RecipeError("unknown scales of a cache", got=self.scales, expected="per_token or static")
        if self.group_size is not None and (self.scales == "static" or self.group_size < 1):
            raise RecipeError(
                "groups of a cache are for scales per token",
                got=f"group_size={self.group_size}, scales={self.scales!r}",
                expected="a positive group size with scales='per_token'",
            )
        if self.is_float and not self.symmetric:
            raise RecipeError("float codes have no zero point", got=f"{self.dtype}, asymmetric", expected="symmetric")

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point numbers."""
        return self.dtype == "float8_e4m3fn"

    @property
    def bits(self) -> int:
        """Of one code."""
        return _BITS[self.dtype]

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits == 4

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype of unpacked codes."""
        if self.is_float:
            return torch.float8_e4m3fn
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def port_dtype(self) -> str:
        """The dtype of the cache itself."""
        return "uint8" if self.is_packed else str(self.code_dtype).removeprefix("torch.")

    def block(self, width: int) -> int:
        """Channels of a head of ``width`` that share a scale per token."""
        return width if self.group_size is None else self.group_size

    def place(self, width: int) -> tuple[int, int]:
        """Axis and block, as ``quantize`` takes them."""
        if self.scales == "per_token":
            return -1, self.block(width)
        return (0, 0) if self.is_float else (-1, 1)

    def check_width(self, width: int, where: str) -> None:
        """Refuses heads that the format does not fit.

        Raises:
            RecipeError: for an odd width with packed codes, or one that groups do not divide.
        """
        if self.is_packed and width % 2:
            raise RecipeError("two codes of 4 bits share a byte", where=where, got=f"heads of {width} channels")
        if width % self.block(width):
            raise RecipeError(
                "groups of a cache have to divide a head",
                where=where,
                got=f"groups of {self.group_size}, heads of {width} channels",
                remedy=f"choose a divisor of {width}, or -1 for one scale per head",
            )

    def bytes_per_token(self, heads: int, width: int) -> int:
        """What one token takes in a cache of this format, scales included."""
        codes = heads * width * self.bits // 8
        if self.scales == "static":
            return codes
        per_group = _TOKEN_SCALE_BYTES + (0 if self.symmetric else _ZERO_POINT_BYTES)
        return codes + heads * (width // self.block(width)) * per_group

    def __str__(self) -> str:
        sign = "" if self.is_float else " symmetric" if self.symmetric else " asymmetric"
        if self.scales == "static":
            return f"{self.dtype} static {'per tensor' if self.is_float else 'per channel'}{sign}"
        return f"{self.dtype} per token{f' g{self.group_size}' if self.group_size else ''}{sign}"


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
        scale, zero_point: stored tensors, where ranges are static: 0-D, or ``[1, H, 1, D]``; no zero point where the
            format is symmetric.
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
            scale_node = graph._get_attr(scale)
            zero_node = None if zero_point is None else graph._get_attr(zero_point)
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
            turned = graph.fx.call_function(_canonical.hadamard.default, (query, width))
        turned.meta.update({key: query.meta[key] for key in ("dtype", "shape") if key in query.meta})
        attention.update_arg(0, turned)
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
        graph._get_attr(f"{cache.name}_range")


def kept_range(graph: Graph, layer: int, part: Literal["key", "value"]) -> tuple[Tensor, Tensor] | None:
    """What `keep_range` stored: the least and the largest value seen, float32 ``[H, D]``; None where nothing was."""
    name = f"cache.{layer}.{part}_range"
    if name not in graph.weights:
        return None
    low, high = graph.weights.read(name).unbind()
    return low, high
