"""Activations to 8-bit codes: per token or with a scale chosen ahead, alone or fused behind a norm.

| operator | result |
|---|---|
| ``quantize_rows(x, dtype, clip, bits)`` | codes ``[..., K]`` and a scale per row, float32 ``[..., 1]`` |
| ``quantize_rows_affine(x, clip, bits)`` | the same in uint8, and a zero point per row, uint8 ``[..., 1]`` |
| ``quantize_static(x, scale, dtype, zero_point, bits)`` | codes; scale float32, zero point of the codes' dtype, 0-D |
| ``rms_norm_quantize_rows(x, weight, eps, dtype, clip, bits)`` | `quantize_rows` of ``rms_norm(x)`` |
| ``rms_norm_quantize_static(x, weight, eps, scale, dtype, zero_point, bits)`` | `quantize_static` of ``rms_norm(x)`` |

Codes and scales are those of ``choose_qparams`` and ``quantize`` on ``float32(x)``, to the bit; behind a norm, whose
sum may be taken in another order, a code may be the neighbour of the reference's. A norm is rounded to the dtype of
``x`` before it is quantized, as it is where it is an operator of its own. Codes are int8, uint8 (with a zero point),
float8_e4m3fn or float8_e5m2; integers of fewer bits are held in a byte each. Zero rows give zero codes. A row that
holds infinity or NaN gets a scale that is not finite, so that what is computed from it is not either.
"""

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import library

__all__ = [
    "FLOAT_MAX",
    "SMALLEST_SCALE",
    "check",
    "code_range",
    "quantize_rows_affine_reference",
    "quantize_rows_reference",
    "quantize_static_reference",
    "rms_norm_quantize_rows_reference",
    "rms_norm_quantize_static_reference",
]

_canonical = torch.ops.qcompiler
FLOAT_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest finite number of each 8-bit float."""
SMALLEST_SCALE = 2.0**-23
"""Of dynamic ranges, as ``choose_qparams`` has it."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CODES = (torch.int8, torch.uint8, *FLOAT_MAX)


def code_range(dtype: torch.dtype, bits: int) -> tuple[float, float]:
    """The smallest and the largest code, inclusive."""
    if dtype in FLOAT_MAX:
        return -FLOAT_MAX[dtype], FLOAT_MAX[dtype]
    if dtype == torch.int8:
        return float(-(1 << (bits - 1))), float((1 << (bits - 1)) - 1)
    return 0.0, float((1 << bits) - 1)


def quantize_rows_reference(x: Tensor, dtype: torch.dtype, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Codes of ``dtype`` and a float32 scale per row of the last axis; symmetric."""
    wide = x.float()
    scale, _ = _canonical.choose_qparams(wide, dtype, -1, bits, clip)
    codes: Tensor = _canonical.quantize(wide, scale, None, -1, x.shape[-1], dtype, bits)
    return codes, scale


def quantize_rows_affine_reference(x: Tensor, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, a float32 scale and a uint8 zero point per row of the last axis."""
    wide = x.float()
    scale, zero = _canonical.choose_qparams(wide, torch.uint8, -1, bits, clip)
    return _canonical.quantize(wide, scale, zero, -1, x.shape[-1], torch.uint8, bits), scale, zero


def quantize_static_reference(
    x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None, bits: int = 8
) -> Tensor:
    """Codes of ``dtype`` for a scale, and a zero point, of all elements."""
    codes: Tensor = _canonical.quantize(x.float(), scale.float(), zero_point, 0, 0, dtype, bits)
    return codes


def rms_norm_quantize_rows_reference(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, clip: float = 1.0, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """`quantize_rows_reference` of ``rms_norm(x, weight, eps)``."""
    return quantize_rows_reference(_canonical.rms_norm(x, weight, eps), dtype, clip, bits)


def rms_norm_quantize_static_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """`quantize_static_reference` of ``rms_norm(x, weight, eps)``."""
    return quantize_static_reference(_canonical.rms_norm(x, weight, eps), scale, dtype, zero_point, bits)


def check(x: Tensor, dtype: torch.dtype, bits: int, *, has_zero_point: bool, weight: Tensor | None = None) -> None:
    """Holds the arguments of any of the operators against what they take.

    Raises:
        InputError: naming what does not fit.
    """
    if x.dtype not in _FLOATS or x.dim() == 0:
        raise InputError(
            "only floating point rows can be quantized",
            got=f"{x.dtype} {list(x.shape)}",
            expected="float32, float16 or bfloat16 of at least one axis",
        )
    if dtype not in _CODES:
        raise InputError("no dtype of codes", got=dtype, expected=", ".join(map(str, _CODES)))
    if has_zero_point and dtype in FLOAT_MAX:
        raise InputError("float codes have no zero point", got=dtype, expected="int8 or uint8")
    if not (2 <= bits <= 8) or (bits != 8 and dtype in FLOAT_MAX):
        raise InputError("no number of bits for these codes", got=f"{bits}, {dtype}", expected="2 to 8; floats: 8")
    if x.shape[-1] == 0:
        raise InputError("rows of no elements have no range", got=list(x.shape), expected="at least one element")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise InputError(
            "the weight of a norm has one element per channel", got=list(weight.shape), expected=[x.shape[-1]]
        )
    if weight is not None and weight.device != x.device:
        raise InputError("norm and values lie on different devices", got=weight.device, expected=x.device)


def _check_rows(dtype: torch.dtype, clip: float) -> None:
    if dtype == torch.uint8:
        raise InputError(
            "uint8 codes need a zero point",
            got="quantize_rows",
            expected="int8 or float8",
            remedy="quantize_rows_affine",
        )
    if not 0 < clip <= 1:
        raise InputError("a range is clipped to a share of it", got=clip, expected="in (0, 1]")


def _check_static(scale: Tensor, zero_point: Tensor | None, x: Tensor) -> None:
    if scale.numel() != 1 or scale.dtype != torch.float32 or (zero_point is not None and zero_point.numel() != 1):
        raise InputError(
            "a range chosen ahead is one scale, and one zero point",
            got=f"scale {scale.dtype} {list(scale.shape)}",
            expected="float32 of one element",
        )
    if scale.device != x.device or (zero_point is not None and zero_point.device != x.device):
        raise InputError("scale and values lie on different devices", got=scale.device, expected=x.device)


def _codes_on_cpu(wide: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, bits: int) -> Tensor:
    """`quantize` of a float32 tensor that may be overwritten."""
    low, high = code_range(dtype, bits)
    wide.div_(scale)
    if dtype not in FLOAT_MAX:
        wide.round_()
    if zero_point is not None:
        wide.add_(zero_point)
    return wide.clamp_(low, high).to(dtype)


def _own(x: Tensor) -> Tensor:
    """float32, and no memory shared with ``x``."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _rows_cpu(x: Tensor, dtype: torch.dtype, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor]:
    check(x, dtype, bits, has_zero_point=False)
    _check_rows(dtype, clip)
    wide = _own(x)
    scale, _ = _canonical.choose_qparams(wide, dtype, -1, bits, clip)
    return _codes_on_cpu(wide, scale, None, dtype, bits), scale


def _rows_affine_cpu(x: Tensor, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    check(x, torch.uint8, bits, has_zero_point=True)
    _check_rows(torch.int8, clip)
    wide = _own(x)
    scale, zero = _canonical.choose_qparams(wide, torch.uint8, -1, bits, clip)
    return _codes_on_cpu(wide, scale, zero, torch.uint8, bits), scale, zero


def _static_cpu(
    x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None, bits: int = 8
) -> Tensor:
    check(x, dtype, bits, has_zero_point=zero_point is not None)
    _check_static(scale, zero_point, x)
    zero = None if zero_point is None else zero_point.reshape(())
    return _codes_on_cpu(_own(x), scale.reshape(()), zero, dtype, bits)


def _norm_rows_cpu(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, clip: float = 1.0, bits: int = 8
) -> tuple[Tensor, Tensor]:
    check(x, dtype, bits, has_zero_point=False, weight=weight)
    return _rows_cpu(_canonical.rms_norm(x, weight, eps), dtype, clip, bits)


def _norm_static_cpu(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    check(x, dtype, bits, has_zero_point=zero_point is not None, weight=weight)
    return _static_cpu(_canonical.rms_norm(x, weight, eps), scale, dtype, zero_point, bits)


def _current(x: Tensor) -> torch.cuda.device:
    """Makes the device of ``x`` the current one, which Triton launches on."""
    return torch.cuda.device(x.device)


def _rows_cuda(x: Tensor, dtype: torch.dtype, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor]:
    from qcompiler.lowering.kernels.rows.triton_quantize_rows import launch

    check(x, dtype, bits, has_zero_point=False)
    _check_rows(dtype, clip)
    with _current(x):
        codes, scale, _ = launch(x, dtype, clip=clip, bits=bits)
    return codes, scale


def _rows_affine_cuda(x: Tensor, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    from qcompiler.lowering.kernels.rows.triton_quantize_rows import launch

    check(x, torch.uint8, bits, has_zero_point=True)
    _check_rows(torch.int8, clip)
    with _current(x):
        codes, scale, zero = launch(x, torch.uint8, clip=clip, bits=bits)
    assert zero is not None
    return codes, scale, zero


def _static_cuda(
    x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None, bits: int = 8
) -> Tensor:
    from qcompiler.lowering.kernels.rows.triton_quantize_rows import launch_static

    check(x, dtype, bits, has_zero_point=zero_point is not None)
    _check_static(scale, zero_point, x)
    with _current(x):
        return launch_static(x, scale, zero_point, dtype, bits=bits)


def _norm_rows_cuda(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, clip: float = 1.0, bits: int = 8
) -> tuple[Tensor, Tensor]:
    from qcompiler.lowering.kernels.rows.triton_quantize_rows import launch

    check(x, dtype, bits, has_zero_point=False, weight=weight)
    _check_rows(dtype, clip)
    with _current(x):
        codes, scale, _ = launch(x, dtype, clip=clip, bits=bits, norm=(weight, eps))
    return codes, scale


def _norm_static_cuda(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    from qcompiler.lowering.kernels.rows.triton_quantize_rows import launch_static

    check(x, dtype, bits, has_zero_point=zero_point is not None, weight=weight)
    _check_static(scale, zero_point, x)
    with _current(x):
        return launch_static(x, scale, zero_point, dtype, bits=bits, norm=(weight, eps))


def _scale_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=dtype)


def _rows_fake(x: Tensor, dtype: torch.dtype, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), _scale_like(x, torch.float32)


def _rows_affine_fake(x: Tensor, clip: float = 1.0, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), _scale_like(x, torch.float32), _scale_like(x, torch.uint8)


def _static_fake(
    x: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None, bits: int = 8
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_rows_fake(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, clip: float = 1.0, bits: int = 8
) -> tuple[Tensor, Tensor]:
    return _rows_fake(x, dtype)


def _norm_static_fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    scale: Tensor,
    dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


library.define(
    "quantize_rows(Tensor x, ScalarType dtype, float clip=1.0, int bits=8) -> (Tensor, Tensor)",
    fake=_rows_fake,
    cpu=_rows_cpu,
    cuda=_rows_cuda,
)
library.define(
    "quantize_rows_affine(Tensor x, float clip=1.0, int bits=8) -> (Tensor, Tensor, Tensor)",
    fake=_rows_affine_fake,
    cpu=_rows_affine_cpu,
    cuda=_rows_affine_cuda,
)
library.define(
    "quantize_static(Tensor x, Tensor scale, ScalarType dtype, Tensor? zero_point=None, int bits=8) -> Tensor",
    fake=_static_fake,
    cpu=_static_cpu,
    cuda=_static_cuda,
)
library.define(
    "rms_norm_quantize_rows(Tensor x, Tensor weight, float eps, ScalarType dtype, float clip=1.0, int bits=8) "
    "-> (Tensor, Tensor)",
    fake=_norm_rows_fake,
    cpu=_norm_rows_cpu,
    cuda=_norm_rows_cuda,
)
library.define(
    "rms_norm_quantize_static(Tensor x, Tensor weight, float eps, Tensor scale, ScalarType dtype, "
    "Tensor? zero_point=None, int bits=8) -> Tensor",
    fake=_norm_static_fake,
    cpu=_norm_static_cpu,
    cuda=_norm_static_cuda,
)
