"""Triton kernel of the RMS norm: one program per row, split over threads as the quantizers split theirs."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.rows import triton_quantize_rows as quantize_rows_triton
from qcompiler.lowering.kernels.rows.triton_quantize_rows import RowConfig

__all__ = ["ahead_of_time", "configs", "launch"]

_ONE_PASS = 16384  # elements that stay in registers; the weight needs some too, which quantizers do without
_LOOPED = 1 << 20  # a width that the quantizers read in a loop
_WIDTHS = (*(1 << power for power in range(5, 15)), _ONE_PASS + 1)  # every block there is, and the loop


def configs(width: int) -> tuple[RowConfig, ...]:
    """Those of the quantizers, the default first; rows too long for registers are read twice."""
    return quantize_rows_triton.configs(width if width <= _ONE_PASS else _LOOPED)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    out_ptr,
    width,
    stride,
    eps,
    BLOCK: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """The norm of one row; rows of ``x`` are ``stride`` elements apart."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x_ptr += row * stride
    out_ptr += row * width
    columns = tl.arange(0, BLOCK)
    if ONE_PASS:
        mask = columns < width
        x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(x * x, 0), tl.cast(width, tl.float32))
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(out_ptr + columns, (x * inverse * weight).to(dtype), mask=mask)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
            squares += x * x
        mean = tl.div_rn(tl.sum(squares, 0), tl.cast(width, tl.float32))
        inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + columns, (x * inverse * weight).to(dtype), mask=inside)


def launch(x: Tensor, weight: Tensor, eps: float, *, config: RowConfig | None = None) -> Tensor:
    """The operator, of arguments that have been checked.

    Args:
        x: ``[..., K]``; copied where its rows do not lie at equal distances.
        weight: ``[K]``.
        eps: added to the mean of the squares.
        config: None: what a search found, or the default.
    """
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if config is None:
        key = (tuning.row_bucket(len(rows)), width)
        found = tuning.found(x.device, "rms_norm", key, RowConfig, lambda: configs(width))
        config = found or configs(width)[0]
    _norm_kernel[(len(rows),)](
        rows,
        weight.contiguous(),
        out,
        width,
        rows.stride(0),
        float(eps),
        BLOCK=config.block,
        ONE_PASS=width <= config.block,
        num_warps=config.warps,
    )
    return out


def ahead_of_time() -> Iterator[KernelCase]:
    """Every configuration in bfloat16; the defaults at 4096 and in the loop, in float16 and float32 too."""
    for width in _WIDTHS:
        for config in configs(width):
            is_default = config == configs(width)[0] and width in (4096, _WIDTHS[-1])
            for floats in ("bf16", "fp16", "fp32") if is_default else ("bf16",):
                kind = "rows" if width <= config.block else "loop"
                yield KernelCase(
                    name=f"{kind}-{config.block}-{config.warps}-{floats}{'-default' if is_default else ''}",
                    kernel=_norm_kernel,
                    types={
                        "x_ptr": f"*{floats}",
                        "weight_ptr": "*fp32",
                        "out_ptr": f"*{floats}",
                        "width": "i32",
                        "stride": "i32",
                        "eps": "fp32",
                    },
                    constants={"BLOCK": config.block, "ONE_PASS": width <= config.block},
                    options={"num_warps": config.warps},
                    mma={80: None, 90: None},
                )
