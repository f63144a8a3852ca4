"""Float tensors rewritten in float32 while a graph is compiled, and rounded to the dtypes they had at its end."""

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompiler.errors import PipelineError
from qcompiler.ir.graph.nodes import is_op, is_stored

if TYPE_CHECKING:
    from qcompiler.ir.graph.graph import Graph

__all__ = ["derive_float", "remember_dtypes", "rewrite_float", "round_rewritten"]

_canonical = torch.ops.qcompiler
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_WITH_QPARAMS = (
    _canonical.quantize.default,
    _canonical.dequantize.default,
    _canonical.choose_qparams.default,
    _canonical.fp4_scale.default,
    _canonical.fp4_quantize.default,
    _canonical.fp4_dequantize.default,
    _canonical.codebook_dequantize.default,
    _canonical.sparse_add.default,
)


def rewrite_float(graph: "Graph", name: str, value: Tensor) -> None:
    """See `Graph.rewrite_float`."""
    info = graph.weights.info(name)
    if tuple(value.shape) != info.shape:
        raise PipelineError("a weight of the wrong shape", where=name, got=tuple(value.shape), expected=info.shape)
    graph.source_dtypes.setdefault(name, info.dtype)
    graph.weights.set(name, value.float())


def derive_float(
    graph: "Graph", name: str, function: Callable[..., Tensor], sources: tuple[str, ...] | None = None
) -> None:
    """See `Graph.derive_float`."""
    info = graph.weights.info(name)
    graph.source_dtypes.setdefault(name, info.dtype)
    graph.weights.derive(name, sources or (name,), function, dtype="float32", shape=info.shape)


def remember_dtypes(graph: "Graph") -> str:
    """See `Graph.remember_dtypes`."""
    sizes: Counter[str] = Counter()
    for name in graph.weight_names():
        info = graph.weights.info(name)
        if info.dtype in _FLOATS:
            graph.source_dtypes.setdefault(name, info.dtype)
            sizes[info.dtype] += math.prod(info.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default="float32")


def round_rewritten(graph: "Graph", usual: str) -> None:
    """See `Graph.round_rewritten`."""
    quantizers = (node for node in graph.fx.nodes if is_op(node, *_WITH_QPARAMS))
    chosen = {str(part.target) for node in quantizers for part in node.all_input_nodes if is_stored(part)}
    for name in graph.weight_names():
        info = graph.weights.info(name)
        dtype = graph.source_dtypes.get(name, info.dtype if name in chosen else usual)
        if info.dtype == "float32" and dtype != info.dtype and len(info.shape) > 1:
            target = getattr(torch, dtype)
            graph.weights.derive(name, (name,), lambda t, d=target: t.to(d), dtype=dtype, shape=info.shape)
    graph.source_dtypes.clear()
