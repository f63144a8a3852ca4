"""Operators over whole axes. Source: onnx/docs/Operators.md."""

from collections.abc import Callable
from functools import reduce as fold
from typing import Any

import torch
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operator, Operators
from qcompiler.frontend.onnx.values import Known, Unsupported, Value, as_number, known

__all__ = ["REDUCTIONS"]


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor], product: bool = False) -> Operator:
    def apply(call: Call) -> Value:
        x, axes = call.value(0), call.numbers(1, "axes")
        keep, is_noop = bool(call.get("keepdims", 1)), call.get("noop_with_empty_axes", 0)
        if not axes and is_noop:
            return x
        if product and isinstance(x, Known) and x.array.ndim == 1:  # of a shape
            number = fold(lambda a, b: a * b, x.array, 1)
            return known([number] if keep else number, x.dtype)
        tensor = call.tensor(0)
        return function(tensor, axes or list(range(tensor.dim())), keep)

    return apply


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def apply(call: Call) -> Value:
        x = call.tensor(0)
        if call.version >= 13:
            return function(x, call.get("axis", -1))
        axis = call.get("axis", 1) % x.dim()
        if axis == x.dim() - 1:
            return function(x, axis)
        return function(x.flatten(axis), axis).reshape(x.shape)

    return apply


def _arg(function: Callable[..., Tensor]) -> Operator:
    def apply(call: Call) -> Value:
        call.refuse(select_last_index=0)
        return function(call.tensor(0), call.get("axis", 0), keepdim=bool(call.get("keepdims", 1)))

    return apply


def _top(call: Call) -> tuple[Value | None, ...]:
    count: Any = call.get("k") if call.version < 10 else as_number(call.value(1), "the number of values kept")
    axis, largest = call.get("axis", -1), bool(call.get("largest", 1))
    values, places = torch.topk(call.tensor(0), count, dim=axis, largest=largest, sorted=bool(call.get("sorted", 1)))
    return values, places


def _cumulated(call: Call) -> Value:
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise Unsupported("exclusive or reverse")
    x = call.tensor(0)
    return torch.cumsum(x, as_number(call.value(1), "an axis"), dtype=x.dtype)


REDUCTIONS: Operators = {
    "ReduceMean": _reduced(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "ReduceSum": _reduced(_sum),
    "ReduceMax": _reduced(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "ReduceMin": _reduced(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "ReduceProd": _reduced(_product, product=True),
    "ReduceL1": _reduced(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduced(lambda x, axes, keep: torch.sqrt(_sum(x * x, axes, keep))),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "ReduceLogSumExp": _reduced(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "Softmax": _softmax(lambda x, axis: torch.softmax(x, axis)),
    "LogSoftmax": _softmax(lambda x, axis: torch.log_softmax(x, axis)),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "TopK": _top,
    "CumSum": _cumulated,
}
