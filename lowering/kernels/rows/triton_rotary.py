"""Triton kernel of rotary embeddings: programs of some vectors each, those of queries first, then those of keys.

Vectors are read where they lie: heads behind tokens, as projections leave them, or the other way round, and parts of a
vector that is only turned in part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.rows.rotary import MOST_AXES

__all__ = ["Config", "ahead_of_time", "configs", "default_config", "launch"]

_MANY = 4096  # vectors that keep a device busy in programs of several
_PAIRS = 512  # of one such program


@dataclass(frozen=True)
class Config:
    """The share of one program.

    Attributes:
        rows: vectors, a power of two.
        warps: of 32 threads.
    """

    rows: int
    warps: int


def default_config(rows: int, pairs: int) -> Config:
    """One vector for a warp where there are few; as many as fill four warps where there are many.

    Args:
        rows: vectors in all.
        pairs: of elements that are turned together, rounded up to a power of two.
    """
    return Config(1, 1) if rows < _MANY else Config(max(1, _PAIRS // pairs), 4)


def configs(pairs: int) -> tuple[Config, ...]:
    """All that `default_config` can give."""
    return default_config(1, pairs), default_config(_MANY, pairs)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    first,
    rows,
    middle,
    inner,
    half,
    x_outer,
    x_middle,
    x_inner,
    t_outer,
    t_middle,
    t_inner,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Vectors ``first ..``, numbered along outer, middle and inner axis."""
    row = first + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)[None, :]
    mask = (row < rows)[:, None] & (pair < half)
    a, b, c = (row // (middle * inner)).to(tl.int64), ((row // inner) % middle).to(tl.int64), (row % inner).to(tl.int64)
    x_ptr += (a * x_outer + b * x_middle + c * x_inner)[:, None]
    table = (a * t_outer + b * t_middle + c * t_inner)[:, None]
    out_ptr += (row.to(tl.int64) * (2 * half))[:, None]
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + half
    x1 = tl.load(x_ptr + one, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + two, mask=mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + table + one, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + table + two, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + table + one, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + table + two, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + one, (x1 * cos1 - x2 * sin1).to(dtype), mask=mask)
    tl.store(out_ptr + two, (x2 * cos2 + x1 * sin2).to(dtype), mask=mask)


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    q_programs,
    half,
    q_rows,
    q_middle,
    q_inner,
    q_x_outer,
    q_x_middle,
    q_x_inner,
    q_t_outer,
    q_t_middle,
    q_t_inner,
    k_rows,
    k_middle,
    k_inner,
    k_x_outer,
    k_x_middle,
    k_x_inner,
    k_t_outer,
    k_t_middle,
    k_t_inner,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BOTH: tl.constexpr,
):
    """``ROWS`` vectors of the queries, or with ``BOTH`` of the keys."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn(
            *(q_ptr, q_out_ptr, cos_ptr, sin_ptr, program * ROWS, q_rows, q_middle, q_inner, half),
            *(q_x_outer, q_x_middle, q_x_inner, q_t_outer, q_t_middle, q_t_inner),
            *(ROWS, PAIRS, INTERLEAVED),
        )
    elif BOTH:
        _turn(
            *(k_ptr, k_out_ptr, cos_ptr, sin_ptr, (program - q_programs) * ROWS, k_rows, k_middle, k_inner, half),
            *(k_x_outer, k_x_middle, k_x_inner, k_t_outer, k_t_middle, k_t_inner),
            *(ROWS, PAIRS, INTERLEAVED),
        )


def launch(
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    dtypes: Sequence[torch.dtype | None],
    *,
    config: Config | None = None,
) -> list[Tensor]:
    """Either operator, of arguments that have been checked.

    Args:
        tensors: one or two of the same dtype and width.
        cos, sin: float ``[..., D]``.
        interleaved: neighbours are turned together, not halves.
        dtypes: of the results; None: of the tensors.
        config: None: the default.
    """
    results = [
        torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
        for x, dtype in zip(tensors, dtypes, strict=True)
    ]
    given = [(x, out) for x, out in zip(tensors, results, strict=True) if x.numel()]
    if not given:
        return results
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    half = tensors[0].shape[-1] // 2
    pairs = 1 << max(0, half - 1).bit_length()
    rows = [x.numel() // (2 * half) for x, _ in given]
    config = config or default_config(sum(rows), pairs)
    programs = [triton.cdiv(count, config.rows) for count in rows]
    sources = [x if x.stride(-1) == 1 else x.contiguous() for x, _ in given]
    sizes = [_sizes(x, cos) for x in sources]
    _rotary_kernel[(sum(programs),)](
        sources[0],
        sources[-1],
        given[0][1],
        given[-1][1],
        cos,
        sin,
        programs[0],
        half,
        *sizes[0],
        *sizes[-1],
        ROWS=config.rows,
        PAIRS=pairs,
        INTERLEAVED=interleaved,
        BOTH=len(given) == 2,
        num_warps=config.warps,
    )
    return results


def _sizes(x: Tensor, table: Tensor) -> tuple[int, ...]:
    """The number of vectors, middle and inner axis, and what is stepped along the axes in ``x`` and in the table."""
    steps = table.expand(x.shape).stride()[:-1]
    lead = MOST_AXES - x.dim()
    shape = (*[1] * lead, *x.shape[:-1])
    zeros = [0] * lead
    return x.numel() // x.shape[-1], shape[1], shape[2], *zeros, *x.stride()[:-1], *zeros, *steps


def ahead_of_time() -> Iterator[KernelCase]:
    """Every configuration for heads of 32 to 256 channels, alone and together, narrow and wide results."""
    for pairs in (16, 32, 64, 128):
        for config in configs(pairs):
            for interleaved in (False, True):
                yield _case(pairs, config, interleaved, both=True, floats="bf16", results="bf16")
                yield _case(pairs, config, interleaved, both=False, floats="fp16", results="fp32")


def _case(pairs: int, config: Config, interleaved: bool, *, both: bool, floats: str, results: str) -> KernelCase:
    names = _rotary_kernel.arg_names
    tags = [
        *("pair" if both else "alone", "neighbours" if interleaved else "halves"),
        *(str(pairs), str(config.rows), str(config.warps)),
        *(["default"] if pairs == 64 and both else []),
    ]
    return KernelCase(
        name="-".join(tags),
        kernel=_rotary_kernel,
        types={
            **dict.fromkeys(("q_ptr", "k_ptr"), f"*{floats}"),
            **dict.fromkeys(("q_out_ptr", "k_out_ptr"), f"*{results}"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
            **{name: "i32" for name in names if not name.endswith("_ptr") and not name.isupper()},
        },
        constants={"ROWS": config.rows, "PAIRS": pairs, "INTERLEAVED": interleaved, "BOTH": both},
        options={"num_warps": config.warps},
        mma={80: None, 90: None},
    )
