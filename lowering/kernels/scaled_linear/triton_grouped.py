"""The kernel of `scaled_linear` for integers in groups, and for 4-bit weights: W4A8.

A group's products are summed as integers, and the sum is scaled. 4-bit codes are unpacked in registers: ``byte << 4``
and ``byte & 0xF0`` are int8 numbers, sixteen times the codes of two tiles of K (`scaled_linear_layout.pack_int4`),
three instructions for eight codes; the sixteenth is in the scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.scaled_linear.layout import half_of
from qcompiler.lowering.kernels.scaled_linear.triton_finish import epilogue, finish, types_of

__all__ = ["GroupedConfig", "case_name", "configs", "default_config", "grouped_cases", "launch", "require_packed"]

_UNPACK = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }")


@dataclass(frozen=True)
class GroupedConfig:
    """How a product is split.

    Attributes:
        rows, columns: of a tile, in rows of activations and output channels; its depth follows from the group.
        splits: parts of K computed apart.
        warps: of 32 threads, per tile.
        stages: tiles under way at once.
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


@cache  # asked at every launch
def default_config(rows: int, outputs: int, width: int, group: int) -> GroupedConfig:
    """What is launched where nothing was tuned."""
    tile = min(16 if width % 16 else 64, max(16, 1 << (rows - 1).bit_length()))  # bytes read singly take registers
    tiles, splits = -(-outputs // 64) * -(-rows // tile), 1
    while tiles * splits < 100 and splits < 8 and width >= splits * 1024:
        splits *= 2
    return GroupedConfig(tile, 64, splits, 4, 4)


def configs(rows: int, outputs: int, width: int, group: int) -> tuple[GroupedConfig, ...]:
    """What a search tries, the default first."""
    first = default_config(rows, outputs, width, group)
    if width % 16:
        return (first,)
    found = [
        GroupedConfig(first.rows, columns, splits, 4, stages)
        for columns, stages in ((64, 3), (64, 5), (128, 4))
        for splits in (1, 2, 4, 8)
        if (splits == 1 or width >= splits * 256) and (columns == 64 or first.rows <= 16)
    ]
    return tuple(dict.fromkeys((first, *found)))


@triton.jit
def _unpack(packed, INLINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sixteen times the low and the high codes, int8."""
    if INLINE:
        low, high = tl.inline_asm_elementwise(
            _UNPACK, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    y_ptr,
    scale_ptr,
    zero_ptr,
    w_scale_ptr,
    w_sums_ptr,
    bias_ptr,
    M,
    N,
    K,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PACKED: tl.constexpr,
    INLINE: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile of one part of K: ``HALF`` or, ``PACKED``, twice as many elements at once. ``GROUP`` 0: one per row."""
    depth: tl.constexpr = 2 * HALF if PACKED else HALF
    shared: tl.constexpr = 0.0625 if PACKED else 1.0
    tiles_n = tl.cdiv(N, COLUMNS)
    m = (tl.program_id(0) // tiles_n * ROWS + tl.arange(0, ROWS))[None, :]
    n = (tl.program_id(0) % tiles_n * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    inner = tl.arange(0, HALF)
    steps = tl.cdiv(K, depth)
    w_row: tl.constexpr = HALF if PACKED else depth
    x_tile = x_ptr + tl.where(m < M, m, 0).to(tl.int64) * K + inner[:, None]
    stride = steps * HALF if PACKED else K
    w_tile = w_ptr + tl.where(n < N, n, 0).to(tl.int64) * stride + inner[None, :]
    whole = tl.zeros([COLUMNS, ROWS], tl.int32)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    part = tl.cdiv(steps, splits)
    begin = tl.program_id(1) * part
    for step in range(begin, tl.minimum(begin + part, steps)):
        start = step * depth
        if EVEN or PACKED:
            w = tl.load(w_tile + step * w_row, eviction_policy="evict_first")
        else:
            w = tl.load(w_tile + step * w_row, mask=inner[None, :] < K - start, other=0)
        left = K - start
        x = tl.load(x_tile + start) if EVEN else tl.load(x_tile + start, mask=inner[:, None] < left, other=0)
        if PACKED:
            if EVEN:
                x_high = tl.load(x_tile + start + HALF)
            else:
                x_high = tl.load(x_tile + start + HALF, mask=inner[:, None] < left - HALF, other=0)
            low, high = _unpack(w, INLINE)
            if GROUP == 0:
                whole = tl.dot(low, x, whole, out_dtype=tl.int32)
                whole = tl.dot(high, x_high, whole, out_dtype=tl.int32)
            elif GROUP == HALF:
                last = (K - 1) // GROUP
                first_scale = tl.load(w_scale_ptr + 2 * step * N + n, mask=n < N, other=0.0)
                second = tl.minimum(2 * step + 1, last)  # beyond K there are zeros
                second_scale = tl.load(w_scale_ptr + second * N + n, mask=n < N, other=0.0)
                acc += tl.dot(low, x, out_dtype=tl.int32).to(tl.float32) * first_scale
                acc += tl.dot(high, x_high, out_dtype=tl.int32).to(tl.float32) * second_scale
            else:
                sums = tl.dot(low, x, out_dtype=tl.int32)
                sums = tl.dot(high, x_high, sums, out_dtype=tl.int32)
                w_scale = tl.load(w_scale_ptr + start // GROUP * N + n, mask=n < N, other=0.0)
                acc += sums.to(tl.float32) * w_scale
        else:
            w_scale = tl.load(w_scale_ptr + start // GROUP * N + n, mask=n < N, other=0.0)
            acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * w_scale
    if GROUP == 0:
        acc = whole.to(tl.float32)
    acc *= shared
    inside = (m < M) & (n < N)
    if IS_SPLIT:
        base = y_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m.to(tl.int64) * N + n, acc, mask=inside)
    else:
        y = epilogue(
            acc, m, n, M, N, scale_ptr, zero_ptr, w_scale_ptr, w_sums_ptr, bias_ptr, GROUP == 0, TOKENS, ZERO, BIAS
        )
        tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def require_packed(weight: Tensor, weight_scale: Tensor) -> None:
    """Refuses weights that are not stored as they were packed.

    Raises:
        InputError: for a weight or scales that are not contiguous, or not aligned to 16 bytes.
    """
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale)):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise InputError(
                "a weight must be contiguous, and begin at a multiple of 16 bytes",
                where=name,
                got=f"strides {tensor.stride()}, address {tensor.data_ptr() % 16} beyond such a multiple",
                remedy="clone it",
            )


def launch(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    group: int,
    dtype: torch.dtype,
    config: GroupedConfig | None = None,
) -> Tensor:
    """The product of int8 ``x[M, K]`` with a weight in groups; arguments as `scaled_linear_reference` has them."""
    (rows, width), outputs = x.shape, len(weight)
    is_packed = weight.dtype == torch.uint8
    if config is None:
        key = (tuning.row_bucket(rows), outputs, width, group, is_packed, str(dtype))
        config = tuning.found(
            x.device, "scaled_linear_grouped", key, GroupedConfig, lambda: configs(rows, outputs, width, group)
        ) or default_config(rows, outputs, width, group)
    half = _depth(group, is_packed, is_odd=width % 16 != 0)
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    parts = y
    if config.splits > 1:
        parts = torch.empty((config.splits, rows, outputs), dtype=torch.float32, device=x.device)
    tiles = -(-rows // config.rows) * -(-outputs // config.columns)
    _grouped_kernel[(tiles, config.splits)](
        x,
        weight,
        parts,
        scale,
        scale if zero_point is None else zero_point,
        weight_scale,
        weight_scale if weight_sums is None else weight_sums,
        weight_scale if bias is None else bias,
        rows,
        outputs,
        width,
        config.splits,
        ROWS=config.rows,
        COLUMNS=config.columns,
        HALF=half,
        GROUP=group,
        IS_SPLIT=config.splits > 1,
        PACKED=is_packed,
        INLINE=x.is_cuda,
        EVEN=width % (2 * half if is_packed else half) == 0,
        TOKENS=scale.numel() > 1,
        ZERO=0 if zero_point is None else 1 + (zero_point.numel() > 1),
        BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        finish(parts, y, scale, zero_point, weight_scale if group == 0 else None, weight_sums, bias)
    return y


def _depth(group: int, is_packed: bool, *, is_odd: bool) -> int:
    """Elements of K, or of each of the two tiles that 4-bit codes are unpacked to, at once."""
    return half_of(group) if is_packed else min(group, 64 if is_odd else 128)


def grouped_cases() -> Iterator[KernelCase]:
    """Every configuration, for W4A8 in groups of 128; every other group with the defaults."""
    cases: set[tuple[GroupedConfig, int, bool]] = set()
    for rows in (1, 32, 64):
        for config in configs(rows, 4096, 4096, 128):
            cases.add((replace(config, splits=min(config.splits, 2)), 128, True))
        for group in (0, 32, 64, 128, 256):
            cases.add((replace(default_config(rows, 65536, 4096, group), splits=1), group, True))
        for group in (32, 64, 128, 256):
            cases.add((replace(default_config(rows, 65536, 4096, group), splits=1), group, False))
    for config, group, is_packed in sorted(cases, key=str):
        yield _case(config, group, is_packed, is_odd=False)
    for is_split in (False, True):
        odd = replace(default_config(64, 4095, 4095, 128), splits=2 if is_split else 1)
        for group in (0, 32, 64, 128, 256):
            yield _case(odd, group, True, is_odd=True)
            if group:
                yield _case(odd, group, False, is_odd=True)


def case_name(config: GroupedConfig, group: int, is_packed: bool, *, is_odd: bool = False) -> str:
    """How the case of a configuration is called, without ``default-``."""
    tags = [config.rows, config.columns, config.stages, "split" if config.splits > 1 else "whole", f"g{group}"]
    kind = ["grouped", "int4" if is_packed else "int8", *(["odd"] if is_odd else [])]
    return "-".join([*kind, *map(str, tags)])


def _case(config: GroupedConfig, group: int, is_packed: bool, *, is_odd: bool) -> KernelCase:
    """``is_odd``: 16 does not divide the width."""
    is_default = (
        not is_odd
        and is_packed
        and group == 128
        and config == default_config(config.rows, 65536, 4096, 128)
        and config.rows != 32
    )
    half = _depth(group, is_packed, is_odd=is_odd)
    is_split = config.splits > 1
    return KernelCase(
        name=f"{'default-' if is_default else ''}{case_name(config, group, is_packed, is_odd=is_odd)}",
        kernel=_grouped_kernel,
        types={**types_of("i8", "u8" if is_packed else "i8", "fp32" if is_split else "bf16"), "splits": "i32"},
        constants={
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "HALF": half,
            "GROUP": group,
            "IS_SPLIT": is_split,
            "PACKED": is_packed,
            "INLINE": True,
            "EVEN": not is_odd,
            "TOKENS": True,
            "ZERO": 0,
            "BIAS": True,
        },
        options={"num_warps": config.warps, "num_stages": config.stages},
        mma={80: "IMMA", 90: "IGMMA"},
        weights_per_iteration=config.columns * half * (2 if is_packed else 1),
        budget=3.6 if not is_odd and is_packed and (group == 0 or group >= 128) else 0.0,
        unaligned=frozenset({"splits", "K", "N"} if is_odd else {"splits"}),
    )
