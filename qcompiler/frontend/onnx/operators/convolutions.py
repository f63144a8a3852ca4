"""Convolutions and pools. Source: onnx/docs/Operators.md."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operator, Operators
from qcompiler.frontend.onnx.values import Unsupported, Value

__all__ = ["CONVOLUTIONS"]

_CONVOLUTIONS: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MOST: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEANS: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _padded(call: Call, x: Tensor, kernel: list[int], fill: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input and its symmetric padding; padding of another kind is done ahead."""
    spatial = len(kernel)
    strides, dilations = call.get("strides") or [1] * spatial, call.get("dilations") or [1] * spatial
    mode, pads = call.get("auto_pad", "NOTSET"), list(call.get("pads") or [0] * 2 * spatial)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size)
            small = total // 2
            before.append(small if mode == "SAME_UPPER" else total - small)
            after.append(total - before[-1])
        pads = [*before, *after]
    elif mode not in ("NOTSET", "VALID", ""):
        raise Unsupported(f"auto_pad {mode}")
    first, last = pads[:spatial], pads[spatial:]
    if first == last:
        return x, first
    flat = [size for pair in zip(reversed(first), reversed(last), strict=True) for size in pair]
    return F.pad(x, flat, value=fill), [0] * spatial


def _conv(call: Call) -> Value:
    weight, x = call.tensor(1), call.tensor(0)
    spatial = weight.dim() - 2
    if spatial not in _CONVOLUTIONS:
        raise Unsupported(f"{spatial} spatial axes")
    x, padding = _padded(call, x, list(weight.shape[2:]))
    ones = [1] * spatial
    options = (call.get("strides") or ones, padding, call.get("dilations") or ones, call.get("group", 1))
    found: Tensor = _CONVOLUTIONS[spatial](x, weight, call.optional_tensor(2), *options)
    return found


def _conv_transposed(call: Call) -> Value:
    weight = call.tensor(1)
    spatial = weight.dim() - 2
    call.refuse("output_shape", auto_pad="NOTSET")
    pads = call.get("pads") or [0] * 2 * spatial
    if spatial not in _TRANSPOSED or pads[:spatial] != pads[spatial:]:
        raise Unsupported("padding that differs on both sides")
    found: Tensor = _TRANSPOSED[spatial](
        call.tensor(0),
        weight,
        call.optional_tensor(2),
        call.get("strides") or [1] * spatial,
        pads[:spatial],
        call.get("output_padding") or [0] * spatial,
        call.get("group", 1),
        call.get("dilations") or [1] * spatial,
    )
    return found


def _max_pool(call: Call) -> Value:
    kernel = list(call.get("kernel_shape"))
    call.refuse(storage_order=0)
    if call.outputs > 1:
        raise Unsupported("places of the largest")
    x, padding = _padded(call, call.tensor(0), kernel, float("-inf"))
    ones = [1] * len(kernel)
    strides, dilations = call.get("strides") or ones, call.get("dilations") or ones
    found: Tensor = _MOST[len(kernel)](x, kernel, strides, padding, dilations, bool(call.get("ceil_mode", 0)))
    return found


def _average_pool(call: Call) -> Value:
    kernel = list(call.get("kernel_shape"))
    call.refuse(dilations=[1] * len(kernel))
    counted = bool(call.get("count_include_pad", 0))
    x = call.tensor(0)
    padded, padding = _padded(call, x, kernel)
    if padded is not x and not counted:
        raise Unsupported("padding that differs on both sides")
    strides = call.get("strides") or [1] * len(kernel)
    found: Tensor = _MEANS[len(kernel)](padded, kernel, strides, padding, bool(call.get("ceil_mode", 0)), counted)
    return found


def _global(mean: bool) -> Operator:
    def apply(call: Call) -> Value:
        x = call.tensor(0)
        axes = list(range(2, x.dim()))
        return torch.mean(x, axes, True) if mean else torch.amax(x, axes, True)

    return apply


CONVOLUTIONS: Operators = {
    "Conv": _conv,
    "ConvTranspose": _conv_transposed,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(mean=True),
    "GlobalMaxPool": _global(mean=False),
}
