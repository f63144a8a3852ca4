"""What a graph tells about its mixtures of experts: which layers are experts, and which choose among them."""

from typing import Any

import torch

from qcompiler.ir.graph import Graph, Site, is_op
from qcompiler.ir.walks import nearest_sites

__all__ = ["is_expert", "routed_from", "routers"]

_canonical = torch.ops.qcompiler
_TAKE = _canonical.take_expert.default
_ROUNDING = (
    _canonical.quantize.default,
    _canonical.dequantize.default,
    _canonical.fp4_quantize.default,
    _canonical.fp4_dequantize.default,
)


def is_expert(site: Site) -> bool:
    """Whether a layer is given only the rows that were routed to it, so that calibration may send it none."""
    return all(is_op(_unrounded(value), _TAKE) for value in site.inputs)


def routed_from(site: Site) -> frozenset[Any]:
    """The values that an expert is given some rows of, the same for all experts of one mixture; empty for no expert."""
    return frozenset(_unrounded(value).args[0] for value in site.inputs) if is_expert(site) else frozenset()


def _unrounded(value: Any) -> Any:
    while is_op(value, *_ROUNDING):
        value = value.args[0]
    return value


def routers(graph: Graph) -> set[str]:
    """The names of the linear layers met first on the way back from what says which expert a row goes to."""
    return nearest_sites(graph, [node.args[1] for node in graph.fx.nodes if is_op(node, _TAKE)])
