"""Launches attention over a quantized cache on a GPU: configurations, constants of kernels, shares of the tokens."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.ir import CacheFormat
from qcompiler.lowering.kernels.cache.config import (
    Config,
    Tile,
    configs,
    default_config,
    kind_of,
    padded_words,
    power_of_2,
    registers,
)
from qcompiler.lowering.kernels.cache.decode_attention import Side
from qcompiler.lowering.kernels.cache.triton_attention_split import merge_kernel, split_kernel
from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.machine_code import KernelCase

__all__ = ["ahead_of_time", "launch"]

_LOG2_E = math.log2(math.e)
_MOST_SPLITS = 128
_MULTIPROCESSORS = 132  # where there is no device to ask


def launch(
    q: Tensor,
    keys: Side,
    values: Side,
    length: Tensor,
    sm_scale: float,
    window: int | None,
    softcap: float | None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> Tensor:
    """The operator, of arguments that have been checked.

    Args:
        q: float16 or bfloat16 ``[B, Hq, S, D]``.
        keys, values: the cache.
        length, sm_scale, window, softcap: as of the operator.
        config: None: what a search found, or the default.
        splits: shares of the tokens; None: as many as keep the device busy with a full cache, so that a recorded graph
            serves every length.

    Returns:
        ``[B, Hq, S, Dv]``.

    Raises:
        InputError: if codes are not aligned to 16 bits.
    """
    batch, query_heads, queries, _ = q.shape
    _, heads, capacity, _ = keys.codes.shape
    out = q.new_empty(batch, query_heads, queries, values.width)
    if not out.numel() or not capacity:
        return out.zero_()
    k_words, k_steps, k_unit = _words("k", keys)
    v_words, v_steps, v_unit = _words("v", values)
    rows = query_heads // heads * queries
    tile = Tile.of(rows, keys, values)
    if config is None:
        sizes = (rows, batch * heads, tuning.row_bucket(capacity))
        key = (str(keys.spec), str(values.spec), keys.width, values.width, *sizes)
        found = tuning.found(q.device, "decode_attention", key, Config, lambda: configs(tile))
        config = found or default_config(tile)
    blocks = -(-rows // tile.rows)
    if splits is None:
        splits = _splits(capacity, batch * heads * blocks, config, q.device)
    all_rows = batch * heads * rows
    partial, stats = out, out
    if splits > 1:
        partial = q.new_empty(splits, all_rows, values.width, dtype=torch.float32)
        stats = q.new_empty(2, splits, all_rows, dtype=torch.float32)
    split_kernel[(batch * heads * blocks, splits)](
        q,
        k_words,
        k_words if keys.scale is None else keys.scale,
        k_words if keys.zero is None else keys.zero,
        v_words,
        v_words if values.scale is None else values.scale,
        v_words if values.zero is None else values.zero,
        length,
        partial,
        stats,
        out,
        sm_scale * _LOG2_E if softcap is None else 2.0 * sm_scale * _LOG2_E / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        queries,
        capacity,
        0 if window is None else min(window, capacity),  # larger ones show all, and may be no int32
        0 if length.shape[0] == 1 else length.stride(0),
        *q.stride()[:3],
        *k_steps,
        *_steps(keys, keys.scale),
        *_steps(keys, keys.zero),
        *v_steps,
        *_steps(values, values.scale),
        *_steps(values, values.zero),
        HEADS=heads,
        RATIO=query_heads // heads,
        **_side_constants("K", keys, k_unit),
        **_side_constants("V", values, v_unit),
        ROWS=tile.rows,
        TOKENS=config.tokens,
        SPLITS=splits,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        MODE=_mode(q.device),
        num_warps=config.warps,
        num_stages=config.stages,
        maxnreg=registers(keys, values, config),
    )
    if splits > 1:
        merge_kernel[(all_rows,)](partial, stats, out, all_rows, **_merge_constants(values.width, splits), num_warps=4)
    return out


def _splits(capacity: int, programs: int, config: Config, device: torch.device) -> int:
    wanted = -(-_multiprocessors(device) * config.programs // programs)
    return int(max(1, min(wanted, -(-capacity // (2 * config.tokens)), _MOST_SPLITS)))


@cache
def _multiprocessors(device: torch.device) -> int:
    is_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else _MULTIPROCESSORS


@cache
def _mode(device: torch.device) -> int:
    """How codes are taken apart, as ``cache_codes_triton`` has it."""
    if device.type != "cuda":
        return 0
    return 2 if torch.cuda.get_device_capability(device) >= (8, 9) else 1


def _side_constants(prefix: str, side: Side, unit: int) -> dict[str, Any]:
    kind, per = kind_of(side)
    words = padded_words(side)
    return {
        f"{prefix}_WIDTH": side.width,
        f"{prefix}_KIND": kind,
        f"{prefix}_PER": per,
        f"{prefix}_WORDS": words,
        f"{prefix}_GROUPS": side.groups,
        f"{prefix}_PADDED_GROUPS": words * per * side.groups // side.width if side.groups > 1 else 1,
        f"{prefix}_ZERO": side.zero is not None,
        f"{prefix}_UNIT": unit,
    }


def _merge_constants(width: int, splits: int) -> dict[str, int]:
    padded, channels = power_of_2(splits), power_of_2(width)
    return {"WIDTH": width, "CHANNELS": channels, "SPLITS": splits, "PADDED": padded, "CHUNK": min(padded, 16)}


def _words(name: str, side: Side) -> tuple[Tensor, tuple[int, int, int], int]:
    """The codes as 16-bit words, their strides in units, and the unit, a power of two that divides all of them.

    Raises:
        InputError: if a code is not where a word can begin.
    """
    codes = side.codes
    if side.spec is not None:
        if codes.shape[3] % 2 or any(step % 2 for step in codes.stride()[:3]) or codes.storage_offset() % 2:
            got = f"{codes.shape[3]} bytes per token, strides {codes.stride()}, offset {codes.storage_offset()}"
            raise InputError("codes that are not aligned to 16 bits", where=f"{name}_codes", got=got)
        codes = codes.view(torch.uint16)
    batch, head, token = codes.stride()[:3]
    unit = math.gcd(batch, head, token, 16)
    return codes, (batch // unit, head // unit, token // unit), unit


def _steps(side: Side, qparam: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token; of a stored one: nothing, head, channel."""
    if qparam is None or qparam.dim() == 0:
        return 0, 0, 0
    batch, head, token, channel = qparam.stride()
    return (batch, head, token) if side.groups else (0, head, channel)


_FORMS: dict[str, tuple[CacheFormat | None, CacheFormat | None]] = {
    "int8": (CacheFormat("int8"), CacheFormat("int8")),
    "int4": (CacheFormat("int4"), CacheFormat("int4")),
    "fp8": (CacheFormat("float8_e4m3fn"), CacheFormat("float8_e4m3fn")),
    "int4 g16": 2 * (CacheFormat("int4", group_size=16, symmetric=False),),
    "float": (None, None),
    "int8 and float": (CacheFormat("int8"), None),
    "fp8 and int4 g32": (CacheFormat("float8_e4m3fn"), CacheFormat("int4", group_size=32)),
    "int8 g32": 2 * (CacheFormat("int8", group_size=32),),
    "fp8 g32": 2 * (CacheFormat("float8_e4m3fn", group_size=32),),
    "int8 asymmetric": 2 * (CacheFormat("int8", symmetric=False),),
    "int4 asymmetric": 2 * (CacheFormat("int4", symmetric=False),),
    "int8 static": 2 * (CacheFormat("int8", "static"),),
    "int8 static asymmetric": 2 * (CacheFormat("int8", "static", symmetric=False),),
    "int4 static asymmetric": 2 * (CacheFormat("int4", "static", symmetric=False),),
    "fp8 static": 2 * (CacheFormat("float8_e4m3fn", "static"),),
}  # fmt: skip
_BUDGETS = {"int8": 4.0, "int4": 3.6, "fp8": 4.5, "int4 g16": 6.5}
"""Instructions per code and lane of the default configuration for one token, 128 channels."""


def ahead_of_time() -> Iterator[KernelCase]:
    """Every form with every configuration for 128 channels, and with the default for more rows and other widths."""
    for form in _FORMS:
        tile = _tile(form, 128, 4)
        for config in configs(tile):
            first = form in _BUDGETS and config == default_config(tile)
            yield from _cases(form, 128, 4, config, "common" if first else "other", _BUDGETS.get(form, 0.0) * first)
        for rows, width in ((32, 128), (4, 64), (8, 80), (4, 256), (32, 256)):
            if any(spec is not None and width % spec.block(width) for spec in _FORMS[form]):
                continue
            yield from _cases(form, width, rows, default_config(_tile(form, width, rows)), "other")
    for options in ({"WINDOW": True}, {"SOFTCAP": True}, {"SPLITS": 1}, {"bfloat16": True}):
        yield from _cases(
            "int8 and float", 128, 4, default_config(_tile("int8 and float", 128, 4)), "other", 0.0, options
        )
    for splits in (2, 16, _MOST_SPLITS):
        types = {"partial": "*fp32", "stats": "*fp32", "out": "*fp16", "rows": "i32"}
        constants = _merge_constants(128, splits)
        yield KernelCase(
            f"{'common' if splits == 16 else 'other'}: merge of {splits}",
            merge_kernel,
            types,
            constants,
            {"num_warps": 4},
            {80: None, 90: None},
            unaligned=frozenset(["rows"]),
        )


def _tile(form: str, width: int, rows: int) -> Tile:
    keys, values = (_empty_side(spec, width) for spec in _FORMS[form])
    return Tile.of(rows, keys, values)


def _empty_side(spec: CacheFormat | None, width: int) -> Side:
    """A cache without data."""
    rows, device = (1, 8, 4096), torch.device("meta")
    if spec is None:
        return Side(None, torch.empty(*rows, width, dtype=torch.float16, device=device), None, None)
    dtype: torch.dtype = getattr(torch, spec.port_dtype)
    codes = torch.empty(*rows, width // 2 if spec.is_packed else width, dtype=dtype, device=device)
    if spec.scales == "static":
        scale = torch.empty(() if spec.is_float else (1, 8, 1, width), device=device)
    else:
        scale = torch.empty(*rows, width // spec.block(width), dtype=torch.float16, device=device)
    zero = None if spec.symmetric else torch.empty(scale.shape, dtype=torch.uint8, device=device)
    return Side(spec, codes, scale, zero)


def _cases(
    form: str,
    width: int,
    rows: int,
    config: Config,
    group: str,
    budget: float = 0.0,
    options: dict[str, Any] | None = None,
) -> Iterator[KernelCase]:
    """One per compute capability: they take codes apart in different ways."""
    keys, values = (_empty_side(spec, width) for spec in _FORMS[form])
    given = dict(options or {})
    half = "*bf16" if given.pop("bfloat16", False) else "*fp16"
    types = {"q": half, "length": "*i32", "partial": "*fp32", "stats": "*fp32", "out": half}
    types |= {"sm_scale": "fp32", "softcap": "fp32"}
    fixed: dict[str, Any] = {"queries": 1, "length_step": 0}
    for prefix, side in (("k", keys), ("v", values)):
        types[prefix] = half if side.spec is None else "*u16"
        types[f"{prefix}_scale"] = "*fp16" if side.groups else "*fp32"
        types[f"{prefix}_zero"] = "*u8"
        if side.groups == 1:
            fixed |= {f"{prefix}_scale_t": 1, f"{prefix}_zero_t": 1}
    integers = [name for name in split_kernel.arg_names if name.islower() and name not in types | fixed]
    tile = Tile.of(rows, keys, values)
    for capability in (80, 90):
        constants = {
            "HEADS": 8,
            "RATIO": rows,
            **_side_constants("K", keys, _words("k", keys)[2]),
            **_side_constants("V", values, _words("v", values)[2]),
            "ROWS": tile.rows,
            "TOKENS": config.tokens,
            "SPLITS": 16,
            "WINDOW": False,
            "SOFTCAP": False,
            "MODE": 2 if capability >= 89 else 1,
        }
        launched = f"{config.tokens} tokens, {config.warps} warps, {config.stages} stages"
        yield KernelCase(
            f"{group}: {form}, {width} channels, {rows} rows, {launched}{''.join(f', {o}' for o in options or {})}",
            split_kernel,
            types | dict.fromkeys(integers, "i32"),
            constants | given | fixed,
            {
                "num_warps": config.warps,
                "num_stages": config.stages,
                "maxnreg": registers(keys, values, config),
            },
            {capability: "HMMA"},
            config.tokens * (keys.width + values.width),
            budget,
            frozenset(integers) - {"q_b", "q_h", "q_s"},
        )
