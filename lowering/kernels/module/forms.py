"""Step 1 of 4: recognises what has a kernel: quantized weights, rounded activations, caches, masks that hide nothing.

Each function looks at one place of a graph and gives what it has proved to be there; `plan` puts that together.

Everything is read from the nodes and from the dtypes of stored tensors; what passes have noted beside the graph is not
asked. What does not have exactly one of these forms gives None, and is then computed as the graph says.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import RecipeError
from qcompiler.ir import FLOAT_CACHES, Affine, CacheFormat, Codebook, Csr, Graph, Port, is_op
from qcompiler.numerics import QuantSpec

__all__ = [
    "AppendedCache",
    "Rounding",
    "appended_caches",
    "cache_reads",
    "hides_nothing",
    "input_rounding",
    "stored_weight",
]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_PACKED = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
_POINTWISE = (_aten.to.dtype, _aten.ne.Scalar, _aten.eq.Scalar, _aten.gt.Scalar, _aten.logical_not.default)
_RESHAPING = (_aten.unsqueeze.default, _aten.expand.default, _aten.clone.default)


def stored_weight(graph: Graph, weight: Node) -> Affine | Codebook | None:
    """The quantized weight that a node dequantizes, read from the store; None for other nodes and forms."""
    if is_op(weight, _canonical.dequantize.default):
        return _affine(graph, *_padded(weight, 6))
    sparse: Csr | None = None
    if is_op(weight, _canonical.sparse_add.default):
        dense, *parts = weight.args
        tensors = [_read(graph, part) for part in parts]
        if any(tensor is None for tensor in tensors):
            return None
        sparse, weight = Csr(*cast(list[Tensor], tensors)), cast(Node, dense)
    if not is_op(weight, _canonical.codebook_dequantize.default):
        return None
    codes, table = (_read(graph, part) for part in weight.args)
    bits = _bits(graph, weight.args[0])
    if codes is None or table is None or bits is None or table.shape[1] != 1 << bits[0]:
        return None
    return Codebook(codes, table, sparse, QuantSpec(f"int{bits[0]}", "per_channel", None, codebook=True))


def _affine(graph: Graph, codes: Any, scale: Any, zero: Any, axis: int, block: int, _: Any) -> Affine | None:
    kind = _bits(graph, codes)
    values, scales = _read(graph, codes), _read(graph, scale)
    if kind is None or values is None or scales is None or (zero is not None and _read(graph, zero) is None):
        return None
    bits, signed, dtype = kind
    zeros = _read(graph, zero)
    wide, scale_dtype = scales.float(), scales.dtype
    if (axis, block) == (0, 0) and scales.dim() < 2:
        granularity: Any = "per_tensor" if scales.dim() == 0 else "per_channel"
        group, wide = None, wide.reshape(-1, 1)
        zeros = None if zeros is None else zeros.reshape(-1, 1)
    elif axis == 1 and block > 0 and scales.dim() == 2 and len(scales) == len(values):
        granularity, group = "per_group", block
    elif axis == 1 and block > 0 and scales.dim() == 2 and dtype.startswith("float8") and zero is None:
        granularity, group = "per_block", block
        wide = wide.repeat_interleave(block, dim=0)[: len(values)]
    else:
        return None
    symmetric = zeros is None
    if symmetric is not signed:
        return None
    name = dtype if dtype.startswith("float8") else f"int{bits}"
    return Affine(values, wide, zeros, QuantSpec(name, granularity, group, symmetric), scale_dtype)


def _bits(graph: Graph, node: Any) -> tuple[int, bool, str] | None:
    """Bits of stored codes, whether they are signed (floats are), and the name of their dtype."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    dtype = graph.weights.info(str(node.target)).dtype
    if dtype.startswith("float8"):
        return 8, True, dtype
    bits = _PACKED.get(dtype.removeprefix("u"))
    return None if bits is None else (bits, not dtype.startswith("u"), dtype)


def _read(graph: Graph, node: Any) -> Tensor | None:
    is_stored = isinstance(node, Node) and node.op == "get_attr"
    return graph.weights.read(str(node.target)) if is_stored else None


def _padded(node: Node, count: int, *defaults: Any) -> list[Any]:
    """Positional arguments, missing ones filled from the end of ``defaults``."""
    missing = count - len(node.args)
    return [*node.args, *(defaults[len(defaults) - missing :] if missing > 0 else ())]


@dataclass(frozen=True)
class Rounding:
    """An activation that is quantized and dequantized again ahead of linear layers.

    Attributes:
        value: the activation.
        codes: the ``quantize`` node.
        scale, zero_point: nodes: stored, or computed by ``choose``; no zero point where symmetric.
        choose: the ``choose_qparams`` node of a dynamic range.
        spec: the number format.
    """

    value: Node
    codes: Node
    scale: Node
    zero_point: Node | None
    choose: Node | None
    spec: QuantSpec

    @property
    def norm(self) -> Node | None:
        """The ``rms_norm`` node that the activation comes from, if nothing else reads it and one operator does both."""
        readers = {self.codes} if self.choose is None else {self.codes, self.choose}
        if not is_op(self.value, _canonical.rms_norm.default) or set(self.value.users) != readers:
            return None
        is_fused = self.choose is None or (self.spec.granularity == "per_token" and self.zero_point is None)
        has_stored_weight = cast(Node, self.value.args[1]).op == "get_attr"
        return self.value if is_fused and has_stored_weight else None


def input_rounding(node: Any, width: int) -> Rounding | None:
    """The rounding whose result is read by a linear layer of ``width`` input channels; None for other nodes."""
    if not is_op(node, _canonical.dequantize.default):
        return None
    codes, scale, zero, axis, block, _ = node.args
    if not is_op(codes, _canonical.quantize.default):
        return None
    value, *given, dtype, bits = _padded(codes, 7, 8)
    if given != [scale, zero, axis, block]:
        return None
    symmetric = dtype != torch.uint8
    if (zero is None) is not symmetric:
        return None
    name = f"int{bits}" if dtype in (torch.int8, torch.uint8) else str(dtype).removeprefix("torch.")
    choose: Node | None = None
    clip = 1.0
    if scale.op != "get_attr":
        choose = scale.args[0] if is_op(scale, operator.getitem) else None
        if choose is None or not is_op(choose, _canonical.choose_qparams.default) or scale.args[1] != 0:
            return None
        if zero is not None and (not is_op(zero, operator.getitem) or zero.args != (choose, 1)):
            return None
        chosen_value, chosen_dtype, along, chosen_bits, clip, _ = _padded(choose, 6, None, 8, 1.0, 0)
        if (chosen_value, chosen_dtype, chosen_bits) != (value, dtype, bits):
            return None
        if (axis, block, along) == (-1, width, -1):
            spec = QuantSpec(name, "per_token", None, symmetric, dynamic=True, clip=clip)
        elif (axis, block, along) == (0, 0, None):
            spec = QuantSpec(name, "per_tensor", None, symmetric, dynamic=True, clip=clip)
        else:
            return None
    elif (axis, block) == (0, 0) and (zero is None or zero.op == "get_attr") and scale.meta["shape"] == ():
        spec = QuantSpec(name, "per_tensor", None, symmetric)
    else:
        return None
    return Rounding(value, codes, scale, zero, choose, spec)


@dataclass(frozen=True)
class AppendedCache:
    """A cache, of keys or of values, that grows by what is appended to it, in float or in codes.

    Attributes:
        port: that its values, or its codes, enter by.
        spec: the format; None in float.
        value: what is appended, in float.
        past: placeholders: of the values or codes, and of the scales and zero points that are appended beside them.
        appends: the ``kv_append`` of each of them.
        scale, zero_point: stored tensors, where ranges are static.
        width: channels of a head.
    """

    port: Port
    spec: CacheFormat | None
    value: Node
    past: tuple[Node, ...]
    appends: tuple[Node, ...]
    scale: Node | None
    zero_point: Node | None
    width: int


def appended_caches(graph: Graph) -> list[AppendedCache]:
    """The caches of a graph that leave as ``kv_append`` of what came in, which nothing else reads; in graph order."""
    ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    leaving = {
        node: (port.layer, port.part)
        for node, port in zip(graph.outputs, graph.signature.outputs, strict=True)
        if port.role == "present"
    }
    found = []
    for past, port in ports.items():
        append = _append_of(past, port, leaving)
        if port.role != "past" or port.part not in ("key", "value") or append is None:
            continue
        cache = _cache(port, past, append, ports, leaving)
        if cache is not None:
            found.append(cache)
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    return sorted(found, key=lambda cache: order[cache.appends[0]])


def _append_of(past: Node, port: Port, leaving: dict[Node, Any]) -> Node | None:
    """The ``kv_append`` that a placeholder goes into and that leaves by the port of the same place."""
    readers = [user for user in past.users if not is_op(user, _aten.sym_size.int)]
    if len(readers) != 1 or not is_op(readers[0], _canonical.kv_append.default) or readers[0].args[0] is not past:
        return None
    return readers[0] if leaving.get(readers[0]) == (port.layer, port.part) else None


def _cache(
    port: Port, past: Node, append: Node, ports: dict[Node, Port], leaving: dict[Node, Any]
) -> AppendedCache | None:
    fresh = cast(Node, append.args[1])
    width = int(port.shape[3])
    if port.dtype in FLOAT_CACHES:
        return AppendedCache(port, None, fresh, (past,), (append,), None, None, width)
    is_packed = is_op(fresh, _canonical.pack_nibbles.default)
    codes = cast(Node, fresh.args[0]) if is_packed else fresh
    if not is_op(codes, _canonical.quantize.default):
        return None
    value, scale, zero, axis, block, dtype, bits = _padded(codes, 7, 8)
    width *= 2 if is_packed else 1
    name: Any = str(dtype).removeprefix("torch.") if dtype.is_floating_point else f"int{bits}"
    chosen = scale.args[0] if is_op(scale, operator.getitem) else None
    try:
        if chosen is None:
            spec = CacheFormat(name, "static", None, zero is None)
        else:
            spec = CacheFormat(name, "per_token", None if block == width else block, zero is None)
    except RecipeError:
        return None
    if (spec.code_dtype, spec.port_dtype, spec.place(width), spec.is_packed) != (
        dtype,
        port.dtype,
        (axis, block),
        is_packed,
    ):
        return None
    if chosen is None:
        if scale.op != "get_attr" or (zero is not None and zero.op != "get_attr"):
            return None
        return AppendedCache(port, spec, value, (past,), (append,), scale, zero, width)
    if not is_op(chosen, _canonical.choose_block_qparams.default) or _padded(chosen, 4, 8) != [
        value,
        dtype,
        block,
        bits,
    ]:
        return None
    parts = [(past, append)]
    for node, index in ((scale, 0), (zero, 1)):
        if node is None:
            continue
        if not is_op(node, operator.getitem) or node.args != (chosen, index):
            return None
        appends = [user for user in node.users if is_op(user, _canonical.kv_append.default) and user.args[1] is node]
        if len(appends) != 1:
            return None
        (grown,) = appends
        beside = cast(Node, grown.args[0])
        if beside not in ports or _append_of(beside, ports[beside], leaving) != grown:
            return None
        parts.append((beside, grown))
    past_nodes, append_nodes = zip(*parts, strict=True)
    return AppendedCache(port, spec, value, past_nodes, append_nodes, None, None, width)


def cache_reads(cache: AppendedCache) -> Iterator[Node]:
    """The nodes that are all of a cache in float: the ``kv_append`` itself, or every ``dequantize`` of its codes."""
    append = cache.appends[0]
    if cache.spec is None:
        yield append
        return
    sources = [append]
    if cache.spec.is_packed:
        unpacked = (_canonical.unpack_nibbles.default,)
        sources = [u for u in append.users if is_op(u, *unpacked) and u.args[1] is cache.spec.symmetric]
    for source in sources:
        for user in source.users:
            if is_op(user, _canonical.dequantize.default) and user.args[0] is source and _is_read(user, cache):
                yield user


def _is_read(node: Node, cache: AppendedCache) -> bool:
    _, scale, zero, axis, block, _ = node.args
    assert cache.spec is not None
    if (axis, block) != cache.spec.place(cache.width):
        return False
    if cache.spec.scales == "static":
        return (_name(scale), _name(zero)) == (_name(cache.scale), _name(cache.zero_point))
    if not is_op(scale, _aten.to.dtype) or cast(Node, scale).args != (cache.appends[1], torch.float32):
        return False
    return zero is (cache.appends[2] if len(cache.appends) > 2 else None)


def _name(node: Any) -> str | None:
    return None if node is None else str(node.target)


def hides_nothing(mask: Node | None, padding: Node | None) -> bool:
    """Whether a mask hides nothing as long as no token is padding.

    Proved where it is computed from the padding mask, element by element: then one element stands for all of them.

    Args:
        mask: of attention; None hides nothing.
        padding: the placeholder, 1 for each token that is none.
    """
    if mask is None:
        return True
    chain: list[Node] = []
    node = mask
    while node is not padding:
        if not is_op(node, *_POINTWISE, *_RESHAPING) or not isinstance(node.args[0], Node):
            return False
        chain.append(node)
        node = node.args[0]
    value = torch.ones(1, dtype=torch.int64)
    for node in reversed(chain):
        if is_op(node, *_POINTWISE):
            value = cast(Any, node.target)(value, *node.args[1:])
    return value.dtype == torch.bool and bool(value.all())
