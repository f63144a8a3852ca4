"""A part of building: the neighbours of linear layers, as one launch each: norms, gated activations, rotary embeddings.

`build` asks here before it copies a node as it stands.

| in the graph | in the module |
|---|---|
| ``rms_norm`` of rows with a weight for each channel | ``rms_norm`` |
| ``mul(silu(gate), up)``, or with ``gelu``, which nothing else reads | ``gated`` |
| ``rotary`` of queries, and of keys by the same angles | ``rotary_pair`` |
| another ``rotary`` | ``rotary`` |

On CUDA alone: on a CPU, PyTorch's operators are as fast. Nothing is rounded that was not rounded before, and less is:
a gate stays in float32 until it is multiplied. The result of a rotary embedding has the module's dtype where all that
read it would round it themselves, and float32 elsewhere.
"""

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from qcompiler.ir import is_op
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.module.plan import Plan
from qcompiler.lowering.kernels.module.precision import is_moving, precision_of
from qcompiler.lowering.kernels.module.values import WIDE, ModuleValues
from qcompiler.lowering.kernels.rows import gated, rms_norm, rotary  # noqa: F401  (they define operators)

__all__ = ["Neighbours", "choose"]

_aten, _canonical, _kernels = torch.ops.aten, torch.ops.qcompiler, torch.ops.qcompiler_kernels
_OLDEST = 80


def choose(device: Device) -> Choice:
    """Whether the operators of this file are launched, or those of the graph stay."""
    if device.kind != "cuda":
        return Choice("reference", "PyTorch's operators are as fast on a CPU")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if device.capability < _OLDEST:
        return Choice("reference", f"compute capability {device.capability / 10}, below {_OLDEST / 10}")
    return Choice("triton")


class Neighbours:
    """Puts one launch in the place of one or several nodes while a module is built.

    Args:
        values: of the module.
        plan: of the graph.
        device: where it will run.
        dtype: of activations.

    Attributes:
        choice: whether anything is replaced, and why not.
        counts: how many launches of each operator there are.
    """

    def __init__(self, values: ModuleValues, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self._values, self._plan, self._dtype = values, plan, dtype
        self.choice = choose(Device.of(device))
        self.counts: Counter[str] = Counter()
        self._paired: dict[Node, Node] = {}  # by rotary node that was computed with another one, its value

    def emit(self, node: Node) -> Node | None:
        """The value of a node that one launch computes; None for others, which stay what they are."""
        if not self.choice.is_fused:
            return None
        makers: dict[Any, Callable[[Node], Node | None]] = {
            _canonical.rms_norm.default: self._norm,
            _aten.mul.Tensor: self._gated,
            _canonical.rotary.default: self._rotary,
        }
        return makers[node.target](node) if node.target in makers else None

    def _norm(self, node: Node) -> Node | None:
        x, weight, eps = cast(tuple[Node, Node, float], node.args)
        dtype = self._values.dtype_behind(x)
        if dtype is None or tuple(weight.meta["shape"]) != tuple(x.meta["shape"][-1:]):
            return None
        self.counts["rms_norm"] += 1
        given = (self._values[x], self._values.in_dtype(weight, WIDE), eps)
        return self._values.call(_kernels.rms_norm.default, given, dtype)

    def _gated(self, node: Node) -> Node | None:
        found = gate_of(node)
        if found is None:
            return None
        opened, gate, up, activation = found
        dtype = self._values.dtype_behind(gate)
        if dtype is None or self._values.dtype_behind(up) != dtype:
            return None
        self.counts["gated"] += 1
        self._values.rounded.discard(opened)  # what it has become is read by nothing
        given = (self._values[gate], self._values[up], activation)
        return self._values.call(_kernels.gated.default, given, dtype)

    def _rotary(self, node: Node) -> Node | None:
        if node in self._paired:
            return self._paired[node]
        x, cos, sin, interleaved = cast(tuple[Node, Node, Node, bool], node.args)
        if not self._has_rotary_kernel(node):
            return None
        angles = (self._values.in_dtype(cos, WIDE), self._values.in_dtype(sin, WIDE), interleaved)
        partner = self._rotary_partner(node)
        if partner is None:
            self.counts["rotary"] += 1
            result = self._result_of(node)
            return self._values.call(_kernels.rotary.default, (self._values[x], *angles, result), result)
        self.counts["rotary_pair"] += 1
        both, results = (node, partner), [self._result_of(each) for each in (node, partner)]
        given = (*(self._values[cast(Node, each.args[0])] for each in both), *angles, *results)
        pair = self._values.call(_kernels.rotary_pair.default, given, None)
        mine, self._paired[partner] = (
            self._values.call(operator.getitem, (pair, index), result) for index, result in enumerate(results)
        )
        return mine

    def _rotary_partner(self, node: Node) -> Node | None:
        """Another ``rotary`` of the same angles, whose argument is known already: keys beside queries."""
        x, cos, *_ = cast(tuple[Node, ...], node.args)
        for other in cos.users:
            is_like = other is not node and is_op(other, _canonical.rotary.default) and other.args[1:] == node.args[1:]
            if is_like and other not in self._values and cast(Node, other.args[0]) in self._values:
                y = cast(Node, other.args[0])
                is_like_it = self._values.dtype_behind(y) == self._values.dtype_behind(x)
                if is_like_it and self._has_rotary_kernel(other) and y.meta["shape"][-1] == x.meta["shape"][-1]:
                    return other
        return None

    def _has_rotary_kernel(self, node: Node) -> bool:
        x, cos, sin, _ = cast(tuple[Node, Node, Node, bool], node.args)
        shape, angles = x.meta["shape"], cos.meta["shape"]
        return (
            self._values.dtype_behind(x) is not None
            and len(shape) <= rotary.MOST_AXES
            and angles == sin.meta["shape"]
            and 0 < len(angles) <= len(shape)
            and angles[-1] == shape[-1]
            and all(n in (1, m) for n, m in zip(angles[::-1], shape[::-1], strict=False))
        )

    def _result_of(self, node: Node) -> torch.dtype:
        return self._dtype if all(self._rounds(user, node) for user in node.users) else WIDE

    def _rounds(self, user: Node, value: Node) -> bool:
        """Whether a reader rounds a value to the module's dtype before anything is computed from it."""
        if user in self._plan.cache_of_append:
            return self._plan.cache_of_append[user].value is value  # in float: of other caches, quantizers read it
        if is_moving(user.target):
            others = [n for n in user.all_input_nodes if n is not value]
            if any(n in self._values and self._values.dtype_behind(n) == self._dtype for n in others):
                return True  # and so is what it is put beside
            return not others and all(self._rounds(reader, user) for reader in user.users)
        return precision_of(user.target) == "narrow"


def gate_of(node: Node) -> tuple[Node, Node, Node, str] | None:
    """An activation, its argument, and what it is multiplied with, if the product alone reads it; its name."""
    for opened, up in (node.args[:2], node.args[1::-1]):
        if not isinstance(opened, Node) or not isinstance(up, Node) or set(opened.users) != {node} or opened is up:
            continue
        gate = opened.args[0] if opened.args else None
        if not isinstance(gate, Node) or gate.meta.get("shape") != up.meta.get("shape"):
            continue
        if is_op(opened, _aten.silu.default):
            return opened, gate, up, "silu"
        if is_op(opened, _aten.gelu.default):
            return opened, gate, up, "gelu_tanh" if opened.kwargs.get("approximate") == "tanh" else "gelu"
    return None
