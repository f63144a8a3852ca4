"""Quantized caches of a graph; those with scales per token made static ones, from ranges that were kept beside them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import UnsupportedModelError
from qcompiler.ir.cache_format import FLOAT_CACHES, CacheFormat
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.kv_cache import kept_range
from qcompiler.ir.signature import Port

__all__ = ["QuantizedCache", "cache_formats", "formats_by_cache", "quantized_caches", "static_caches", "static_qparams"]

_canonical = torch.ops.qcompiler
_CODES = ("key", "value")
_SMALLEST_SCALE = 2.0**-23
_LARGEST_FLOAT = 448.0
_HEADROOM = 2.0  # of static ranges of floats: room for values beyond those seen, which costs them no precision


def static_qparams(spec: CacheFormat, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover ranges of channels.

    Args:
        spec: a static format.
        low, high: float32 ``[H, D]``.

    Returns:
        float32 and uint8: for floats, which have twice the room of what was seen, 0-D, or ``[1, H, 1, 1]`` where each
        head has its own; else ``[1, H, 1, D]``. No zero point where the format is symmetric.
    """
    largest = torch.maximum(-low, high)
    if spec.is_float:
        largest = largest.amax(-1)[None, :, None, None] if spec.per_head else largest.amax()
        return (_HEADROOM * largest / _LARGEST_FLOAT).clamp(min=_SMALLEST_SCALE), None
    if spec.symmetric:
        scale = largest / ((1 << (spec.bits - 1)) - 1)
        return scale.clamp(min=_SMALLEST_SCALE)[None, :, None], None
    low, high = low.clamp(max=0), high.clamp(min=0)
    most = (1 << spec.bits) - 1
    scale = ((high - low) / most).clamp(min=_SMALLEST_SCALE)
    return scale[None, :, None], torch.round(-low / scale).clamp(0, most).to(torch.uint8)[None, :, None]


def static_caches(graph: Graph) -> Graph | None:
    """A copy of a graph in which every cache with scales per token has static ones.

    The codes keep their dtype; the ports of the scales are gone. Scales are stored among the weights, which both graphs
    share, as ``cache.<layer>.<part>_static_scale`` and ``..._static_zero_point``.

    Returns:
        The copy; None where no cache has scales per token, or one has no range kept beside it (`kept_range`).
    """
    dynamic = {
        (port.layer, str(port.part).removesuffix("_scale")) for port in graph.signature.outputs if _is_scale(port)
    }
    if not dynamic:
        return None
    copy = Graph.from_dict(graph.to_dict(), graph.weights, graph.provenance)
    for node, port in zip(copy.outputs, copy.signature.outputs, strict=True):
        if port.role == "present" and (port.layer, port.part) in dynamic and not _make_static(copy, node, port):
            return None
    _drop_ports(copy, dynamic)
    copy.fx.lint()
    return copy


@dataclass(frozen=True)
class QuantizedCache:
    """A cache of codes, of keys or of values.

    Attributes:
        layer, part: as its port says.
        format: of the codes.
        value: what is rounded and appended, float ``[B, H, S, D]``.
        scale, zero_point: stored tensors, where scales are static: as `static_qparams` gives them.
    """

    layer: int
    part: str
    format: CacheFormat
    value: Node
    scale: str | None
    zero_point: str | None

    @property
    def stored_names(self) -> list[str]:
        """Of all that is stored for it: scale and zero point, and the range that is kept beside them."""
        found = [self.scale, self.zero_point, f"cache.{self.layer}.{self.part}_range"]
        return [name for name in found if name is not None]


def quantized_caches(graph: Graph) -> list[QuantizedCache]:
    """The caches of a graph that are not float, in the order of its outputs."""
    found = []
    for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
        if port.role == "present" and port.part in _CODES and port.dtype not in FLOAT_CACHES:
            value, scale, zero, _, block, dtype, *bits = _quantize_of(node).args
            kind = "float8_e4m3fn" if dtype == torch.float8_e4m3fn else f"int{bits[0] if bits else 8}"
            is_static = isinstance(scale, Node) and scale.op == "get_attr"
            width = 2 * int(port.shape[3]) if kind == "int4" else port.shape[3]
            group = None if is_static or block == width else block
            scales = "static" if is_static else "per_token"
            is_per_head = is_static and kind == "float8_e4m3fn" and block != 0
            spec = CacheFormat(kind, scales, group, zero is None, is_per_head)  # type: ignore[arg-type]
            names = [str(item.target) if is_static and isinstance(item, Node) else None for item in (scale, zero)]
            assert isinstance(value, Node)
            assert port.layer is not None
            found.append(QuantizedCache(port.layer, str(port.part), spec, value, *names))
    return found


def formats_by_cache(graph: Graph) -> dict[str, CacheFormat | None]:
    """Of every cache of keys or values, by the name that reports have for it, its format; None for one in float."""
    found: dict[str, CacheFormat | None] = {
        f"cache.{port.layer}.{port.part}": None
        for port in graph.signature.outputs
        if port.role == "present" and port.part in _CODES
    }
    return found | {f"cache.{cache.layer}.{cache.part}": cache.format for cache in quantized_caches(graph)}


def cache_formats(graph: Graph) -> list[CacheFormat]:
    """The formats that a graph caches keys and values in, each once; none of them for float caches."""
    return list(dict.fromkeys(cache.format for cache in quantized_caches(graph)))


def _is_scale(port: Port) -> bool:
    return port.role == "present" and port.part in tuple(f"{part}_scale" for part in _CODES)


def _make_static(graph: Graph, append: Node, port: Port) -> bool:
    """Gives the nodes that write and read the codes of one cache stored scales; False where no range was kept."""
    assert port.layer is not None
    found = kept_range(graph, port.layer, port.part)  # type: ignore[arg-type]
    if found is None:
        return False
    writer, reader = _quantize_of(append), _dequantize_of(append)
    _, _, zero_node, _, _, dtype, bits = writer.args
    is_float, symmetric = dtype == torch.float8_e4m3fn, zero_node is None
    kind = "float8_e4m3fn" if is_float else f"int{bits}"
    spec = CacheFormat(kind, "static", symmetric=symmetric)  # type: ignore[arg-type]
    names: list[str | None] = []
    for part, tensor in zip(("scale", "zero_point"), static_qparams(spec, *found), strict=True):
        names.append(None if tensor is None else f"cache.{port.layer}.{port.part}_static_{part}")
        if tensor is not None:
            graph.weights.set(str(names[-1]), tensor)
    axis, block = spec.place(int(port.shape[3]))
    for node in (writer, reader):
        with graph.fx.inserting_before(node):
            stored = [None if name is None else graph.stored_node(name) for name in names]
        node.args = (node.args[0], *stored, axis, block, *node.args[5:])
    return True


def _quantize_of(append: Node) -> Node:
    codes = append.args[1]
    assert isinstance(codes, Node)
    if is_op(codes, _canonical.pack_nibbles.default):
        codes = codes.all_input_nodes[0]
    if not is_op(codes, _canonical.quantize.default):
        raise UnsupportedModelError(
            "this cache is packed by operators that are not told apart from the model's own",
            where=append.name,
            got=str(codes.target),
            expected="codes of one quantization",
            remedy="lower the artifact that the file was written of",
        )
    return codes


def _dequantize_of(append: Node) -> Node:
    readers = [node for node in append.users if is_op(node, _canonical.unpack_nibbles.default)]
    (found,) = [
        node for source in (append, *readers) for node in source.users if is_op(node, _canonical.dequantize.default)
    ]
    return found


def _drop_ports(graph: Graph, dynamic: set[tuple[int | None, str]]) -> None:
    """Takes the ports of scales and zero points out, and what only they needed."""
    gone = {(layer, f"{part}_{kind}") for layer, part in dynamic for kind in ("scale", "zero_point")}
    inputs = list(zip(graph.inputs, graph.signature.inputs, strict=True))
    outputs = [
        (node, port)
        for node, port in zip(graph.outputs, graph.signature.outputs, strict=True)
        if (port.layer, port.part) not in gone
    ]
    graph.fx.output_node().args = (tuple(node for node, _ in outputs),)
    graph.fx.eliminate_dead_code()
    left = []
    for node, port in inputs:
        if (port.layer, port.part) in gone:
            graph.fx.erase_node(node)
        else:
            left.append(port)
    graph.signature = replace(graph.signature, inputs=tuple(left), outputs=tuple(port for _, port in outputs))
