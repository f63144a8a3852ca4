"""Rotary embeddings, cache appends and attention, in every form in which models write them out."""

import operator
from typing import Any

import torch
from torch import fx

from qcompiler.frontend.masks import MaskForm, closed_form
from qcompiler.frontend.pattern import (
    Miss,
    arguments,
    is_weight,
    note,
    other_operand,
    replace,
    shared_call,
)
from qcompiler.frontend.rules.written_attention import (
    Logits,
    find_logits,
    find_result,
    with_heads_apart,
    without_repeated_heads,
)
from qcompiler.ir import Graph, is_op

__all__ = [
    "Forms",
    "attention",
    "attention_written_out",
    "kv_append",
    "rotary",
    "rotary_by_halves",
    "without_dead_rows",
]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler
_LAST = torch.iinfo(torch.int64).max

Forms = dict[fx.Node, MaskForm | str]
"""What masks were found to be; layers share theirs."""


def rotary(graph: Graph, add: fx.Node) -> None:
    """``x * cos + cat(-x[half:], x[:half]) * sin``, or the same with pairs that stand side by side."""
    first, second = add.args[:2]
    if not (is_op(first, _aten.mul.Tensor) and is_op(second, _aten.mul.Tensor)):
        return
    for direct, turned in ((first, second), (second, first)):
        for cat, sin in (turned.args[:2], turned.args[1::-1]):  # type: ignore[union-attr]
            interleaved = is_op(cat, _aten.flatten.using_ints)
            x = _pairs_rotated(cat) if interleaved else _half_rotated(cat) if is_op(cat, _aten.cat.default) else None
            if x is None and is_op(cat, _aten.cat.default):
                x, sin = _half_swapped(graph, cat, sin)  # type: ignore[arg-type]
            if x is not None:
                if x not in direct.args:  # type: ignore[union-attr]
                    raise Miss("the rotated value is not the one multiplied by the cosine")
                cos = other_operand(direct, x)  # type: ignore[arg-type]
                replace(graph, add, _canonical.rotary.default, (x, cos, sin, interleaved))
                return


def _half_rotated(cat: Any) -> fx.Node | None:
    operands: Any = cat.args[0]
    rank = len(cat.meta["shape"])
    axis = cat.args[1] if len(cat.args) > 1 else 0
    if len(operands) != 2 or axis not in (-1, rank - 1) or not is_op(operands[0], _aten.neg.default):
        return None
    return _swapped(operands[0].args[0], operands[1], rank)


def _half_swapped(graph: Graph, cat: fx.Node, sin: Any) -> tuple[fx.Node | None, Any]:
    """``cat(x[half:], x[:half])`` that meets ``sin * (-1, ..., 1, ...)``: the minus sign of one half is in the sine."""
    operands: Any = cat.args[0]
    rank = len(cat.meta["shape"])
    if len(operands) != 2 or cat.args[1:] not in ((-1,), (rank - 1,)) or not is_op(sin, _aten.mul.Tensor):
        return None, sin
    x = _swapped(operands[0], operands[1], rank)
    for signs, plain in (sin.args, sin.args[::-1]):
        width = signs.meta["shape"][-1:] if is_weight(signs) else ()
        if x is not None and width and width == x.meta["shape"][-1:] == signs.meta["shape"]:
            values = graph.weights.read(str(signs.target))
            half = len(values) // 2
            if bool((values[:half] == -1).all()) and bool((values[half:] == 1).all()):
                return x, plain
    return None, sin


def _swapped(upper: Any, lower: Any, rank: int) -> fx.Node | None:
    """What two slices are the upper and the lower half of."""
    if not (is_op(upper, _aten.slice.Tensor) and is_op(lower, _aten.slice.Tensor)):
        return None
    x = upper.args[0]
    half = x.meta["shape"][-1] // 2
    lower_args = arguments(lower, 1, 0, 0, _LAST, 1)[1:]
    upper_args = arguments(upper, 1, 0, 0, _LAST, 1)[1:]
    fits = (
        lower.args[0] is x
        and lower_args in ((rank - 1, 0, half, 1), (-1, 0, half, 1))
        and upper_args[0] in (rank - 1, -1)
        and upper_args[1] == half
        and upper_args[2] >= 2 * half
        and upper_args[3] == 1
    )
    return x if fits else None


def _pairs_rotated(flat: Any) -> fx.Node | None:
    """``flatten(stack((-x[1::2], x[::2]), -1))`` → ``x``."""
    stack = flat.args[0]
    if not is_op(stack, _aten.stack.default) or arguments(flat, 1, 0, -1)[1:] not in ((-2, -1), (-2, _LAST)):
        return None
    operands: Any = stack.args[0]
    if stack.args[1:] not in ((-1,), (len(flat.meta["shape"]),)) or len(operands) != 2:
        return None
    if not is_op(operands[0], _aten.neg.default):
        return None
    odd, even = operands[0].args[0], operands[1]
    if not (is_op(odd, _aten.slice.Tensor) and is_op(even, _aten.slice.Tensor)) or odd.args[0] is not even.args[0]:
        return None
    x: fx.Node = odd.args[0]
    rank, width = len(x.meta["shape"]), x.meta["shape"][-1]
    for part, first in ((even, 0), (odd, 1)):
        axis, start, end, step = arguments(part, 1, 0, 0, _LAST, 1)[1:]
        if axis not in (rank - 1, -1) or (start or 0) != first or step != 2 or end < width - 1 + first:
            return None
    return x if width % 2 == 0 else None


def rotary_by_halves(graph: Graph, cat: fx.Node) -> None:
    """``cat(a * cos - b * sin, b * cos + a * sin)``, with a cosine of half the width → ``rotary(cat(a, b), ...)``."""
    operands: Any = cat.args[0]
    if len(operands) != 2 or cat.args[1:] not in ((-1,), (len(cat.meta["shape"]) - 1,)):
        return
    difference, total = operands
    if not (is_op(difference, _aten.sub.Tensor) and is_op(total, _aten.add.Tensor)):
        return
    products = [*difference.args, *total.args]
    if not all(is_op(product, _aten.mul.Tensor) for product in products) or difference.kwargs or total.kwargs:
        return
    for first, cos in (products[0].args, products[0].args[::-1]):
        for second, sin in (products[1].args, products[1].args[::-1]):
            sums = [set(product.args) for product in products[2:]]
            if {second, cos} in sums and {first, sin} in sums and first.meta["shape"] == second.meta["shape"]:
                x = _joined(graph, first, second)
                wide = [
                    shared_call(graph, _aten.cat.default, ([t, t], -1), _doubled(t), t.meta["dtype"])
                    for t in (cos, sin)
                ]
                replace(graph, cat, _canonical.rotary.default, (x, *wide, False))
                return


def _joined(graph: Graph, first: fx.Node, second: fx.Node) -> fx.Node:
    """What two values are the halves of, or one in which they are."""
    if all(is_op(part, operator.getitem) for part in (first, second)) and first.args[0] is second.args[0]:
        split: Any = first.args[0]
        if is_op(split, _aten.split.Tensor, _aten.chunk.default) and (first.args[1], second.args[1]) == (0, 1):
            source: fx.Node = split.args[0]
            if source.meta["shape"] == _doubled(first):
                return source
    return shared_call(graph, _aten.cat.default, ([first, second], -1), _doubled(first), first.meta["dtype"])


def _doubled(node: fx.Node) -> tuple[Any, ...]:
    *leading, width = node.meta["shape"]
    return (*leading, 2 * width)


def kv_append(graph: Graph, cat: fx.Node) -> None:
    """``cat((past, new), 2)``."""
    operands: Any = cat.args[0]
    if len(operands) != 2 or operands[0].op != "placeholder":
        return
    port = graph.signature.inputs[graph.inputs.index(operands[0])]
    if port.role != "past":
        return
    if len(cat.meta["shape"]) != 4 or cat.args[1:2] not in ((2,), (-2,)):
        raise Miss("a cache is appended along another axis than the sequence")
    replace(graph, cat, _canonical.kv_append.default, tuple(operands))


def attention(forms: Forms, graph: Graph, node: fx.Node) -> None:
    """``aten.scaled_dot_product_attention``."""
    query, key, value, mask, dropout, causal = arguments(node, 3, None, 0.0, False)
    if dropout:
        raise Miss("attention with dropout")
    if any(len(operand.meta["shape"]) != 4 for operand in (query, key, value)):
        raise Miss("attention without a batch and a head axis")
    *_, length, width = query.meta["shape"]
    scale: Any = node.kwargs.get("scale")
    if scale is None:
        if not isinstance(width, int):
            raise Miss("the width of a head varies")
        scale = width**-0.5
    if causal and key.meta["shape"][2] != length:
        raise Miss("a causal mask that counts from the first key, where a cache makes more keys than queries")
    _put_attention(forms, graph, node, Logits(query, key, float(scale), None, mask), value, causal=bool(causal))


def without_dead_rows(forms: Forms, graph: Graph, node: fx.Node) -> None:
    """``attention(...) * not(isinf(max(mask)))``: rows that attend to nothing are zeros by themselves."""
    for product in list(node.users):
        alive = other_operand(product, node) if is_op(product, _aten.mul.Tensor) else None
        kept: Any = alive
        for target in (_aten.to.dtype, _aten.logical_not.default, _aten.isinf.default, _aten.amax.default):
            kept = kept.args[0] if is_op(kept, target) else None
        if kept is None:
            continue
        if kept not in forms:
            forms[kept] = closed_form(graph, kept)
        if forms[kept] == MaskForm(bool(node.args[5]), node.args[6], node.args[3]):  # type: ignore[arg-type]
            product.replace_all_uses_with(node)
            graph.fx.erase_node(product)


def attention_written_out(forms: Forms, graph: Graph, softmax: fx.Node) -> None:
    """``softmax(cap(q @ k.T * scale) + mask) @ v``, where scale, cap and mask may be missing."""
    result = find_result(softmax)
    if result is None:
        return  # weights of something else, such as of experts
    if arguments(softmax, 2)[1] not in (-1, len(softmax.meta["shape"]) - 1):
        raise Miss("a softmax over another axis than the keys")
    logits, result = with_heads_apart(softmax, find_logits(graph, softmax), result)
    _put_attention(forms, graph, result.node, logits, result.value, causal=False)


def _put_attention(forms: Forms, graph: Graph, node: fx.Node, logits: Logits, value: fx.Node, *, causal: bool) -> None:
    """Puts ``attention`` in the place of a node of shape ``[B, H, S, D]``."""
    mask, window = logits.mask, None
    if mask is not None:
        if mask not in forms:  # layers share their mask
            forms[mask] = closed_form(graph, mask)
        form = forms[mask]
        if isinstance(form, str):
            note(graph, node, "attention-mask", form)
        else:
            causal, window, mask = form.causal, form.window, form.padding
    key, value = without_repeated_heads(logits.key), without_repeated_heads(value)
    args = (logits.query, key, value, mask, logits.scale, causal, window, logits.softcap)
    replace(graph, node, _canonical.attention.default, args)
