"""PyTorch's own products of codes, where they are faster."""

import torch
from torch import Tensor

from qcompiler.lowering.kernels.scaled_linear.layout import FLOAT8
from qcompiler.lowering.kernels.scaled_linear.triton_finish import (
    finish,
)

__all__ = ["by_library", "dense"]

_SCALED_ROWS = 256  # up to which PyTorch's product is not asked to scale rows and columns


def by_library(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """PyTorch's products; rows and columns are scaled by it (bfloat16 results of 8-bit floats) or by `finish`."""
    if x.dtype in FLOAT8:
        y = _scaled_by_library(x, scale, weight, weight_scale, bias) if dtype == torch.bfloat16 else None
        if y is not None:
            return y
        one = torch.ones((), dtype=torch.float32, device=x.device)
        parts = torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)
    else:
        parts = torch._int_mm(x, weight.t())
    y = torch.empty(parts.shape, dtype=dtype, device=x.device)
    finish(parts[None], y, scale, zero_point, weight_scale, weight_sums, bias)
    return y


def _scaled_by_library(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The product in bfloat16 with a scale per row and column; None where cuBLAS has none.

    cuBLAS 12.9 and later refuse some shapes with CUBLAS_STATUS_NOT_SUPPORTED while nothing has been launched yet:
    on Hopper up to 256 rows where K is large, on consumer Blackwell all. With one scale they take the same shapes.
    """
    if len(x) <= _SCALED_ROWS:
        return None
    per_row = scale.reshape(-1, 1).expand(len(x), 1).contiguous()
    offset = None if bias is None else bias.to(torch.bfloat16)  # it takes no other
    try:
        y: Tensor = torch._scaled_mm(x, weight.t(), per_row, weight_scale[None], bias=offset, out_dtype=torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return y


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, as kernels read it: a scale that was expanded, say, is not."""
    return None if tensor is None else tensor.contiguous()
