"""Triton kernels of `scaled_linear`: products of 8-bit codes, scaled behind the product.

Up to 64 rows memory is the limit: tiles of 64 or 128 output channels, split along K so that every multiprocessor
has work. The weight is the left operand of the product (``swapped``), since tensor cores take 64 of its rows at once
and as few as 8 of the right one; so its tiles go from memory into tensor cores without passing through registers. Parts
of a split are written apart and added in a fixed order by a second kernel, which also scales: results do not change
from run to run. Beyond, ``torch._int_mm`` and ``torch._scaled_mm`` take over where they accept the shape, with the same
second kernel behind, or none where the library scales rows itself.

8-bit floats are multiplied as they are from compute capability 8.9 on; there, sums of 128 products are added in
float32, as tensor cores keep fewer bits. Older devices have no such product: a code's bits, moved to their places in a
float16, are its value over 256, exactly, and products of those are scaled behind.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.scaled_linear import triton_grouped as grouped
from qcompiler.lowering.kernels.scaled_linear.config import (
    CODE_NAMES,
    Config,
    configs,
    default_config,
)
from qcompiler.lowering.kernels.scaled_linear.library import by_library, dense
from qcompiler.lowering.kernels.scaled_linear.triton_finish import (
    epilogue,
    finish,
    finish_cases,
    types_of,
)

__all__ = ["ahead_of_time", "case_name", "launch"]

E4M3_TO_HALF = (
    # Bytes to the upper halves of 16 bits; sign where it is, the rest one place down. NaN has all seven bits set: one
    # more at the lowest of them carries into bit 14, and with it the number is a NaN of float16.
    "{ .reg .b32 t0,t1,s0,s1,n0,n1; prmt.b32 t0,$2,0,0x1404; prmt.b32 t1,$2,0,0x3424; "
    "shr.b32 s0,t0,1; shr.b32 s1,t1,1; and.b32 s0,s0,0x3f803f80; and.b32 s1,s1,0x3f803f80; "
    "lop3.b32 $0,t0,0x80008000,s0,0xea; lop3.b32 $1,t1,0x80008000,s1,0xea; "
    "%s}"
)
_WEIGHT_TO_HALF = tl.constexpr(E4M3_TO_HALF % "")
_INPUT_TO_HALF = tl.constexpr(
    E4M3_TO_HALF
    % (
        "add.u32 n0,s0,0x00800080; add.u32 n1,s1,0x00800080; "
        "lop3.b32 $0,n0,0x40004000,$0,0xea; lop3.b32 $1,n1,0x40004000,$1,0xea; "
    )
)
_E5M2_TO_HALF = tl.constexpr("prmt.b32 $0,$2,0,0x1404; prmt.b32 $1,$2,0,0x3424;")


@triton.jit
def _as_half(codes, MANTISSA: tl.constexpr, KEEP_NAN: tl.constexpr, INLINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bytes of 8-bit floats as float16: E4M3 over 256, E5M2 as it is. NaN stays NaN where that is asked for."""
    if INLINE:
        code: tl.constexpr = _E5M2_TO_HALF if MANTISSA == 2 else _INPUT_TO_HALF if KEEP_NAN else _WEIGHT_TO_HALF
        half = tl.inline_asm_elementwise(code, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        wide = codes.to(tl.uint16)
        bits = wide << 8
        if MANTISSA == 3:
            bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
            if KEEP_NAN:
                bits |= (((wide & 0x7F) + 1) & 0x80) << 7
        half = bits.to(tl.float16, bitcast=True)
    return half


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    w, x, acc, SWAPPED: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr, INLINE: tl.constexpr
):
    """``acc`` plus the product; KIND 0: int8, 1: 8-bit floats, 2, 3: their bytes (E5M2, E4M3) as float16."""
    imprecise: tl.constexpr = DEPTH if DEPTH < 128 else 128
    if KIND >= 2:
        w, x = _as_half(w, KIND, False, INLINE), _as_half(x, KIND, True, INLINE)
    if SWAPPED:
        left, right = w, x
    else:
        left, right = x, w
    if KIND == 0:
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
    elif KIND == 1:
        acc = tl.dot(left, right, acc, max_num_imprecise_acc=imprecise)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
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
    DEPTH: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SWAPPED: tl.constexpr,
    KIND: tl.constexpr,
    INLINE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One tile of one part of K; written as a sum, or finished where there is one part.

    ``BLOCKS``: the weight has a scale per square of 128. ``EVEN``: ``DEPTH`` divides K.
    """
    tiles_n = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0)
    if SWAPPED:
        m0, n0 = (tile // tiles_n) * ROWS, (tile % tiles_n) * COLUMNS
    else:  # eight tiles of rows together, whose weights stay in the cache
        tiles_m = tl.cdiv(M, ROWS)
        first = tile // (8 * tiles_n) * 8
        size = tl.minimum(tiles_m - first, 8)
        within = tile % (8 * tiles_n)
        m0, n0 = (first + within % size) * ROWS, (within // size) * COLUMNS
    rows, columns, inner = m0 + tl.arange(0, ROWS), n0 + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    x_rows = x_ptr + tl.where(rows < M, rows, 0).to(tl.int64) * K
    w_rows = w_ptr + tl.where(columns < N, columns, 0).to(tl.int64) * K
    acc_type: tl.constexpr = tl.int32 if KIND == 0 else tl.float32
    if SWAPPED:
        x_tile, w_tile = x_rows[None, :] + inner[:, None], w_rows[:, None] + inner[None, :]
        acc = tl.zeros([COLUMNS, ROWS], acc_type)
    else:
        x_tile, w_tile = x_rows[:, None] + inner[None, :], w_rows[None, :] + inner[:, None]
        acc = tl.zeros([ROWS, COLUMNS], acc_type)
    steps = tl.cdiv(K, DEPTH)
    part = tl.cdiv(steps, splits)
    begin = tl.program_id(1) * part
    for step in range(begin, tl.minimum(begin + part, steps)):
        start = step * DEPTH
        if EVEN:
            w = tl.load(w_tile + start, eviction_policy="evict_first")
            x = tl.load(x_tile + start)
        else:
            left = inner < K - start
            nothing: tl.constexpr = 0.0 if KIND == 1 else 0
            w = tl.load(w_tile + start, mask=left[None, :] if SWAPPED else left[:, None], other=nothing)
            x = tl.load(x_tile + start, mask=left[:, None] if SWAPPED else left[None, :], other=nothing)
        if BLOCKS:
            ratio: tl.constexpr = 128 // DEPTH
            scales = tl.load(w_scale_ptr + (n0 // 128) * tl.cdiv(K, 128) + step // ratio)
            acc += _product(w, x, tl.zeros_like(acc), SWAPPED, DEPTH, KIND, INLINE) * scales
        else:
            acc = _product(w, x, acc, SWAPPED, DEPTH, KIND, INLINE)
    if KIND == 3:
        acc *= 65536.0
    if SWAPPED:
        m, n = rows[None, :], columns[:, None]
    else:
        m, n = rows[:, None], columns[None, :]
    inside = (m < M) & (n < N)
    if IS_SPLIT:
        base = y_ptr + tl.program_id(1).to(tl.int64) * M * N
        tl.store(base + m.to(tl.int64) * N + n, acc, mask=inside)
    else:
        y = epilogue(
            acc.to(tl.float32), m, n, M, N, scale_ptr, zero_ptr, w_scale_ptr, w_sums_ptr, bias_ptr,
            not BLOCKS, TOKENS, ZERO, BIAS,
        )  # fmt: skip
        tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    group: int,
    dtype: torch.dtype,
    *,
    config: Any = None,
    capability: int | None = None,
) -> Tensor:
    """The operator; arguments as `scaled_linear_reference` has them, checked before.

    Args:
        codes, scale, zero_point, weight, weight_scale, weight_sums, bias, group, dtype: of the operator.
        config: other than the default: a `Config`, or a `GroupedConfig` where integers have groups.
        capability: other than that of the device.

    Raises:
        InputError: for a weight that is not contiguous.
    """
    shape, width = codes.shape[:-1], codes.shape[-1]
    x = codes.reshape(-1, width).contiguous()
    zero_shift = 0
    if x.dtype == torch.uint8:
        x, zero_shift = (x ^ 0x80).view(torch.int8), 128
    if x.data_ptr() % 16:  # a part of a larger tensor: read byte by byte, it would not go through shared memory
        x = x.clone()
    scale = scale.contiguous()
    zero_point, weight_sums, bias = map(dense, (zero_point, weight_sums, bias))
    rest = (weight_scale, weight_sums, bias)
    rows, outputs = len(x), len(weight)
    if rows == 0:
        return torch.empty((*shape, outputs), dtype=dtype, device=x.device)
    grouped.require_packed(weight, weight_scale)
    if zero_point is not None and zero_shift:
        zero_point = zero_point.to(torch.int32) - zero_shift
    if weight.dtype == torch.uint8 or (group and weight.dtype == torch.int8):
        return grouped.launch(x, scale, zero_point, weight, *rest, group, dtype, config).view(*shape, outputs)
    if capability is None:
        capability = Device.of(x.device).capability or 90
    has_blocks = group != 0
    if config is None:
        key = (tuning.row_bucket(rows), outputs, width, CODE_NAMES[x.dtype], has_blocks, str(dtype))
        options = (rows, outputs, width, x.dtype, capability)
        config = tuning.found(
            x.device, "scaled_linear", key, Config, lambda: configs(*options, has_blocks=has_blocks)
        ) or default_config(*options, has_blocks=has_blocks)
    if config.library:
        return by_library(x, scale, zero_point, weight, *rest, dtype).view(*shape, outputs)
    kind = _kind(x.dtype, capability)
    if kind >= 2:
        x, weight = x.view(torch.uint8), weight.view(torch.uint8)
    is_split = config.splits > 1
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    parts = y
    if is_split:
        wide = torch.int32 if kind == 0 else torch.float32
        parts = torch.empty((config.splits, rows, outputs), dtype=wide, device=x.device)
    tiles = -(-rows // config.rows) * -(-outputs // config.columns)
    _kernel[(tiles, config.splits)](
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
        DEPTH=config.depth,
        IS_SPLIT=is_split,
        SWAPPED=config.swapped,
        KIND=kind,
        INLINE=x.is_cuda,
        BLOCKS=has_blocks,
        EVEN=width % config.depth == 0,
        TOKENS=scale.numel() > 1,
        ZERO=0 if zero_point is None else 1 + (zero_point.numel() > 1),
        BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if is_split:
        finish(parts, y, scale, zero_point, None if has_blocks else weight_scale, weight_sums, bias)
    return y.view(*shape, outputs)


def _kind(codes: torch.dtype, capability: int) -> int:
    if codes == torch.int8:
        return 0
    return 1 if capability >= 89 else {torch.float8_e5m2: 2, torch.float8_e4m3fn: 3}[codes]


def ahead_of_time() -> Iterator[KernelCase]:
    """Every configuration that can be chosen on compute capability 8.0 and 9.0."""
    for capability in (80, 90):
        for codes in CODE_NAMES:
            for has_blocks in (False, True) if codes == torch.float8_e4m3fn else (False,):
                yield from _cases(codes, has_blocks, capability)
    yield from finish_cases()
    yield from grouped.grouped_cases()


def _cases(codes: torch.dtype, has_blocks: bool, capability: int) -> Iterator[KernelCase]:
    defaults, found = set(), set()
    for rows in (1, 16, 32, 64, 2048):
        for outputs, width in ((4096, 4096), (65536, 4096), (4095, 4095)):
            options = (rows, outputs, width, codes, capability)
            for config in configs(*options, has_blocks=has_blocks):
                found.add((*_constants(config), config.splits > 1))
            if rows not in (16, 32) and codes != torch.float8_e5m2:
                default = default_config(*options, has_blocks=has_blocks)
                if outputs == 4096:
                    defaults.add((*_constants(default), default.splits > 1))
    for key in sorted(found):
        if key[0]:
            yield _case(codes, has_blocks, capability, key, is_default=key in defaults)


def _constants(config: Config) -> tuple[int, int, int, int, int, bool]:
    return config.rows, config.columns, config.depth, config.warps, config.stages, config.swapped


def case_name(codes: torch.dtype, has_blocks: bool, capability: int, config: Config) -> str:
    """How the case of a configuration is called, without ``default-``."""
    tags = [CODE_NAMES[codes], *(["blocks"] if has_blocks else []), *map(str, _constants(config)[:5])]
    tags += ["swapped"] if config.swapped else []
    return "-".join([*tags, "split" if config.splits > 1 else "whole", f"sm{capability}"])


def _case(
    codes: torch.dtype, has_blocks: bool, capability: int, key: tuple[Any, ...], *, is_default: bool
) -> KernelCase:
    rows, columns, depth, warps, stages, is_swapped, is_split = key
    config = Config(rows, columns, depth, 2 if is_split else 1, warps, stages, is_swapped)
    kind, is_odd = _kind(codes, capability), depth == 32
    byte = "u8" if kind >= 2 else {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}[codes]
    plain, warpgroup = ("IMMA", "IGMMA") if kind == 0 else ("HMMA", "QGMMA")
    return KernelCase(
        name=f"{'default-' if is_default else ''}{case_name(codes, has_blocks, capability, config)}",
        kernel=_kernel,
        types={**types_of(byte, byte, ("i32" if kind == 0 else "fp32") if is_split else "bf16"), "splits": "i32"},
        constants={
            "ROWS": rows,
            "COLUMNS": columns,
            "DEPTH": depth,
            "IS_SPLIT": is_split,
            "SWAPPED": is_swapped,
            "KIND": kind,
            "INLINE": True,
            "BLOCKS": has_blocks,
            "EVEN": not is_odd,
            "TOKENS": True,
            "ZERO": 0,
            "BIAS": True,
        },
        options={"num_warps": warps, "num_stages": stages},
        mma={capability: plain if capability < 90 else warpgroup},
        weights_per_iteration=columns * depth,
        budget=0.0 if rows > 16 or is_odd else 8.0 if kind == 3 else 2.5 if capability >= 90 else 3.6,
        unaligned=frozenset({"splits", "K", "N"} if is_odd else {"splits"}),
    )
