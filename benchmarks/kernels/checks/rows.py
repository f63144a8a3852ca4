"""Operators on rows against the graph's own, in float32: quantizers of activations, norms, gates, rotations."""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.comparing import compare, compare_codes
from benchmarks.kernels.records import Record
from benchmarks.kernels.sections import Bench, Case

__all__ = ["cases"]

_WIDTHS = (8, 96, 100, 513, 1024, 1536, 4096, 5000, 11008, 14336)
_SMALL_WIDTHS = (8, 96, 100, 513)
_ROWS = (1, 2, 3, 5, 16, 33, 130, 0)
_EPS = 1e-5
_FP8 = torch.float8_e4m3fn


def cases(bench: Bench) -> Iterator[Case]:
    """One per operator and dtype of the input."""
    for dtype in bench.dtypes:
        for operator, check in _CHECKS.items():
            name = f"{operator} {str(dtype).removeprefix('torch.')}"
            yield Case(name, _case(name, check, dtype))


def _case(
    name: str, check: Callable[..., Iterator[tuple[Any, ...]]], dtype: torch.dtype
) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:

        draw = random.Random(zlib.crc32(name.encode()))
        generator = torch.Generator(bench.device).manual_seed(draw.randrange(1 << 30))
        widths = _SMALL_WIDTHS if bench.is_small else _WIDTHS
        for width in draw.sample(widths, 3):
            for rows in draw.sample(_ROWS, 3 if bench.is_small else 4):
                x = torch.randn(rows, width, generator=generator, device=bench.device)
                x = (x * torch.rand(rows, 1, generator=generator, device=bench.device) * 8).to(dtype)
                if rows > 1:
                    x[rows // 2] = 0  # a row without a range
                for label, call, codes, others in check(x, generator):
                    shape = f"{name}{label}: {rows}x{width}"
                    if codes.dtype == torch.float32:
                        yield compare(bench.section.name, shape, call, codes)
                    else:
                        yield compare_codes(bench.section.name, shape, call, codes, others)

    return run


def _quantize_rows(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.quantize_rows import quantize_rows_reference as reference

    for dtype, clip in ((torch.int8, 1.0), (torch.int8, 0.9), (_FP8, 1.0)):
        codes, scale = reference(x, dtype, clip)
        label = f" {_short(dtype)}{'' if clip == 1 else ' clipped'}"
        yield label, lambda dtype=dtype, clip=clip: _ours().quantize_rows(x, dtype, clip), codes, (scale,)


def _quantize_rows_affine(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.quantize_rows import quantize_rows_affine_reference as reference

    codes, scale, zero = reference(x)
    yield "", lambda: _ours().quantize_rows_affine(x), codes, (scale, zero)


def _quantize_static(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.quantize_rows import quantize_static_reference as reference

    scale = torch.tensor(0.031, device=x.device)
    zero = torch.tensor(101, dtype=torch.uint8, device=x.device)
    for dtype, zero_point in ((torch.int8, None), (torch.uint8, zero), (_FP8, None)):
        codes = reference(x, dtype=dtype, scale=scale, zero_point=zero_point)

        def run(dtype: torch.dtype = dtype, zero_point: Tensor | None = zero_point) -> tuple[Tensor, ...]:
            return (_ours().quantize_static(x, scale, dtype, zero_point),)

        yield f" {_short(dtype)}", run, codes, ()


def _rms_norm_quantize_rows(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.quantize_rows import rms_norm_quantize_rows_reference as reference

    weight = _norm_weight(x, generator)
    for dtype in (torch.int8, _FP8):
        codes, scale = reference(x, weight, _EPS, dtype)
        call = lambda dtype=dtype: _ours().rms_norm_quantize_rows(x, weight, _EPS, dtype)  # noqa: E731
        yield f" {_short(dtype)}", call, codes, (scale,)


def _rms_norm_quantize_static(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.quantize_rows import rms_norm_quantize_static_reference as reference

    weight, scale = _norm_weight(x, generator), torch.tensor(0.02, device=x.device)
    zero = torch.tensor(131, dtype=torch.uint8, device=x.device)
    for dtype, zero_point in ((torch.int8, None), (torch.uint8, zero), (_FP8, None)):
        codes = reference(x, weight, _EPS, scale, dtype, zero_point)

        def run(dtype: torch.dtype = dtype, zero_point: Tensor | None = zero_point) -> tuple[Tensor, ...]:
            return (_ours().rms_norm_quantize_static(x, weight, _EPS, scale, dtype, zero_point),)

        yield f" {_short(dtype)}", run, codes, ()


def _rms_norm(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.rms_norm import rms_norm_reference as reference

    weight = _norm_weight(x, generator).float()
    yield "", lambda: _ours().rms_norm(x, weight, _EPS), reference(x.float(), weight, _EPS), ()


def _gated(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.gated import ACTIVATIONS
    from qcompiler.lowering.kernels.rows.gated import gated_reference as reference

    gate, up = torch.cat((x, x.flip(1)), 1).chunk(2, 1)  # halves of one matrix
    for name in ACTIVATIONS:
        call = lambda name=name: _ours().gated(gate, up, name)  # noqa: E731
        yield f" {name}", call, reference(gate.float(), up.float(), name), ()


def _rotary(x: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    from qcompiler.lowering.kernels.rows.rotary import rotary_reference as reference

    heads = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2 if x.shape[1] % 8 else 8))[None].transpose(1, 2)
    angle = torch.rand(1, 1, *heads.shape[2:], generator=generator, device=x.device)
    cos, sin = angle.cos(), angle.sin()
    for interleaved in (False, True):
        call = lambda interleaved=interleaved: _ours().rotary(heads, cos, sin, interleaved)  # noqa: E731
        label = " neighbours" if interleaved else " halves"
        yield label, call, reference(heads.float(), cos, sin, interleaved), ()


_CHECKS: dict[str, Callable[..., Iterator[tuple[Any, ...]]]] = {
    "quantize_rows": _quantize_rows,
    "rms_norm_quantize_rows": _rms_norm_quantize_rows,
    "quantize_static": _quantize_static,
    "rms_norm_quantize_static": _rms_norm_quantize_static,
    "quantize_rows_affine": _quantize_rows_affine,
    "rms_norm": _rms_norm,
    "gated": _gated,
    "rotary": _rotary,
}


def _ours() -> Any:
    return torch.ops.qcompiler_kernels


def _norm_weight(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape[1], generator=generator, device=x.device).add_(0.5).to(x.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
