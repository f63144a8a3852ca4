"""Launches the weight-only kernels, and lists what of them can be launched, to be compiled ahead of time."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.weight_only import triton_kernels as kernels
from qcompiler.lowering.kernels.weight_only.config import (
    SPLITS,
    Config,
    configs,
    default_config,
    fits,
    is_default,
    is_hopper,
    shapes_for,
)
from qcompiler.lowering.kernels.weight_only.layout import Layout

__all__ = ["Config", "ahead_of_time", "configs", "default_config", "dequantize", "launch"]

_DEQUANTIZE_BLOCK = 64  # output channels
_REDUCE_BLOCK = 1024  # elements
_ALL = 1 << 30  # a group that no weight is as wide as
_ALIGNED = (
    16  # input channels that rows of activations are a multiple of, or are filled up to: whole vectors are loaded
)
_REGISTERS = 255  # as many as there are: left alone, the assembler stops at fewer, and spills to keep to them
_PTX = isinstance(kernels.multiply, triton.JITFunction)  # False where kernels are interpreted


def launch(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    config: Config | None = None,
) -> Tensor:
    """``x @ W.T + bias``, ``[rows, out]`` in the dtype of ``x``; the other tensors as from `weight_only.pack_tiles`.

    Args:
        x: float16 or bfloat16 ``[rows, in]``.
        packed: uint8 ``[tiles, out, bytes]``.
        scale: float ``[groups, out]``.
        zero_point: uint8, the shape of ``scale``; None: ``2^(bits - 1)``.
        bias: ``[out]`` or None.
        bits: of one code.
        group: input channels that share a scale; at least all: per channel.
        config: how to launch; None: what a search kept for the shape, or the default.

    Raises:
        InputError: if a tensor of the weight does not begin at a multiple of 16 bytes.
    """
    (rows, width), out = x.shape, packed.shape[1]
    for name, tensor in (("packed weights", packed), ("scales", scale), ("zero points", zero_point)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise InputError(
                "weight_only_linear: a tensor is misaligned",
                where=name,
                got=f"address {tensor.data_ptr():#x}",
                expected="a multiple of 16",
                remedy="copy it (clone())",
            )
    if not rows:
        return x.new_empty(0, out)
    if config is None:
        config = _config(x, out, bits, group, zero_point is not None)
    if not config.rows:
        return F.linear(x, dequantize(packed, scale, zero_point, bits, group, width, x.dtype), bias)
    layout = Layout.of(bits, group, width)
    tiles, depth = layout.tiles(width), max(1, config.depth)
    piece = -(-tiles // (config.split * depth)) * depth
    split = -(-tiles // piece)
    missing = -width % _ALIGNED
    if missing:
        x = F.pad(x, (0, missing))
    elif x.data_ptr() % 16:  # a part of a larger tensor: read number by number, it would take another kernel
        x = x.clone()
    if bias is not None:
        bias = bias.contiguous()  # one number for all channels may be expanded
    y = x.new_empty(rows, out)
    target = y if split == 1 else torch.empty(split, rows, out, dtype=torch.float32, device=x.device)
    kernel = kernels.multiply_few if config.depth else kernels.multiply
    kernel[(-(-rows // config.rows), -(-out // config.out), split)](
        x,
        packed,
        scale,
        packed if zero_point is None else zero_point,
        x if bias is None else bias,
        target,
        rows,
        out,
        width + missing,
        piece,
        **_format(layout, group, width, zero_point is not None),
        HAS_BIAS=bias is not None,
        EVEN=width % (layout.tile * depth) == 0,
        **_block(config, split > 1),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=_REGISTERS,
    )
    if split > 1:
        kernels.reduce[(-(-rows * out // _REDUCE_BLOCK),)](
            target, x if bias is None else bias, y, rows * out, out, split, bias is not None, _REDUCE_BLOCK
        )
    return y


def dequantize(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The weight itself, ``[out, width]``: computed in float32, rounded to ``dtype``."""
    out = packed.shape[1]
    layout = Layout.of(bits, group, width)
    weight = torch.empty(out, width, dtype=dtype, device=packed.device)
    kernels.dequantize[(layout.tiles(width), -(-out // _DEQUANTIZE_BLOCK))](
        packed,
        scale,
        packed if zero_point is None else zero_point,
        weight,
        out,
        width,
        **_format(layout, group, width, zero_point is not None, everything=_ALL),
        BN=_DEQUANTIZE_BLOCK,
        PTX=_PTX,
    )
    return weight


def _config(x: Tensor, out: int, bits: int, group: int, has_zero: bool) -> Config:
    """What a search kept for these arguments, or the default."""
    rows, width = x.shape
    device = _limits(x.device)
    key = (bits, min(group, width), out, width, str(x.dtype), has_zero, tuning.row_bucket(rows))
    space = partial(configs, rows, out, width, bits, **device)
    return tuning.found(x.device, "weight_only_linear", key, Config, space) or default_config(
        rows, out, width, bits, **device
    )


@cache  # asked at every launch
def _limits(device: torch.device) -> dict[str, int]:
    """What configurations depend on; empty for a CPU, which stands for a usual GPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": 10 * properties.major + properties.minor,
        "processors": properties.multi_processor_count,
    }


def _format(layout: Layout, group: int, width: int, has_zero: bool, everything: int = 0) -> dict[str, Any]:
    """Constants of a weight's format; ``everything`` is what stands for one group that is all."""
    if group >= width or group % layout.tile == 0:
        run = layout.parts
    else:
        run = group // layout.part if layout.tile % group == 0 else 1
    return {
        "BITS": layout.bits,
        "PART": layout.part,
        "PARTS": layout.parts,
        "RUN": run,
        "GROUP": group if group < width else everything,
        "HAS_ZERO": has_zero,
    }


def _block(config: Config, is_partial: bool, ptx: bool = _PTX) -> dict[str, Any]:
    """Constants of a configuration."""
    own = {"DEPTH": config.depth} if config.depth else {"SWAP": config.swap, "PRESCALE": config.prescale}
    return {"PARTIAL": is_partial, "BM": config.rows, "BN": config.out, **own, "PTX": ptx}


# (bits, group or 0 for one per output channel, zero points, dtype)
_COMMON = (4, 128, False, "bf16")
_USUAL = (
    _COMMON,
    (4, 128, False, "fp16"),
    (4, 128, True, "bf16"),
    (8, 0, False, "bf16"),
    (3, 128, False, "bf16"),
    (2, 128, True, "fp16"),
)
_OTHERS = tuple(
    (bits, *form) for bits in (4, 8, 3, 2) for form in ((0, True, "bf16"), (32, True, "bf16"), (64, False, "fp16"))
)
_RARE = tuple(
    (bits, group, has_zero, dtype)
    for bits in (4, 8, 3, 2)
    for group in (0, 32, 64, 96, 128, 256)
    for has_zero in (False, True)
    for dtype in ("fp16", "bf16")
)
_BUDGET = {2: 3.0, 3: 3.6, 4: 3.6, 8: 4.8}
"""Instructions per weight for up to 16 rows and groups of 64 or more.

At the speed of an H200's memory its arithmetic leaves about 3.6 at 4 bits and 7.2 at 8; less than what is reached at 2
and 3 bits. Zero points and small groups cost more, and more rows too, where tensor cores are the limit.
"""


def ahead_of_time() -> Iterator[KernelCase]:
    """Everything that `launch` can choose, for compute capabilities 8.0 and 9.0.

    Names begin with ``usual`` for common formats under the configurations that run without a search, ``other`` for
    what a search may find and formats of every kind, ``rare`` for the remaining combinations.
    """
    forms = dict.fromkeys((*_USUAL, *_OTHERS, *_RARE))
    for capability in (80, 90):
        defaults = [config for config in shapes_for(capability) if is_default(config)]
        few, many = Config(8, 32, depth=4), max(defaults, key=lambda config: config.rows)
        for config in shapes_for(capability):
            for form in forms:
                if not fits(config, Layout.of(form[0], form[1] or _ALL, _ALL), capability):
                    continue
                is_usual = form in _USUAL if config == few else form == _COMMON and config in defaults
                is_rare = form not in _USUAL and (form not in _OTHERS or config not in defaults)
                yield _multiply_case("usual" if is_usual else "rare" if is_rare else "other", form, config, capability)
        for config in defaults:
            kind = "usual" if config in (few, many) else "other"
            yield _multiply_case(f"{kind} whole", _COMMON, config, capability, is_whole=True)
    for form in forms:
        yield _dequantize_case("usual" if form in (_COMMON, _USUAL[4]) else "other", form)
    for split in SPLITS[1:]:
        yield KernelCase(
            f"{'usual' if split == 8 else 'other'} reduce {split}",
            kernels.reduce,
            {"partial": "*fp32", "bias": "*bf16", "y": "*bf16", "MN": "i32", "N": "i32"},
            {"SPLIT": split, "HAS_BIAS": True, "BLOCK": _REDUCE_BLOCK},
            {"num_warps": 4},
            {80: None, 90: None},
        )


def _dequantize_case(kind: str, form: tuple[int, int, bool, str]) -> KernelCase:
    bits, group, has_zero, dtype = form
    layout = Layout.of(bits, group or _ALL, _ALL)
    return KernelCase(
        f"{kind} dequantize {_format_name(*form)}",
        kernels.dequantize,
        {"packed": "*u8", "scale": f"*{dtype}", "zero": "*u8", "w": f"*{dtype}", "N": "i32", "K": "i32"},
        {
            **_format(layout, group or _ALL, _ALL, has_zero, everything=_ALL),
            "BN": _DEQUANTIZE_BLOCK,
            "PTX": True,
        },
        {"num_warps": 4},
        {80: None, 90: None},
    )


def _format_name(bits: int, group: int, has_zero: bool, dtype: str) -> str:
    return f"w{bits} {f'g{group}' if group else 'channel'} {'asym' if has_zero else 'sym'} {dtype}"


def _multiply_case(
    kind: str, form: tuple[int, int, bool, str], config: Config, capability: int, is_whole: bool = False
) -> KernelCase:
    """One variant; ``is_whole``: without a split, with bias and a width that ends inside a tile."""
    bits, group, has_zero, dtype = form
    layout = Layout.of(bits, group or _ALL, _ALL)
    uses_wgmma = is_hopper(capability) and config.rows >= 64
    budget = _BUDGET[bits] + 0.7 * has_zero + 1.4 * (0 < group < 128) + (6.0 if bits == 8 else 2.5) * (config.rows > 16)
    return KernelCase(
        f"{kind} multiply {_format_name(*form)} {_config_name(config)} sm_{capability}",
        kernels.multiply_few if config.depth else kernels.multiply,
        {
            "x": f"*{dtype}",
            "packed": "*u8",
            "scale": f"*{dtype}",
            "zero": "*u8",
            "bias": f"*{dtype}",
            "y": f"*{dtype}" if is_whole else "*fp32",
            **dict.fromkeys(("M", "N", "K", "tiles"), "i32"),
        },
        {
            **_format(layout, group or _ALL, _ALL, has_zero),
            "HAS_BIAS": is_whole,
            "EVEN": not is_whole,
            **_block(config, not is_whole, ptx=True),
        },
        {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": _REGISTERS},
        {capability: "HGMMA" if uses_wgmma else "HMMA"},
        weights_per_iteration=config.out * layout.tile * max(1, config.depth),
        budget=0 if is_whole else budget,
        unaligned=frozenset({"M", "tiles"}),
    )


def _config_name(config: Config) -> str:
    marks = [name for name in ("depth", "swap", "prescale") if getattr(config, name)]
    return f"{config.rows}x{config.out} {config.warps}w {config.stages}s {' '.join(marks)}".strip()
