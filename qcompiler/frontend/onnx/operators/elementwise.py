"""Operators on each element by itself. Source: onnx/docs/Operators.md, onnxruntime/docs/ContribOperators.md."""

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operator, Operators
from qcompiler.frontend.onnx.values import (
    DTYPES,
    Known,
    Unsupported,
    Value,
    as_number,
    as_tensor,
    is_float,
)

__all__ = ["CONTRIB_ELEMENTWISE", "ELEMENTWISE", "combine"]


def _operand(value: Value, other: Value, device: torch.device) -> Any:
    """One operand of two: a single known number stays a number, where the other has the shape of the result."""
    if (
        isinstance(value, Known)
        and isinstance(other, Tensor)
        and value.array.size == 1
        and value.array.ndim <= other.dim()
    ):
        return value.array.item()
    return as_tensor(value, device)


def combine(
    call: Call, numbers: Callable[[Any, Any], Any], tensors: Callable[[Any, Any], Tensor], dtype: torch.dtype | None
) -> Value:
    """Two operands, broadcast; ``dtype`` is that of the result where not that of the operands."""
    first, second = call.value(0), call.value(1)
    if isinstance(first, Known) and isinstance(second, Known):
        pairs = np.broadcast(first.array, second.array)
        result = np.empty(pairs.size, dtype=object)
        for place, (one, other) in enumerate(pairs):
            result[place] = numbers(one, other)
        return Known(result.reshape(pairs.shape), dtype or first.dtype)
    one, other = _operand(first, second, call.device), _operand(second, first, call.device)
    return tensors(one, other)


def _binary(
    numbers: Callable[[Any, Any], Any], tensors: Callable[[Any, Any], Tensor], dtype: torch.dtype | None = None
) -> Operator:
    return lambda call: combine(call, numbers, tensors, dtype)


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Of two tensors; a number becomes one."""

    def apply(one: Any, other: Any) -> Tensor:
        like = one if isinstance(one, Tensor) else other
        pair = (
            v if isinstance(v, Tensor) else torch.full((), v, dtype=like.dtype, device=like.device)
            for v in (one, other)
        )
        return function(*pair)

    return apply


def _add(one: Any, other: Any) -> Tensor:
    return torch.add(one, other) if isinstance(one, Tensor) else torch.add(other, one)


def _mul(one: Any, other: Any) -> Tensor:
    return torch.mul(one, other) if isinstance(one, Tensor) else torch.mul(other, one)


def _sub(one: Any, other: Any) -> Tensor:
    return torch.sub(one, other) if isinstance(one, Tensor) else torch.rsub(other, one)


def _divide_numbers(one: Any, other: Any) -> Any:
    if isinstance(one, float) or isinstance(other, float):
        return one / other
    if isinstance(one, int) and isinstance(other, int):
        return abs(one) // abs(other) * (1 if (one < 0) == (other < 0) else -1)
    return one // other


def _divide(one: Any, other: Any) -> Tensor:
    dtype = one.dtype if isinstance(one, Tensor) else other.dtype
    if not dtype.is_floating_point:
        return torch.div(one, other, rounding_mode="trunc")
    if not isinstance(one, Tensor) and one == 1:
        return torch.reciprocal(other)
    return torch.div(one, other)


def _power(call: Call) -> Value:
    base, exponent = call.value(0), call.value(1)
    if isinstance(base, Known) and isinstance(exponent, Known):
        return combine(call, operator.pow, torch.pow, None)
    if isinstance(exponent, Known) and exponent.array.size == 1:
        number = as_number(exponent)
        x = as_tensor(base, call.device)
        whole = isinstance(number, float) and number == int(number)
        return torch.pow(x, int(number) if whole else number)
    return torch.pow(as_tensor(base, call.device), as_tensor(exponent, call.device)).to(base.dtype)


def _shift(call: Call) -> Value:
    if call.get("direction", "RIGHT") == "LEFT":
        return combine(call, operator.lshift, _both(torch.bitwise_left_shift), None)
    return combine(call, operator.rshift, _both(torch.bitwise_right_shift), None)


def _mod(call: Call) -> Value:
    if call.get("fmod", 0):
        return torch.fmod(call.tensor(0), call.tensor(1))
    return combine(call, operator.mod, _both(torch.remainder), None)


def _many(numbers: Callable[..., Any], tensors: Callable[[Any, Any], Tensor]) -> Operator:
    def apply(call: Call) -> Value:
        values = [value for value in call.inputs if value is not None]
        if all(isinstance(value, Known) for value in values):
            found: Value = values[0]
            for value in values[1:]:
                found = combine(Call([found, value], {}, call.version, 1, call.device), numbers, tensors, None)
            return found
        return reduce(tensors, (as_tensor(value, call.device) for value in values))

    return apply


def _mean(call: Call) -> Value:
    tensors = [call.tensor(index) for index in range(len(call.inputs))]
    return reduce(torch.add, tensors) / len(tensors)


def _unary(tensors: Callable[[Tensor], Tensor], numbers: Callable[[Any], Any] | None = None) -> Operator:
    def apply(call: Call) -> Value:
        x = call.value(0)
        if numbers is not None and isinstance(x, Known):
            return x.map(numbers)
        return tensors(as_tensor(x, call.device))

    return apply


def _compare(numbers: Callable[[Any, Any], Any], tensors: Callable[[Any, Any], Tensor]) -> Operator:
    return _binary(numbers, tensors, torch.bool)


def _flipped(
    direct: Callable[[Any, Any], Tensor], turned: Callable[[Any, Any], Tensor]
) -> Callable[[Any, Any], Tensor]:
    """A comparison whose tensor comes first."""
    return lambda one, other: direct(one, other) if isinstance(one, Tensor) else turned(other, one)


def _where(call: Call) -> Value:
    condition, yes, no = call.value(0), call.value(1), call.value(2)
    if call.is_known():
        assert isinstance(condition, Known)
        assert isinstance(yes, Known)
        assert isinstance(no, Known)
        chosen = np.broadcast(condition.array, yes.array, no.array)
        result = np.empty(chosen.size, dtype=object)
        for place, (holds, one, other) in enumerate(chosen):
            result[place] = one if holds else other
        return Known(result.reshape(chosen.shape), yes.dtype)
    mask = as_tensor(condition, call.device)
    if isinstance(yes, Known) and isinstance(no, Known) and yes.array.size == no.array.size == 1:
        one, other = (torch.full((), as_number(v), dtype=v.dtype, device=call.device) for v in (yes, no))
        return torch.where(mask, one, other).reshape(mask.shape)
    if isinstance(no, Known) and no.array.size == 1 and isinstance(yes, Tensor):
        return torch.where(mask, yes, as_number(no))
    if isinstance(yes, Known) and yes.array.size == 1 and isinstance(no, Tensor):
        return torch.where(torch.logical_not(mask), no, as_number(yes))
    return torch.where(mask, as_tensor(yes, call.device), as_tensor(no, call.device))


def _cast_to(value: Value, dtype: torch.dtype, device: torch.device) -> Value:
    if isinstance(value, Known):
        if (
            dtype.is_floating_point
            and value.array.size <= 1
            and all(type(v) in (int, float, bool) for v in value.array.flat)
        ):
            return value.map(float, dtype)
        if dtype == torch.bool:
            return value.map(lambda number: number != 0, dtype)
        if not dtype.is_floating_point and not is_float(value):
            return value.map(lambda number: int(number) if isinstance(number, (bool, torch.SymBool)) else number, dtype)
        if not dtype.is_floating_point and all(isinstance(number, (int, float)) for number in value.array.flat):
            return value.map(int, dtype)
    x = as_tensor(value, device)
    if x.dtype.is_floating_point and dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        most = torch.finfo(dtype).max
        return x.clamp(-most, most).to(dtype)
    return x.to(dtype)


def _cast(call: Call) -> Value:
    if call.get("to") not in DTYPES:
        raise Unsupported(f"a cast to type {call.get('to')}")
    return _cast_to(call.value(0), DTYPES[call.get("to")], call.device)


def _cast_like(call: Call) -> Value:
    return _cast_to(call.value(0), call.value(1).dtype, call.device)


def _clip(call: Call) -> Value:
    if call.version < 11:
        return torch.clamp(call.tensor(0), call.get("min"), call.get("max"))
    limits = [call.optional(1), call.optional(2)]
    x = call.value(0)
    if call.is_known() and isinstance(x, Known):
        low, high = (None if limit is None else as_number(limit) for limit in limits)
        return x.map(lambda n: min(max(n, n if low is None else low), n if high is None else high))
    if all(limit is None or isinstance(limit, Known) for limit in limits):
        low, high = (None if limit is None else as_number(limit) for limit in limits)
        return as_tensor(x, call.device) if low is None and high is None else torch.clamp(call.tensor(0), low, high)
    return torch.clamp(call.tensor(0), call.optional_tensor(1), call.optional_tensor(2))


def _identity(call: Call) -> Value:
    return call.value(0)


def _dropout(call: Call) -> Value | tuple[Value | None, ...]:
    mode = call.optional(2)
    if mode is not None and bool(as_number(mode, "the training mode")):
        raise Unsupported("dropout in training")
    return call.value(0) if call.outputs < 2 else (call.value(0), torch.ones_like(call.tensor(0), dtype=torch.bool))


def _gelu(call: Call) -> Value:
    return F.gelu(call.tensor(0), approximate=call.get("approximate", "none"))


def _swish(call: Call) -> Value:
    x, alpha = call.tensor(0), call.get("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(x * alpha)


def _quick_gelu(call: Call) -> Value:
    x = call.tensor(0)
    return x * torch.sigmoid(x * call.get("alpha", 1.702))


def _biased_gelu(approximate: str) -> Operator:
    def apply(call: Call) -> Value:
        bias = call.optional_tensor(1)
        x = call.tensor(0)
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    return apply


def _is_infinite(call: Call) -> Value:
    x = call.tensor(0)
    positive, negative = call.get("detect_positive", 1), call.get("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    return x == (math.inf if positive else -math.inf) if positive or negative else torch.zeros_like(x, dtype=torch.bool)


ELEMENTWISE: Operators = {
    "Add": _binary(operator.add, _add),
    "Sub": _binary(operator.sub, _sub),
    "Mul": _binary(operator.mul, _mul),
    "Div": _binary(_divide_numbers, _divide),
    "Pow": _power,
    "Mod": _mod,
    "Neg": _unary(torch.neg, operator.neg),
    "Abs": _unary(torch.abs, abs),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Erf": _unary(torch.erf),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tanh": _unary(torch.tanh),
    "Sigmoid": _unary(torch.sigmoid),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Relu": _unary(F.relu),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Mish": _unary(F.mish),
    "HardSwish": _unary(F.hardswish),
    "LeakyRelu": lambda call: F.leaky_relu(call.tensor(0), call.get("alpha", 0.01)),
    "Elu": lambda call: F.elu(call.tensor(0), call.get("alpha", 1.0)),
    "HardSigmoid": lambda call: (call.tensor(0) * call.get("alpha", 0.2) + call.get("beta", 0.5)).clamp(0, 1),
    "Gelu": _gelu,
    "Swish": _swish,
    "Clip": _clip,
    "Min": _many(min, torch.minimum),
    "Max": _many(max, torch.maximum),
    "Sum": _many(operator.add, torch.add),
    "Mean": _mean,
    "And": _compare(lambda a, b: a and b, _both(torch.logical_and)),
    "Or": _compare(lambda a, b: a or b, _both(torch.logical_or)),
    "Xor": _compare(operator.xor, _both(torch.logical_xor)),
    "Not": _unary(torch.logical_not, operator.not_),
    "BitwiseAnd": _binary(operator.and_, _both(torch.bitwise_and)),
    "BitwiseOr": _binary(operator.or_, _both(torch.bitwise_or)),
    "BitwiseXor": _binary(operator.xor, _both(torch.bitwise_xor)),
    "BitwiseNot": _unary(torch.bitwise_not),
    "BitShift": _shift,
    "Equal": _compare(operator.eq, _flipped(torch.eq, torch.eq)),
    "Less": _compare(operator.lt, _flipped(torch.lt, torch.gt)),
    "LessOrEqual": _compare(operator.le, _flipped(torch.le, torch.ge)),
    "Greater": _compare(operator.gt, _flipped(torch.gt, torch.lt)),
    "GreaterOrEqual": _compare(operator.ge, _flipped(torch.ge, torch.le)),
    "Where": _where,
    "IsNaN": _unary(torch.isnan),
    "IsInf": _is_infinite,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Identity": _identity,
    "Dropout": _dropout,
}

CONTRIB_ELEMENTWISE: Operators = {
    "Gelu": _biased_gelu("none"),
    "BiasGelu": _biased_gelu("none"),
    "FastGelu": _biased_gelu("tanh"),
    "QuickGelu": _quick_gelu,
}
