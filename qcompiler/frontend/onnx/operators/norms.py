"""Norms. Source: onnx/docs/Operators.md, onnxruntime/docs/ContribOperators.md."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import Value

__all__ = ["CONTRIB_NORMS", "NORMS"]

_EPSILON = 1e-5


def _rms(x: Tensor, weight: Tensor, eps: float, axis: int = -1) -> Tensor:
    if axis not in (-1, x.dim() - 1):
        axes = list(range(axis % x.dim(), x.dim()))
        return x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + eps) * weight
    return torch.ops.qcompiler.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, axis: int = -1) -> Tensor:
    return F.layer_norm(x, x.shape[axis % x.dim() :], weight, bias, eps)


def _layer_norm(call: Call) -> Value | tuple[Value | None, ...]:
    call.refuse(stash_type=1)
    eps, axis, x = call.get("epsilon", _EPSILON), call.get("axis", -1), call.tensor(0)
    result = _layer(x, call.tensor(1), call.optional_tensor(2), eps, axis)
    if call.outputs < 2:
        return result
    axes = list(range(axis % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    return result, mean, torch.rsqrt((x - mean).pow(2).mean(axes, keepdim=True) + eps)


def _rms_norm(call: Call) -> Value:
    return _rms(call.tensor(0), call.tensor(1), call.get("epsilon", _EPSILON), call.get("axis", -1))


def _instance_norm(call: Call) -> Value:
    return F.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.get("epsilon", _EPSILON)
    )


def _group_norm(call: Call) -> Value:
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    groups, eps = call.get("num_groups"), call.get("epsilon", _EPSILON)
    if weight.shape[0] == x.shape[1]:
        return F.group_norm(x, groups, weight, bias, eps)
    each = x.shape[1] // groups
    return F.group_norm(x, groups, weight.repeat_interleave(each), bias.repeat_interleave(each), eps)


def _batch_norm(call: Call) -> Value:
    call.refuse(training_mode=0)
    x, weight, bias, mean, variance = (call.tensor(index) for index in range(5))
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, call.get("epsilon", _EPSILON))


def _lp_norm(call: Call) -> Value:
    return F.normalize(call.tensor(0), call.get("p", 2), call.get("axis", -1))


def _added(call: Call, bias: int) -> Tensor:
    """The sum of input, what skips, and a bias."""
    total = call.tensor(0) + call.tensor(1)
    shift = call.optional_tensor(bias)
    return total if shift is None else total + shift


def _skip_rms_norm(call: Call) -> tuple[Value | None, ...]:
    total = _added(call, 3)
    return _rms(total, call.tensor(2), call.get("epsilon", 1e-12)), None, None, total


def _skip_layer_norm(call: Call) -> tuple[Value | None, ...]:
    total = _added(call, 4)
    return _layer(total, call.tensor(2), call.optional_tensor(3), call.get("epsilon", 1e-12)), None, None, total


NORMS: Operators = {
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "LpNormalization": _lp_norm,
}
CONTRIB_NORMS: Operators = {
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
}
