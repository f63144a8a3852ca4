"""A part of building: what the nodes of a graph have become in the new module, in which dtype; its stored tensors."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from qcompiler.ir import Graph, Stretch, ancestors
from qcompiler.lowering.kernels.module.deferred import Deferred, bytes_of
from qcompiler.lowering.kernels.module.plan import Plan

__all__ = ["WIDE", "ModuleValues", "dtype_name"]

WIDE = torch.float32
_aten = torch.ops.aten


def dtype_name(dtype: torch.dtype) -> str:
    """As signatures have it, such as ``float16``."""
    return str(dtype).removeprefix("torch.")


class ModuleValues:
    """A new graph, and the value in it of every node of the old one; stored tensors become buffers when asked for.

    Args:
        graph: the old one, not changed.
        plan: which of its nodes are stored, or computed from stored ones alone.
        device: buffers lie there.
        dtype: of activations.
        is_deferred: a `Deferred` stands for each stored tensor.

    Attributes:
        fx: the new graph.
        members: modules and buffers, by name.
        rounded: nodes of the old graph whose values are rounded to ``dtype``.
    """

    def __init__(
        self, graph: Graph, plan: Plan, device: torch.device, dtype: torch.dtype, *, is_deferred: bool = False
    ) -> None:
        self._is_deferred = is_deferred
        self._graph, self._constant, self._device, self._dtype = graph, plan.constants, device, dtype
        self.fx = fx.Graph()
        self.members: dict[str, nn.Module | Tensor] = {}
        self.rounded: set[Node] = set()
        self._values: dict[Node, Any] = {}
        self._floats: dict[Node, torch.dtype | None] = {}  # of new nodes; None: not floating point
        self._casts: dict[tuple[Node, torch.dtype], Node] = {}
        self._stored: dict[tuple[Node, torch.dtype], Node] = {}

    def __getitem__(self, node: Node) -> Any:
        """The value of a node; of a stored tensor in float32."""
        return self.stored(node, WIDE) if node in self._constant else self._values[node]

    def __setitem__(self, node: Node, value: Any) -> None:
        self._values[node] = value

    def __contains__(self, node: Node) -> bool:
        """Whether a node is stored, or has become something."""
        return node in self._constant or node in self._values

    def dtype_of(self, value: Any) -> torch.dtype | None:
        """The dtype of a new node; None if it is not floating point."""
        return self._floats.get(value)

    def dtype_behind(self, node: Node) -> torch.dtype | None:
        """The same of what an old node has become; None for stored ones too, which make nobody narrow."""
        return None if node in self._constant else self._floats.get(self._values[node])

    def call(self, target: Any, arguments: tuple[Any, ...], dtype: torch.dtype | None) -> Node:
        """A new call, and the dtype of its result, None if it is not floating point."""
        return self.made(self.fx.call_function(target, arguments), dtype)

    def made(self, node: Node, dtype: torch.dtype | None) -> Node:
        """Notes the dtype of a new node."""
        self._floats[node] = dtype
        return node

    def narrow(self, node: Node) -> Any:
        """The value of a node in the module's dtype."""
        return self.in_dtype(node, self._dtype)

    def in_dtype(self, node: Node, dtype: torch.dtype) -> Any:
        """The value of a node in a dtype, if it is floating point."""
        if node in self._constant:
            return self.stored(node, dtype)
        value = self._values[node]
        if not isinstance(value, Node) or self._floats.get(value) in (None, dtype):
            return value
        if dtype == self._dtype:
            self.rounded.add(node)
        return self.cast(value, dtype)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        """A new node in a dtype, if it is floating point."""
        if self._floats.get(value) in (None, dtype):
            return value
        if (value, dtype) not in self._casts:
            self._casts[value, dtype] = self.call(_aten.to.dtype, (value, dtype), dtype)
        return self._casts[value, dtype]

    def stored(self, node: Node, dtype: torch.dtype) -> Node:
        """A stored tensor, or what is computed from some, as a buffer; floating point in the given dtype."""
        if (node, dtype) not in self._stored:
            value = self._evaluated_in(node, dtype)
            is_float = _is_wide(value)
            member: nn.Module | Tensor = value
            if self._is_deferred:
                member = Deferred(lambda: self._evaluated_in(node, dtype), bytes_of(value))
            name = self.member(f"{node.name}_{dtype_name(dtype)}" if is_float else node.name, member)
            made = self.made(self.fx.create_node("get_attr", name), value.dtype if is_float else None)
            self._stored[node, dtype] = self._stored[node, value.dtype] = made
        return self._stored[node, dtype]

    def _evaluated_in(self, node: Node, dtype: torch.dtype) -> Tensor:
        value = self.evaluated(node)
        return (value.to(dtype) if _is_wide(value) else value).contiguous()

    def evaluated(self, node: Node) -> Tensor:
        """A stored tensor, or what is computed from some in float32, on the device."""
        before = ancestors([node])
        stretch = Stretch([n for n in self._graph.fx.nodes if n in before], [node])
        value: Tensor = stretch.load(self._graph.weights.read, self._device)[node]
        return value

    def member(self, name: str, member: nn.Module | Tensor) -> str:
        """The name that a module or buffer is found by."""
        if self.members.setdefault(name, member) is not member:
            name = f"{name}_{len(self.members)}"
            self.members[name] = member
        return name


def _is_wide(value: Tensor) -> bool:
    """Whether it is floating point, and no code."""
    return value.is_floating_point() and value.dtype.itemsize > 1
