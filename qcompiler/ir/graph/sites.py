"""`Site`: a linear layer, the place where a weight meets an activation."""

from dataclasses import dataclass

import torch
from torch.fx import Graph as FxGraph
from torch.fx import Node

from qcompiler.ir.graph.nodes import is_op, is_quantized_weight, stored_names

__all__ = ["Site", "find_sites", "site_name"]


@dataclass(frozen=True)
class Site:
    """One linear layer: the place where a weight meets an activation.

    Attributes:
        name: the parameter path of the source model without ``.weight``; it survives every rewrite.
        weight: the name of the float weight, ``[out, in]``.
        nodes: the ``linear`` nodes that use it (several where a module is called more than once).
        out_features, in_features: the shape of the weight.
    """

    name: str
    weight: str
    nodes: tuple[Node, ...]
    out_features: int
    in_features: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The distinct activations it reads."""
        return tuple(dict.fromkeys(node.args[0] for node in self.nodes))  # type: ignore[misc]

    @property
    def bias(self) -> str | None:
        """The name of the bias tensor, if there is one."""
        arguments = self.nodes[0].args
        bias = arguments[2] if len(arguments) > 2 else None
        return str(bias.target) if isinstance(bias, Node) else None


def site_name(weight_name: str) -> str:
    """The site a weight belongs to: its name without a trailing ``.weight``."""
    return weight_name.removesuffix(".weight")


def find_sites(fx: FxGraph) -> list[Site]:
    """Every linear layer of some nodes, in execution order."""
    nodes: dict[str, list[Node]] = {}
    for node in fx.nodes:
        if is_op(node, torch.ops.qcompiler.linear.default):
            name = _weight_name(node)
            if name is not None:
                nodes.setdefault(name, []).append(node)
    found = []
    for name, users in nodes.items():
        rows, columns = users[0].meta["weight_shape"]
        found.append(Site(site_name(name), name, tuple(users), rows, columns))
    return found


def _weight_name(linear: Node) -> str | None:
    """The name a layer's float weight has or had; None for a matrix that is computed."""
    weight = linear.args[1]
    assert isinstance(weight, Node)
    if weight.op == "get_attr":
        return str(weight.target)
    return stored_names(weight)[0].removesuffix("_codes") if is_quantized_weight(weight) else None
