"""What comes behind the product of codes: parts of K added up, zero point, scales and bias."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch.machine_code import KernelCase

__all__ = ["epilogue", "finish", "finish_cases", "types_of"]

_COLUMNS = 256


@triton.jit
def epilogue(  # type: ignore[no-untyped-def]
    acc,
    m,
    n,
    M,
    N,
    scale_ptr,
    zero_ptr,
    w_scale_ptr,
    w_sums_ptr,
    bias_ptr,
    W_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """``(acc * w_scale[n] - zero[m] * w_sums[n]) * scale[m] + bias[n]``, float32.

    Args:
        acc: float32 of two axes, in either order.
        m, n: the rows and columns it holds, one of them ``[1, -1]``, the other ``[-1, 1]``.
        M, N: how many there are.
        scale_ptr, zero_ptr, w_scale_ptr, w_sums_ptr, bias_ptr: read where they are wanted.
        W_SCALE: the weight's scales are not in ``acc`` yet.
        TOKENS: one scale per row, else one.
        ZERO: 0: none; 1: one zero point; 2: one per row.
        BIAS: whether there is one.
    """
    y = acc
    if W_SCALE:
        y = y * tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    if ZERO == 1:
        y -= tl.load(zero_ptr).to(tl.float32) * tl.load(w_sums_ptr + n, mask=n < N, other=0.0)
    if ZERO == 2:
        zero = tl.load(zero_ptr + m, mask=m < M, other=0).to(tl.float32)
        y -= zero * tl.load(w_sums_ptr + n, mask=n < N, other=0.0)
    y = y * (tl.load(scale_ptr + m, mask=m < M, other=0.0) if TOKENS else tl.load(scale_ptr))
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    w_scale_ptr,
    w_sums_ptr,
    bias_ptr,
    M,
    N,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    W_SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Parts ``[SPLITS, M, N]``, int32 or float32, added in their order; then `epilogue`."""
    tiles_n = tl.cdiv(N, COLUMNS)
    m = (tl.program_id(0) // tiles_n * ROWS + tl.arange(0, ROWS))[:, None]
    n = (tl.program_id(0) % tiles_n * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (m < M) & (n < N)
    places = m.to(tl.int64) * N + n
    size = tl.cast(M, tl.int64) * N  # no ``M.to``: Triton makes a constant of a single row
    acc = tl.load(parts_ptr + places, mask=inside, other=0)
    for part in tl.static_range(1, SPLITS):
        acc += tl.load(parts_ptr + part * size + places, mask=inside, other=0)
    y = epilogue(
        acc.to(tl.float32), m, n, M, N, scale_ptr, zero_ptr, w_scale_ptr, w_sums_ptr, bias_ptr,
        W_SCALE, TOKENS, ZERO, BIAS,
    )  # fmt: skip
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


def finish(
    parts: Tensor,
    y: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_scale: Tensor | None,
    weight_sums: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Adds the parts of a product up, scales them and writes them to ``y``.

    Args:
        parts: int32 or float32 ``[splits, M, N]``.
        y: ``[M, N]``.
        scale: float32, of M elements or one.
        zero_point: integers, like ``scale``.
        weight_scale: float32 ``[N]``; None where parts are scaled by it already.
        weight_sums: float32 ``[N]``, with a zero point.
        bias: ``[N]``.
    """
    splits, rows, outputs = parts.shape
    tile = 1 if rows < 4 else 4
    _finish_kernel[(-(-outputs // _COLUMNS) * -(-rows // tile),)](
        parts,
        y,
        scale,
        scale if zero_point is None else zero_point,
        scale if weight_scale is None else weight_scale,
        scale if weight_sums is None else weight_sums,
        scale if bias is None else bias,
        rows,
        outputs,
        SPLITS=splits,
        ROWS=tile,
        COLUMNS=_COLUMNS,
        W_SCALE=weight_scale is not None,
        TOKENS=scale.numel() > 1,
        ZERO=0 if zero_point is None else 1 + (zero_point.numel() > 1),
        BIAS=bias is not None,
        num_warps=2 if tile == 1 else 4,
    )


def types_of(codes: str, weight: str, result: str, zero: str = "i8", bias: str = "bf16") -> dict[str, str]:
    """Types of the arguments that products and their end have in common."""
    return {
        "x_ptr": f"*{codes}",
        "w_ptr": f"*{weight}",
        "parts_ptr": f"*{codes}",
        "y_ptr": f"*{result}",
        "scale_ptr": "*fp32",
        "zero_ptr": f"*{zero}",
        "w_scale_ptr": "*fp32",
        "w_sums_ptr": "*fp32",
        "bias_ptr": f"*{bias}",
        "M": "i32",
        "N": "i32",
        "K": "i32",
    }


def finish_cases() -> Iterator[KernelCase]:
    """Every number of parts, for one row and for several."""
    for splits in (1, 2, 4, 8):
        for rows in (1, 4):
            for parts in ("i32", "fp32"):
                is_default = splits == 4 and (rows == 1) == (parts == "fp32")
                yield KernelCase(
                    name=f"{'default-' if is_default else ''}finish-{splits}-{rows}-{parts}",
                    kernel=_finish_kernel,
                    types=types_of(parts, parts, "bf16"),
                    constants={
                        "SPLITS": splits,
                        "ROWS": rows,
                        "COLUMNS": _COLUMNS,
                        "W_SCALE": True,
                        "TOKENS": True,
                        "ZERO": 1 if parts == "i32" else 0,
                        "BIAS": True,
                    },
                    options={"num_warps": 2 if rows == 1 else 4},
                    mma={80: None, 90: None},
                )
