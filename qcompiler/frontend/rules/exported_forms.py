"""What exporters write out that torch has one operator for, put together again."""

from typing import Any

import torch
from torch import fx

from qcompiler.frontend.pattern import Miss, is_weight, other_operand, replace
from qcompiler.frontend.simplify import replace_by_derived
from qcompiler.ir import Graph, is_op

__all__ = ["error_gelu", "gated_sigmoid", "inverse_root", "late_bias", "without_empty_rows"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler


def inverse_root(graph: Graph, node: fx.Node) -> None:
    """``1 / sqrt(mean + eps)`` → ``rsqrt(mean + eps)``, and ``x / sqrt(mean + eps)`` → ``x * rsqrt(mean + eps)``."""
    root: Any = node.args[1 if is_op(node, _aten.div.Tensor) else 0]
    if not is_op(root, _aten.sqrt.default) or not is_op(root.args[0], _aten.add.Tensor):
        return
    if not any(is_op(term, _aten.mean.dim) for term in root.args[0].args):
        return
    if is_op(node, _aten.reciprocal.default):
        replace(graph, node, _aten.rsqrt.default, (root.args[0],))
        return
    with graph.fx.inserting_before(node):
        inverse = graph.fx.call_function(_aten.rsqrt.default, (root.args[0],))
    inverse.meta.update(root.meta)
    replace(graph, node, _aten.mul.Tensor, (node.args[0], inverse))


def gated_sigmoid(graph: Graph, sigmoid: fx.Node) -> None:
    """``x * sigmoid(x)`` → ``silu(x)``."""
    x = sigmoid.args[0]
    if len(sigmoid.users) != 1:
        return
    (product,) = sigmoid.users
    if is_op(product, _aten.mul.Tensor) and other_operand(product, sigmoid) is x:
        replace(graph, product, _aten.silu.default, (x,))


def error_gelu(graph: Graph, erf: fx.Node) -> None:
    """``0.5 * x * (1 + erf(x / sqrt(2)))``, its factors in any order → ``gelu(x)``."""
    if not is_op(erf.args[0], _aten.div.Tensor, _aten.mul.Tensor):
        return
    x, number = erf.args[0].args[:2]  # type: ignore[union-attr]
    if is_op(erf.args[0], _aten.mul.Tensor):
        number = 1 / number if isinstance(number, float) and number else None
    if not isinstance(number, (int, float)) or abs(number - 2**0.5) > 1e-5 or len(erf.users) != 1:
        return
    (raised,) = erf.users
    if not is_op(raised, _aten.add.Tensor) or other_operand(raised, erf) != 1 or len(raised.users) != 1:
        return
    node, missing = raised, {"half", "x"}
    while missing and len(node.users) == 1:
        (user,) = node.users
        other = other_operand(user, node) if is_op(user, _aten.mul.Tensor) else None
        if other == 0.5 and "half" in missing:
            missing -= {"half"}
        elif other is x and "x" in missing:
            missing -= {"x"}
        elif isinstance(other, fx.Node) and is_op(other, _aten.mul.Tensor) and other.args == (x, 0.5):
            missing = set()
        else:
            return
        node = user
    if not missing:
        replace(graph, node, _aten.gelu.default, (x,))


def late_bias(graph: Graph, add: fx.Node) -> None:
    """``linear(x, weight) + bias`` → ``linear(x, weight, bias)``."""
    for linear, bias in (add.args[:2], add.args[1::-1]):
        if not is_op(linear, _canonical.linear.default) or not is_weight(bias):
            continue
        assert isinstance(linear, fx.Node)
        shape = bias.meta["shape"]
        width = linear.meta["shape"][-1]
        if len(linear.args) > 2 and linear.args[2] is not None:
            continue
        if len(linear.users) != 1 or shape[-1:] != (width,) or any(size != 1 for size in shape[:-1]):
            continue
        if len(shape) > 1:
            with graph.fx.inserting_before(bias):
                flat = graph.fx.call_function(_aten.reshape.default, (bias, [width]))
            flat.meta.update(dtype=bias.meta["dtype"], shape=(width,))
            name = str(bias.target)
            bias = replace_by_derived(graph, flat, (name,), f"{name}.flat", lambda tensor: tensor.reshape(-1))
        x, weight = linear.args[:2]
        replace(graph, add, _canonical.linear.default, (x, weight, bias), **_kept(linear))
        return


def _kept(linear: fx.Node) -> dict[str, Any]:
    return {"weight_shape": linear.meta["weight_shape"]}


def without_empty_rows(graph: Graph, isnan: fx.Node) -> None:
    """``where(isnan(w), 0, w)`` of weights that softmax gives → ``w``.

    They are not numbers where a query may attend to nothing; `attention` gives zeros there by itself.
    """
    weights: Any = isnan.args[0]
    if not is_op(weights, _aten.softmax.int):
        return
    users = list(isnan.users)
    if len(users) != 1:
        raise Miss("it is also looked at elsewhere where weights are no numbers")
    choice = users[0]
    if is_op(choice, _aten.logical_not.default) and len(choice.users) == 1:
        (keep,) = choice.users
        fits = is_op(keep, _aten.where.ScalarOther) and keep.args == (choice, weights, 0)
    else:
        keep = choice
        fits = is_op(keep, _aten.where.ScalarSelf) and keep.args == (isnan, 0, weights)
    if not fits:
        raise Miss("weights that are no numbers become something else than zero")
    keep.replace_all_uses_with(weights)
    graph.fx.erase_node(keep)
