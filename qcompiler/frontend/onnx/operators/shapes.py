"""Operators that change shapes, or compute them. Source: onnx/docs/Operators.md."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import (
    MOST_KNOWN,
    Known,
    Unsupported,
    Value,
    as_number,
    as_sizes,
    as_tensor,
    known,
)

__all__ = ["SHAPES"]

_FAR = 1 << 31


def _shape(call: Call) -> Value:
    x = call.value(0)
    sizes = list(x.array.shape if isinstance(x, Known) else x.shape)
    return known(sizes[call.get("start", 0) : call.get("end", len(sizes))])


def _size(call: Call) -> Value:
    x = call.value(0)
    return known(x.array.size if isinstance(x, Known) else math.prod(x.shape))


def _reshape(call: Call) -> Value:
    x = call.value(0)
    sizes = call.get("shape") if call.version < 5 else as_sizes(call.value(1))
    if not call.get("allowzero", 0):
        old = list(x.array.shape if isinstance(x, Known) else x.shape)
        sizes = [old[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes)]
    if isinstance(x, Known):
        return Known(x.array.reshape(sizes), x.dtype)
    return x.reshape(sizes)


def _flatten(call: Call) -> Value:
    x = call.tensor(0)
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(call: Call) -> Value:
    x = call.value(0)
    rank = x.array.ndim if isinstance(x, Known) else x.dim()
    order = call.get("perm") or list(range(rank))[::-1]
    return Known(x.array.transpose(order), x.dtype) if isinstance(x, Known) else x.permute(list(order))


def _unsqueeze(call: Call) -> Value:
    x, axes = call.value(0), call.numbers(1, "axes") or []
    rank = (x.array.ndim if isinstance(x, Known) else x.dim()) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = Known(np.expand_dims(x.array, axis), x.dtype) if isinstance(x, Known) else x.unsqueeze(axis)
    return x


def _squeeze(call: Call) -> Value:
    x, axes = call.value(0), call.numbers(1, "axes")
    if isinstance(x, Known):
        return Known(x.array.squeeze(None if axes is None else tuple(axes)), x.dtype)
    if axes is None:
        axes = [axis for axis, size in enumerate(list[Any](x.shape)) if isinstance(size, int) and size == 1]
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def _concat(call: Call) -> Value:
    values = [value for value in call.inputs if value is not None]
    axis = call.get("axis", 0)
    if call.is_known():
        arrays = [value.array for value in values if isinstance(value, Known)]
        return Known(np.concatenate(arrays, axis), values[0].dtype)
    return torch.cat([as_tensor(value, call.device) for value in values], axis)


def _slice_limits(call: Call, rank: int) -> list[tuple[int, Any, Any, int]]:
    starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
    if starts is None or ends is None:
        raise Unsupported("without limits")
    axes, steps = call.numbers(3, "axes"), call.numbers(4, "steps")
    axes = list(range(len(starts))) if axes is None else [axis % rank for axis in axes]
    return list(zip(axes, starts, ends, steps or [1] * len(starts), strict=True))


def _slice(call: Call) -> Value:
    x = call.value(0)
    if isinstance(x, Known):
        array = x.array
        for axis, start, end, step in _slice_limits(call, array.ndim):
            array = array[(slice(None),) * axis + (slice(start, None if step < 0 and end < -_FAR else end, step),)]
        return Known(array, x.dtype)
    for axis, start, end, step in _slice_limits(call, x.dim()):
        if step < 0:
            if start not in (-1, x.shape[axis] - 1) or step != -1 or end > -_FAR:
                raise Unsupported("a backward slice of a part")
            x = torch.flip(x, [axis])
            continue
        if isinstance(end, int) and end >= _FAR - 1:
            end = torch.iinfo(torch.int64).max
        x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return x


def _split(call: Call) -> tuple[Value | None, ...]:
    x, axis = call.value(0), call.get("axis", 0)
    sizes = call.numbers(1, "split")
    if sizes is None:
        whole = x.array.shape[axis] if isinstance(x, Known) else x.shape[axis]
        part = -(-whole // call.outputs)
        sizes = [part] * (call.outputs - 1) + [whole - part * (call.outputs - 1)]
    if isinstance(x, Known):
        places = np.cumsum(sizes)[:-1].tolist()
        return tuple(Known(part, x.dtype) for part in np.split(x.array, places, axis))
    found, start, axis = [], 0, axis % x.dim()
    for size in sizes:
        found.append(torch.ops.aten.slice.Tensor(x, axis, start, start + size))
        start = start + size
    return tuple(found)


def _are_numbers(sizes: list[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _expand(call: Call) -> Value:
    x, sizes = call.value(0), as_sizes(call.value(1))
    if isinstance(x, Known) and _are_numbers(sizes) and math.prod(sizes) <= MOST_KNOWN:
        return Known(np.broadcast_to(x.array, np.broadcast_shapes(x.array.shape, tuple(sizes))), x.dtype)
    tensor = as_tensor(x, call.device)
    rank = max(len(sizes), tensor.dim())
    old: list[Any] = [1] * (rank - tensor.dim()) + list(tensor.shape)
    new = [1] * (rank - len(sizes)) + list(sizes)
    # of two sizes one is 1 or they are equal: a size of the tensor that is not 1 stays
    target = [b if isinstance(a, int) and a == 1 else a for a, b in zip(old, new, strict=True)]
    return tensor.expand(target)


def _tile(call: Call) -> Value:
    x, repeats = call.value(0), as_sizes(call.value(1), "repeats")
    return Known(np.tile(x.array, repeats), x.dtype) if isinstance(x, Known) else x.repeat(repeats)


def _pad(call: Call) -> Value:
    x = call.tensor(0)
    pads = call.numbers(1, "pads") or []
    fill = call.optional(2)
    value = call.get("value", 0.0) if fill is None else as_number(fill, "a fill value")
    axes = call.numbers(3, "axes")
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    around = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat = [size for axis in reversed(range(x.dim())) for size in around.get(axis, (0, 0))]
    mode = call.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=value)
    if mode not in ("reflect", "edge"):
        raise Unsupported(f"mode {mode}")
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode="replicate" if mode == "edge" else mode)


def _constant_of_shape(call: Call) -> Value:
    sizes = as_sizes(call.value(0))
    fill = call.get("value")
    number, dtype = (0.0, torch.float32) if fill is None else (as_number(fill), fill.dtype)
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if all(isinstance(size, int) for size in sizes) and len(sizes) <= 1 and not dtype.is_floating_point:
        return known([number] * math.prod(sizes), dtype, sizes)
    return torch.full(sizes, number, dtype=dtype, device=call.device)


def _range(call: Call) -> Value:
    start, limit, step = (as_number(call.value(index), "a limit of a range") for index in range(3))
    dtype = call.value(0).dtype
    if all(isinstance(number, int) for number in (start, limit, step)) and abs(limit - start) <= MOST_KNOWN:
        return known(list(range(start, limit, step)), dtype)
    return torch.arange(start, limit, step, dtype=dtype, device=call.device)


def _eye_like(call: Call) -> Value:
    x = call.tensor(0)
    call.refuse(k=0)
    return torch.eye(*x.shape, device=call.device).to(x.dtype)


def _trilu(call: Call) -> Value:
    offset = call.optional(1)
    diagonal = 0 if offset is None else as_number(offset, "a diagonal")
    x: Tensor = call.tensor(0)
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


SHAPES: Operators = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "EyeLike": _eye_like,
    "Trilu": _trilu,
}
