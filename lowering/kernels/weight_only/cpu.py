"""PyTorch's low-bit matrix products on the CPU, and the layouts they read.

Both are fast for bfloat16 activations alone; in float32 and float16 they run scalar code, slower than dequantizing.

* ``int4pack``: ``aten._weight_int4pack_mm_for_cpu`` computes ``(code - 8) * scale + offset`` with one pair of bfloat16
  numbers per group. Codes of 2 and 3 bits fit in, less their zero points. At 4 bits a zero point ``z`` becomes the
  offset ``(8 - z) * scale``; rounding it to bfloat16 moves the weights of a group together, by at most 1/64 of a step.
* ``int8pack``: ``aten._weight_int8pack_mm``, symmetric, one scale per output channel.

A scale that was stored in another dtype is rounded to bfloat16 as well: by at most 1/512 of itself.
"""

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import InputError
from qcompiler.ir import Affine

__all__ = ["check", "launch", "obstacle", "pack"]

_GROUPS = (256, 128, 64, 32)  # that int4pack takes
_ROWS = 16  # output channels that int4pack wants a multiple of
_INT8_WIDTH = 16  # input channels that int8pack wants a multiple of; it reads beyond the end otherwise


def obstacle(bits: int, symmetric: bool, group: int, out: int, width: int, dtype: torch.dtype) -> str:
    """Why neither operator takes a weight ``[out, width]``; empty if one does."""
    if dtype != torch.bfloat16:
        return "PyTorch's low-bit operators on the CPU are fast with bfloat16 activations alone"
    if bits == 8:
        if not symmetric or group < width:
            return "PyTorch's 8-bit operator on the CPU takes symmetric weights with one scale per output channel"
        return f"{width} input channels, no multiple of {_INT8_WIDTH}" if width % _INT8_WIDTH else ""
    if out % _ROWS:
        return f"{out} output channels; PyTorch's 4-bit operator on the CPU takes multiples of {_ROWS}"
    if _group(group, width) is None:
        return f"groups of {group} in {width} input channels; PyTorch's 4-bit operator on the CPU takes multiples of 32"
    return ""


def _group(group: int, width: int) -> int | None:
    """The largest group of the operator that no border of a group lies in."""
    return next((g for g in _GROUPS if width % g == 0 and (group >= width or group % g == 0)), None)


def pack(weight: Affine) -> tuple[str, int, Tensor, Tensor]:
    """A weight that there is no `obstacle` for.

    Returns:
        Name of the layout, group, packed codes, and scales: bfloat16 ``[groups, out, 2]`` for ``int4pack``, ``[out]``
        for ``int8pack``.
    """
    spec = weight.spec
    out, width = weight.codes.shape
    if spec.bits == 8:
        return "int8pack", width, weight.codes.contiguous(), weight.scale[:, 0].expand(out).bfloat16().contiguous()
    old = spec.group_of(width)
    group = _group(old, width)
    assert group is not None
    codes = weight.codes.int()  # whole, since the packing operator takes int32
    scale = numerics.expand_groups(weight.scale.expand(out, -1), width, old)[:, ::group]
    offset = torch.zeros_like(scale)
    if weight.zero_point is None:
        codes = codes + 8
    else:
        zero = numerics.expand_groups(weight.zero_point.expand(out, -1), width, old)
        if spec.bits < 4:
            codes = codes + 8 - zero
        else:
            offset = (8 - zero[:, ::group].float()) * scale
    pairs = torch.stack([scale.T, offset.T], dim=-1).bfloat16().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 2)
    return "int4pack", group, packed, pairs


def check(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, layout: str) -> None:
    """Holds tensors against what the operators read.

    Raises:
        InputError: if they would be misread.
    """
    out, width = packed.shape[0], x.shape[1]
    if layout == "int4pack":
        wanted: tuple[tuple[int, ...], ...] = ((out, width // 2), (width // max(group, 1), out, 2))
        dtype = torch.uint8
        is_right = group in _GROUPS and width % group == 0 and out % _ROWS == 0
    elif layout == "int8pack":
        wanted = ((out, width), (out,))
        dtype = torch.int8
        is_right = width % _INT8_WIDTH == 0
    else:
        raise InputError("weight_only_linear: no such layout", got=layout, expected="tiles, int4pack or int8pack")
    is_right = is_right and (packed.dtype, scale.dtype, x.dtype) == (dtype, torch.bfloat16, torch.bfloat16)
    if not is_right or (packed.shape, scale.shape) != wanted or zero_point is not None:
        raise InputError(
            "weight_only_linear: tensors do not fit the layout",
            where=layout,
            got=f"x {x.dtype} {list(x.shape)}, weight {packed.dtype} {list(packed.shape)}, "
            f"scale {scale.dtype} {list(scale.shape)}, groups of {group}",
            expected=f"bfloat16 activations, {dtype} {list(wanted[0])}, bfloat16 {list(wanted[1])}, no zero points",
        )


def launch(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, group: int, layout: str) -> Tensor:
    """``x @ W.T + bias``, bfloat16 ``[rows, out]``."""
    if not x.shape[0]:
        return x.new_empty(0, packed.shape[0])
    if layout == "int8pack":
        result: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed, scale)
    else:
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale)
    return result if bias is None else result + bias
