"""How weights of `scaled_linear` are stored, and what its arguments must be.

By ``group`` and dtype:

| weight | ``weight`` | ``weight_scale`` float32 | ``group`` |
|---|---|---|---|
| one scale per row | int8 or float8 ``[N, K]`` | ``[N]`` | 0 |
| int8 in groups | int8 ``[N, K]`` | ``[groups, N]`` | elements of K |
| int4 | uint8 ``[N, K'/2]``, `pack_int4` | ``[groups, N]``, or ``[N]`` | elements of K, or 0 |
| float8 in blocks | float8 ``[N, K]`` | ``[⌈N/128⌉, ⌈K/128⌉]`` | 128 |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import InputError

__all__ = ["BLOCK", "FLOAT8", "GROUPS", "check", "half_of", "outputs_of", "pack_int4", "unpack_int4", "weight_of"]

BLOCK = 128
"""The side of the blocks of float8 weights that share a scale."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""8-bit floats that tensor cores multiply."""
GROUPS = (32, 64, 128, 256)
"""Sizes of groups that kernels know."""


def half_of(group: int) -> int:
    """How far apart in K the two codes of a byte are: half the elements that are unpacked together."""
    return min(group, 64) if group else 64


def pack_int4(codes: Tensor, group: int) -> Tensor:
    """Packs int4 codes so that two tiles of K lie in the low and the high nibbles of one tile of bytes.

    With ``h = half_of(group)``, byte ``j`` of block ``b`` holds element ``2hb + j`` below and ``2hb + h + j`` above, in
    two's complement. So neither a shuffle nor a subtraction is needed: ``byte << 4`` and ``byte & 0xF0`` are int8
    numbers, sixteen times the codes.

    Args:
        codes: int8 ``[N, K]`` in -8 .. 7.
        group: elements that share a scale; 0: the whole row.

    Returns:
        uint8 ``[N, K'/2]``, K' being K filled up with zeros to a multiple of ``2h``.
    """
    half = half_of(group)
    padded = F.pad(codes, (0, -codes.shape[1] % (2 * half))).view(torch.uint8).unflatten(1, (-1, 2, half))
    packed: Tensor = (padded[:, :, 0] & 15) | (padded[:, :, 1] << 4)
    return packed.flatten(1).contiguous()


def unpack_int4(packed: Tensor, group: int, width: int) -> Tensor:
    """The inverse of `pack_int4`: int8 ``[N, width]``."""
    blocks = packed.unflatten(1, (-1, half_of(group)))
    both = torch.stack((blocks << 4, blocks & 0xF0), dim=2).flatten(1)[:, :width]
    return both.view(torch.int8) >> 4


def weight_of(weight: Tensor, weight_scale: Tensor, group: int, width: int) -> Tensor:
    """The dequantized weight, float32 ``[N, width]``."""
    if weight.is_mkldnn:
        weight = weight.to_dense().t()
    codes = unpack_int4(weight, group, width) if weight.dtype == torch.uint8 else weight
    if group == 0:
        return codes.float() * weight_scale[:, None]
    if weight.dtype in FLOAT8:
        rows = weight_scale.repeat_interleave(BLOCK, 0)[: len(weight)]
        return codes.float() * numerics.expand_groups(rows, width, BLOCK)
    return codes.float() * numerics.expand_groups(weight_scale.t(), width, group)


def outputs_of(weight: Tensor) -> int:
    """N; a weight of oneDNN says its shape the other way round."""
    return weight.shape[1 if weight.is_mkldnn else 0]


def check(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> None:
    """Holds the arguments of the operator against each other.

    Raises:
        InputError: naming what does not fit.
    """
    width, is_float = codes.shape[-1] if codes.dim() else 0, codes.dtype in FLOAT8
    half = half_of(group)
    expected = half * -(-width // (2 * half)) if weight.dtype == torch.uint8 else width
    outputs, inputs = outputs_of(weight), weight.shape[0 if weight.is_mkldnn else 1]
    if codes.dim() == 0 or inputs != expected or width == 0:
        raise InputError(
            "activations and weight do not fit", got=f"{list(codes.shape)} and {list(weight.shape)}, {weight.dtype}"
        )
    if codes.dtype not in (torch.int8, torch.uint8, *FLOAT8) or is_float != (weight.dtype in FLOAT8):
        raise InputError(
            "codes of activations and weight do not go together",
            got=f"{codes.dtype} and {weight.dtype}",
            expected="int8 or uint8 with an integer weight, float8 with float8",
        )
    if is_float and codes.dtype != weight.dtype:
        raise InputError("8-bit floats of two kinds", got=f"{codes.dtype} and {weight.dtype}", expected="one of them")
    rows = codes.numel() // width
    for name, value in (("scale", scale), ("zero point", zero_point)):
        if value is not None and value.numel() not in (1, rows):
            raise InputError(f"one {name} per row, or one for all", got=list(value.shape), expected=[rows, 1])
    if codes.dtype == torch.uint8 and zero_point is None:
        raise InputError("uint8 codes need a zero point", got="None", expected="uint8")
    if zero_point is not None and (is_float or weight_sums is None or zero_point.dtype != codes.dtype):
        raise InputError(
            "a zero point goes with integer codes of its dtype, and with the sums of the weight's rows",
            got=f"{zero_point.dtype}, {codes.dtype}, sums {weight_sums is not None}",
        )
    if scale.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        raise InputError("scales are float32", got=f"{scale.dtype} and {weight_scale.dtype}", expected="float32")
    if tuple(weight_scale.shape) != _scale_shape(outputs, width, group, is_float):
        raise InputError(
            "the scale of the weight has another shape",
            got=list(weight_scale.shape),
            expected=list(_scale_shape(outputs, width, group, is_float)),
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise InputError("one bias per output channel", got=list(bias.shape), expected=[outputs])
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError("no dtype of results", got=dtype, expected="float32, float16 or bfloat16")
    if weight_sums is not None and (weight_sums.dtype != torch.float32 or tuple(weight_sums.shape) != (outputs,)):
        raise InputError(
            "one sum per output channel",
            got=f"{weight_sums.dtype} {list(weight_sums.shape)}",
            expected=f"float32 {[outputs]}",
        )
    tensors = (scale, zero_point, weight, weight_scale, weight_sums, bias)
    if any(tensor is not None and tensor.device != codes.device for tensor in tensors):
        raise InputError("tensors on different devices", got=f"{codes.device} and {weight.device}")


def _scale_shape(outputs: int, width: int, group: int, is_float: bool) -> tuple[int, ...]:
    if group == 0:
        return (outputs,)
    return (-(-outputs // BLOCK), -(-width // BLOCK)) if is_float else (-(-width // group), outputs)
