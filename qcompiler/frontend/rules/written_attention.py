"""The parts of an attention that a model writes out: logits, scale, soft cap, masks, and what the weights meet."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from qcompiler.frontend.pattern import Miss, is_weight, shared_call
from qcompiler.ir import BATCH, Dim, Graph, is_op

__all__ = ["Logits", "Result", "find_logits", "find_result", "with_heads_apart", "without_repeated_heads"]

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_MASKINGS = (_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
_CHOICES = (_aten.where.self, _aten.where.ScalarOther)
_ON_THE_WAY = (
    _aten.to.dtype,
    _aten.reshape.default,
    _aten.add.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.tanh.default,
    *_MASKINGS,
    *_CHOICES,
)
_HIDDEN = -1e4
"""In the place of a logit, this or less hides a key."""
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Logits:
    """``cap(query @ key.T * scale) + mask``; the mask is boolean (True: attend) or added."""

    query: fx.Node
    key: fx.Node
    scale: float
    softcap: float | None
    mask: fx.Node | None


@dataclass(frozen=True)
class Result:
    """What weights of attention give, ``[B, H, S, D]``, and the values ``[B, H, T, D]`` they were applied to."""

    node: fx.Node
    value: fx.Node


def find_result(softmax: fx.Node) -> Result | None:
    """The product of a softmax with values, or None where it meets none.

    Raises:
        Miss: if there is one, but something else happens to the weights, too.
    """
    node, is_cut = softmax, False
    while len(node.users) == 1:
        (user,) = node.users
        if is_op(user, _aten.to.dtype, _aten.reshape.default):
            node = user
        elif is_op(user, _aten.slice.Tensor):
            node, is_cut = user, True
        else:
            break
    products = [user for user in node.users if is_op(user, *_PRODUCTS) and user.args[0] is node]
    if not products:
        return None
    if is_cut:
        raise Miss("some of the weights belong to no key")
    if len(node.users) > 1:
        raise Miss("the weights of attention are also read elsewhere")
    product: Any = products[0]
    value = _heads_apart(product.args[1])
    if len(product.meta["shape"]) == 4:
        return Result(product, value)
    ends = list(product.users)
    if len(ends) != 1 or not (is_op(ends[0], _aten.reshape.default) and _is_split(product, ends[0])):
        raise Miss("batch and heads are not taken apart behind the product with the values")
    return Result(ends[0], value)


def _heads_apart(node: Any) -> fx.Node:
    """A node ``[B, H, S, D]`` itself, or what ``[B * H, S, D]`` was reshaped from."""
    if len(node.meta["shape"]) == 4:
        return node  # type: ignore[no-any-return]
    if not (is_op(node, _aten.reshape.default) and _is_split(node, node.args[0])):
        raise Miss("attention without a batch and a head axis")
    return node.args[0]  # type: ignore[no-any-return]


def _is_split(flat: fx.Node, split: fx.Node) -> bool:
    """Whether the first axis of one is two axes of the other."""
    return len(split.meta["shape"]) == 4 and flat.meta["shape"][1:] == split.meta["shape"][2:]


def find_logits(graph: Graph, softmax: fx.Node) -> Logits:
    """Takes apart what a softmax over keys is computed from. Several masks are combined into one.

    Raises:
        Miss: for any other form.
    """
    node, maskings, outer = _maskings(graph, softmax.args[0])
    softcap, inner = None, 1.0
    if is_op(node, _aten.tanh.default):
        softcap = outer
        inner, node = _factors(graph, node.args[0])
    scale = outer * inner
    if is_op(node, _aten.baddbmm.default):
        bias, query, transposed = node.args[:3]
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if softcap is not None or scale != 1.0 or beta != 1:
            raise Miss("a bias is added to the logits and changed afterwards")
        heads = _heads_apart(query).meta["shape"][1]
        maskings.append(("add", _bias_with_heads(graph, bias, heads)))
        scale = float(alpha)
    elif is_op(node, *_PRODUCTS):
        query, transposed = node.args[:2]
    else:
        raise Miss("attention written out with other logits than a scaled product of queries and keys")
    query_factor, query = _factors(graph, query)
    key_factor, transposed = _factors(graph, transposed)
    key = _transposed_keys(graph, transposed, len(node.meta["shape"]))
    if key is None:
        raise Miss("the right factor of the logits is no transpose of the keys")
    under_factor, key = _factors(graph, key)
    scale *= query_factor * key_factor * under_factor
    query, key = _heads_apart(query), _heads_apart(key)
    return Logits(query, key, scale, softcap, _one_mask(graph, maskings[::-1]))


def _transposed_keys(graph: Graph, node: Any, rank: int) -> Any:
    """What the last two axes were swapped of; ``[B, H, D, T]`` may be made of ``[B * H, D, T]`` or ``[B, T, H, D]``.
    None for all else.
    """
    if _swaps_last(node, rank):
        return node.args[0]
    if is_op(node, _aten.permute.default) and list(node.args[1]) == [0, 2, 3, 1]:
        batch, length, heads, width = node.args[0].meta["shape"]
        order = (node.args[0], [0, 2, 1, 3])
        return shared_call(graph, _aten.permute.default, order, (batch, heads, length, width), node.meta["dtype"])
    turned = node.args[0] if is_op(node, _aten.reshape.default) and rank == 4 else None
    if not isinstance(turned, fx.Node) or len(turned.meta["shape"]) != 3 or not _swaps_last(turned, 3):
        return None
    flat: Any = turned.args[0]
    key = flat.args[0] if is_op(flat, _aten.reshape.default) else None
    if key is None or not _is_split(flat, key):
        return None
    *leading, length, width = key.meta["shape"]
    return key if node.meta["shape"] == (*leading, width, length) else None


def with_heads_apart(softmax: fx.Node, logits: Logits, result: Result) -> tuple[Logits, Result]:
    """Undoes that query heads of a group were put one behind the other, ``[B, Hkv, G * S, D]``, for one product.

    Raises:
        Miss: if the weights have other heads than the queries, and that is no such form.
    """
    shape, query = softmax.meta["shape"], logits.query
    inner: Any = query.args[0] if is_op(query, _aten.reshape.default) else None
    ends = list(result.node.users)
    if inner is not None and len(inner.meta["shape"]) == 4 and len(ends) == 1 and is_op(ends[0], _aten.reshape.default):
        batch, heads, length, width = inner.meta["shape"]
        restored = (batch, heads, length, result.node.meta["shape"][-1])
        is_group = inner.meta["shape"][::3] == query.meta["shape"][::3] == (batch, width)
        if is_group and ends[0].meta["shape"] == restored and shape[1:3] in ((heads, length), query.meta["shape"][1:3]):
            return replace(logits, query=inner), Result(ends[0], result.value)
    if len(shape) == 4 and shape[1:3] != query.meta["shape"][1:3]:
        raise Miss("heads are put together otherwise in the weights than in the queries")
    return logits, result


# --- masks ------------------------------------------------------------------------------------------------------------


def _maskings(graph: Graph, node: Any) -> tuple[Any, list[tuple[str, fx.Node]], float]:
    """What lies under masks and factors; the masks, last one first, as ``add``, ``hide`` or ``keep`` and a node; and
    the factor.
    """
    found: list[tuple[str, fx.Node]] = []
    factor = 1.0
    while True:
        number, below = _factors(graph, node)
        if below is not node:
            factor, node = factor * number, below
        elif is_op(node, _aten.to.dtype, _aten.reshape.default):
            node = node.args[0]
        elif is_op(node, _aten.add.Tensor) and not node.kwargs:
            logits, mask = node.args
            if _holds_a_product(mask):
                logits, mask = mask, logits
            if not isinstance(mask, fx.Node) or _holds_a_product(mask):
                raise Miss("the logits are a sum of products, or one with a number")
            node = logits
            if factor != 1.0:
                mask = shared_call(graph, _aten.mul.Tensor, (mask, factor), mask.meta["shape"], mask.meta["dtype"])
            found.append(("add", mask))
        elif is_op(node, *_MASKINGS, *_CHOICES):
            is_choice = is_op(node, *_CHOICES)
            mask, logits = node.args[:2] if is_choice else node.args[1::-1]
            fill = _number(graph, node.args[2])
            if fill is None or fill * factor > _HIDDEN:
                raise Miss("masked logits become something else than a large negative number")
            node = logits
            found.append(("keep" if is_choice else "hide", mask))
        else:
            return node, found, factor


def _holds_a_product(node: Any) -> bool:
    """Whether a product is reached through what may lie between logits and softmax."""
    while is_op(node, *_ON_THE_WAY):
        if is_op(node, _aten.add.Tensor) and _holds_a_product(node.args[1]):
            return True
        node = node.args[1] if is_op(node, *_CHOICES) else node.args[0]
    return is_op(node, *_PRODUCTS, _aten.baddbmm.default)


def _one_mask(graph: Graph, maskings: list[tuple[str, fx.Node]]) -> fx.Node | None:
    """Several masks, the first one first, as one: boolean (True: attend), or added."""
    mask: fx.Node | None = None
    for kind, node in maskings:
        if kind == "hide":
            kind, node = "keep", shared_call(graph, _aten.logical_not.default, (node,), node.meta["shape"], torch.bool)
        if mask is None:
            mask = node
            continue
        shape = _broadcast(mask.meta["shape"], node.meta["shape"])
        boolean = mask.meta["dtype"] == torch.bool
        if kind == "add" and not boolean:
            mask = shared_call(graph, _aten.add.Tensor, (mask, node), shape, mask.meta["dtype"])
        elif kind == "keep" and boolean:
            mask = shared_call(graph, _aten.logical_and.default, (mask, node), shape, torch.bool)
        else:
            keep, added = (node, mask) if kind == "keep" else (mask, node)
            mask = shared_call(graph, _aten.where.ScalarOther, (keep, added, _LOWEST), shape, added.meta["dtype"])
    return mask


def _bias_with_heads(graph: Graph, bias: fx.Node, heads: Dim) -> fx.Node:
    """``[B * H, S, T]`` → ``[B, H, S, T]``."""
    _, queries, keys = bias.meta["shape"]
    sizes: list[Any] = [-1, heads, queries, keys]
    for axis in (1, 2):
        if not isinstance(bias.meta["shape"][axis], int):
            sizes[axis + 1] = shared_call(graph, _aten.sym_size.int, (bias, axis), None, None)
    if not isinstance(heads, int):
        raise Miss("the number of heads varies")
    return shared_call(graph, _aten.reshape.default, (bias, sizes), (BATCH, heads, queries, keys), bias.meta["dtype"])


def _broadcast(one: tuple[Dim, ...], other: tuple[Dim, ...]) -> tuple[Dim, ...]:
    rank = max(len(one), len(other))
    first, second = ((1,) * (rank - len(shape)) + tuple(shape) for shape in (one, other))
    return tuple(b if a == 1 else a for a, b in zip(first, second, strict=True))


# --- numbers and shapes -----------------------------------------------------------------------------------------------


def _factors(graph: Graph, node: Any) -> tuple[float, Any]:
    """The numbers a node is multiplied with and divided by, as one factor, and what lies under them."""
    factor = 1.0
    while True:
        number = _number(graph, node.args[1]) if is_op(node, _aten.mul.Tensor, _aten.div.Tensor) else None
        if number is None:
            return factor, node
        factor = factor * number if is_op(node, _aten.mul.Tensor) else factor / number
        node = node.args[0]


def _number(graph: Graph, value: Any) -> float | None:
    """The value of a number, of a full tensor without axes, or of a stored tensor of one element."""
    if isinstance(value, (int, float)):
        return float(value)
    if is_op(value, _aten.full.default, _aten.scalar_tensor.default):
        fill = value.args[-1]
        return float(fill) if isinstance(fill, (int, float)) and value.meta["shape"] == () else None
    if is_weight(value) and value.meta["shape"] in ((), (1,)):
        return float(graph.weights.read(str(value.target)).item())
    return None


def _swaps_last(node: Any, rank: int) -> bool:
    if is_op(node, _aten.transpose.int):
        return {axis % rank for axis in node.args[1:3]} == {rank - 2, rank - 1}
    order = [*range(rank - 2), rank - 1, rank - 2]
    return is_op(node, _aten.permute.default) and [axis % rank for axis in node.args[1]] == order


def without_repeated_heads(node: fx.Node) -> fx.Node:
    """``reshape(expand(unsqueeze(k, 2)))``, grouped-query attention's repeated heads → ``k``."""
    expand: Any = node.args[0] if is_op(node, _aten.reshape.default) else None
    if not is_op(expand, _aten.expand.default):
        return node
    unsqueeze = expand.args[0]
    if not (is_op(unsqueeze, _aten.unsqueeze.default) and unsqueeze.args[1] == 2):
        return node
    source: fx.Node = unsqueeze.args[0]
    batch, heads, length, width = source.meta["shape"]
    expanded = expand.meta["shape"]
    if expanded == (batch, heads, expanded[2], length, width) and node.meta["shape"][2:] == (length, width):
        return source
    return node
