"""``rms_norm(x, weight, eps)`` in one launch: float32 arithmetic, the result in the dtype of ``x``.

The canonical operator of the same name is its reference, and what the CPU runs: there it is a handful of vector
operations either way.
"""

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import library

__all__ = ["check", "rms_norm_reference"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` along the last axis, computed in float32 and rounded once."""
    normed: Tensor = torch.ops.qcompiler.rms_norm(x, weight, eps)
    return normed


def check(x: Tensor, weight: Tensor) -> None:
    """Holds the arguments of the operator against what it takes.

    Raises:
        InputError: naming what does not fit.
    """
    if x.dtype not in _FLOATS or x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(
            "no rows that have a norm",
            where="x",
            got=f"{x.dtype} {list(x.shape)}",
            expected="float32, float16 or bfloat16 rows of at least one element",
        )
    if tuple(weight.shape) != (x.shape[-1],) or weight.dtype not in _FLOATS:
        raise InputError(
            "the weight of a norm has one element per channel",
            where="weight",
            got=f"{weight.dtype} {list(weight.shape)}",
            expected=f"floating point [{x.shape[-1]}]",
        )
    if weight.device != x.device:
        raise InputError("tensors on several devices", where="weight", got=weight.device, expected=x.device)


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check(x, weight)
    return rms_norm_reference(x, weight, eps)


def _rms_norm_cuda(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from qcompiler.lowering.kernels.rows.triton_rms_norm import launch

    check(x, weight)
    with torch.cuda.device(x.device):
        return launch(x, weight, eps)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


library.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    fake=_rms_norm_fake,
    cpu=_rms_norm_cpu,
    cuda=_rms_norm_cuda,
)
