"""``codebook_linear`` in Triton: how `codebook_kernels_triton` is launched, and what it is compiled to ahead of time.

Up to 128 rows, values are looked up for the product. Where the outputs alone do not fill the device, the input channels
are split between blocks; partial sums are float32 and added up in order, so that results do not depend on timing. With
more rows, the weight is written out, and the matrix product is PyTorch's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.errors import InputError, TargetError
from qcompiler.lowering.kernels.codebook_linear.layout import COLUMNS_PER_BLOCK
from qcompiler.lowering.kernels.codebook_linear.operator import OLDEST_CAPABILITY, check
from qcompiler.lowering.kernels.codebook_linear.triton_kernels import (
    add_sparse,
    dequantize,
    finish,
    multiply,
)
from qcompiler.lowering.kernels.codebook_linear.triton_lookup import rows_are_apart
from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.lowering.kernels.launch.machine_code import KernelCase

__all__ = ["Config", "ahead_of_time", "configs", "default_config", "launch"]

_MANY_ROWS = 128  # beyond, writing the weight once costs less than looking it up for every block of rows
_MOST_SPLITS = 8
_FEW_ROWS = 8  # up to which the sparse matrix reads ``x`` as it lies; more rows are read from its transpose


@dataclass(frozen=True)
class Config:
    """How the product is launched.

    Attributes:
        rows: of activations in a block; 0: the weight is written out for PyTorch's matrix product.
        out: output channels in a block.
        split: pieces of the input channels, each in a block of its own.
        swap: compute the transpose.
        warps, stages: of a block.
    """

    rows: int
    out: int = 32
    split: int = 1
    swap: bool = True
    warps: int = 2
    stages: int = 4


def launch(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """The operator: arguments as those of `codebook_linear.codebook_linear_reference`.

    Args:
        x: float16 or bfloat16 ``[..., in]``; on the CPU, kernels are interpreted.
        codes, table: as `pack_codes` and `pack_table` give them.
        bias, values, columns, row_offsets: of the layer, or None.
        out_features: rows of the weight.
        config: how to launch; None: what a search kept for the shape, or the default.

    Raises:
        InputError: for tensors that do not fit.
        TargetError: for a device that is too old.
    """
    check(x, codes, table, bias, values, columns, row_offsets, out_features)
    if x.dtype == torch.float32:
        raise InputError("no kernel for these activations", where="x", got=x.dtype, expected="float16 or bfloat16")
    if x.is_cuda:
        require_device(x.device)
    width, bits = x.shape[-1], codes.shape[2]
    rows = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], out_features))
    if not y.numel():
        return y
    sparse = None if values is None or columns is None or row_offsets is None else (values, columns, row_offsets)
    if config is None:
        config = _config(x.device, x.dtype, rows, out_features, width, bits)
    if not config.rows:
        return F.linear(x, _written_out(x, codes, table, sparse, out_features), bias)
    split, per_split = _pieces(config.split, codes.shape[1])
    a, missing = x.reshape(rows, width), codes.shape[1] * COLUMNS_PER_BLOCK - width
    if missing:  # to pad by nothing would be a copy, too
        a = F.pad(a, (0, missing))
    elif a.data_ptr() % 16:
        a = a.clone()
    is_final = split == 1 and sparse is None
    target = y if is_final else torch.empty(split * rows * out_features, dtype=torch.float32, device=x.device)
    _run(
        multiply,
        (-(-out_features // config.out), split, -(-rows // config.rows)),
        (a, codes, table, a if bias is None else bias, target),
        (rows, out_features, table.shape[1], codes.shape[1], per_split),
        {**_constants(config, bits), "FINAL": is_final, "HAS_BIAS": is_final and bias is not None},
        {"num_warps": config.warps, "num_stages": config.stages},
    )
    if not is_final:
        _add_up(y, target, a, bias, sparse, split)
    return y


def require_device(device: torch.device) -> None:
    """Refuses a CUDA device that is too old.

    Raises:
        TargetError: saying which it would have to be.
    """
    known = Device.of(device)
    if known.capability < OLDEST_CAPABILITY:
        raise TargetError("the device is too old", got=known.name, expected="compute capability 8.0 or higher")


def _add_up(
    y: Tensor,
    partial: Tensor,
    x: Tensor,
    bias: Tensor | None,
    sparse: tuple[Tensor, Tensor, Tensor] | None,
    split: int,
) -> None:
    rows, out = x.shape[0], y.shape[-1]
    strides = x.stride()
    if sparse is not None and rows > _FEW_ROWS:  # so that a warp reads neighbours
        x, strides = x.t().contiguous(), (1, rows)
    constants = _finish_constants(rows, split, sparse is not None, bias is not None)
    grid = (-(-out // constants["OUT"]), -(-rows // constants["ROWS"]))
    parts = (x, x, x) if sparse is None else sparse
    finish[grid](y, partial, x, x if bias is None else bias, *parts, rows, out, *strides, **constants)


def _written_out(
    x: Tensor, codes: Tensor, table: Tensor, sparse: tuple[Tensor, Tensor, Tensor] | None, out: int
) -> Tensor:
    """The weight, ``[out, in]`` in the dtype of ``x``."""
    width = x.shape[-1]
    weight = x.new_empty(out, width)
    sizes = (out, width, table.shape[1], codes.shape[1])
    constants = {"BITS": codes.shape[2], "OUT": _WRITTEN_ROWS}
    _run(dequantize, (-(-out // _WRITTEN_ROWS), codes.shape[1]), (weight, codes, table), sizes, constants, {})
    if sparse is not None:
        add_sparse[(-(-out // _SPARSE_ROWS),)](weight, *sparse, out, width, OUT=_SPARSE_ROWS, STEP=_SPARSE_STEP)
    return weight


_WRITTEN_ROWS = 64  # of a block of `dequantize`
_SPARSE_ROWS, _SPARSE_STEP = 16, 16  # of a block of `add_sparse` and `finish`, and entries it takes at a time


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> None:
    """Launches a kernel with permutes, and without them should it have been laid out so that they are wrong."""
    on_device = tensors[0].is_cuda
    compiled = kernel[grid](*tensors, *sizes, **constants, PTX=on_device, **options)
    if on_device and _is_wrong(compiled):
        kernel[grid](*tensors, *sizes, **constants, PTX=False, **options)


@cache
def _is_wrong(compiled: Any) -> bool:
    return bool(rows_are_apart(compiled.asm["ptx"]))


def _constants(config: Config, bits: int) -> dict[str, Any]:
    return {"BITS": bits, "ROWS": config.rows, "OUT": config.out, "SWAP": config.swap}


def _finish_constants(rows: int, split: int, is_sparse: bool, has_bias: bool) -> dict[str, Any]:
    block = min(32, tuning.row_bucket(rows))
    step = _SPARSE_STEP if block <= 4 else _SPARSE_STEP // 2
    return {
        "SPLIT": split,
        "ROWS": block,
        "OUT": _SPARSE_ROWS,
        "STEP": step,
        "SPARSE": is_sparse,
        "HAS_BIAS": has_bias,
    }


def _pieces(split: int, blocks: int) -> tuple[int, int]:
    """How many pieces the blocks of input channels are cut into, none empty, and the blocks of each."""
    per_split = -(-blocks // min(split, blocks))
    return -(-blocks // per_split), per_split


def _config(device: torch.device, dtype: torch.dtype, rows: int, out: int, width: int, bits: int) -> Config:
    known = Device.of(device)
    capability = known.capability or 90
    key = (tuning.row_bucket(rows), out, width, bits, str(dtype))
    kept = tuning.found(
        device, "codebook_linear", key, Config, lambda: configs(rows, out, width, bits, capability=capability)
    )
    return kept or default_config(rows, out, width, bits, capability=capability)


@cache  # asked at every launch
def default_config(rows: int, out: int, width: int, bits: int, *, capability: int = 90) -> Config:
    """What is launched where no search was run.

    Args:
        rows: of activations.
        out, width: of the weight.
        bits: of a code.
        capability: of the device.
    """
    if rows > _MANY_ROWS:
        return Config(rows=0)
    config = next(found for found in _tiles(capability) if found.rows >= min(rows, 64))
    return replace(config, split=_default_split(config, rows, out, width))


def _default_split(config: Config, rows: int, out: int, width: int) -> int:
    """Enough blocks for about 16 warps on each of 132 processors, but none without two steps."""
    blocks = -(-out // config.out) * -(-rows // config.rows)
    wanted = -(-132 * 16 // (blocks * config.warps))
    steps = -(-width // COLUMNS_PER_BLOCK)
    return max(1, min(wanted, steps // 2, _MOST_SPLITS))


def configs(rows: int, out: int, width: int, bits: int, *, capability: int = 90) -> Sequence[Config]:
    """The search space for a shape: the default first."""
    default = default_config(rows, out, width, bits, capability=capability)
    tiles = [config for config in _tiles(capability) if rows <= 4 * config.rows and config.rows <= 16 * rows]
    splits = [split for split in (1, 2, 4, 8) if split == 1 or split <= -(-width // COLUMNS_PER_BLOCK)]
    written = [Config(rows=0)] if rows > 16 else []
    return tuple(dict.fromkeys([default, *(replace(c, split=split) for c in tiles for split in splits), *written]))


def _tiles(capability: int) -> Sequence[Config]:
    """Shapes of blocks, fewest rows first; the first with enough rows is the default.

    With four warps and eight rows or more to the right, Triton takes warp-group instructions on Hopper, whose operands
    cost half a permute more per weight: two warps are the choice for few rows.
    """
    few = [
        Config(rows=8),
        Config(rows=8, stages=3),
        Config(rows=16, out=128, swap=False, warps=8),
        Config(rows=16),
        Config(rows=16, out=64, swap=False, warps=4),
    ]
    if capability >= 90:
        return [*few, Config(rows=64, out=128, swap=False, warps=4, stages=3)]
    return [*few, Config(rows=32, stages=3), Config(rows=64, out=64, warps=4, stages=2)]


_LOOKUPS = {2: 1.3, 3: 1.45, 4: 2.6}
"""Instructions per weight that `codebook_lookup_triton` takes, by bits."""


def _budget(config: Config, bits: int, capability: int) -> float:
    """Instructions per weight and lane.

    Beside the lookups, with eight rows: 1/8 ``HMMA``, 1/8 to load bytes and activations, 0.4 to bring activations into
    neighbouring registers, and the loop itself. More rows take as many more products and moves; not so the instructions
    of a warp group, which read activations from shared memory.
    """
    if capability >= 90 and config.rows >= 64:
        return _LOOKUPS[bits] + 1.2
    return _LOOKUPS[bits] + 0.6 + (0.065 if config.swap else 0.09) * config.rows


def ahead_of_time() -> Iterator[KernelCase]:
    """All kernels, with every configuration a shape can lead to; ``default``: what is launched without a search."""
    for capability in (80, 90):
        tiles = _tiles(capability)
        defaults = {default_config(rows, 1, 1, 4, capability=capability) for rows in range(1, _MANY_ROWS + 1)}
        for config in tiles:
            for bits in (2, 3, 4):
                yield _multiply_case("default" if config in defaults else "other", config, bits, capability)
                yield _multiply_case("final", config, bits, capability, FINAL=True, HAS_BIAS=True)
        for config in (tile for tile in tiles if tile in defaults):
            for bits in (2, 3, 4):
                yield _multiply_case("bfloat16", config, bits, capability, dtype="bf16")
    for dtype in ("fp16", "bf16"):
        yield from _other_cases(dtype)


def _multiply_case(
    kind: str, config: Config, bits: int, capability: int, dtype: str = "fp16", **constants: bool
) -> KernelCase:
    shape = f"{config.rows}x{config.out}{'' if config.swap else 'p'}-{config.warps}x{config.stages}"
    sizes = ("rows", "out", "padded", "blocks", "per_split")
    final = constants.get("FINAL", False)
    types = {"x": f"*{dtype}", "codes": "*u8", "table": "*i32", "bias": f"*{dtype}"}
    return KernelCase(
        name=f"multiply-{kind}-{bits}-{shape}-sm{capability}",
        kernel=multiply,
        types={**types, "target": f"*{dtype}" if final else "*fp32", **dict.fromkeys(sizes, "i32")},
        constants={
            **_constants(config, bits),
            "FINAL": False,
            "HAS_BIAS": False,
            "PTX": True,
            **constants,
        },
        options={"num_warps": config.warps, "num_stages": config.stages},
        mma={capability: "HGMMA" if capability >= 90 and config.rows >= 64 else "HMMA"},
        weights_per_iteration=config.out * COLUMNS_PER_BLOCK,
        budget=_budget(config, bits, capability),
        unaligned=frozenset({"rows", "out", "blocks", "per_split"}),
        flaw=rows_are_apart,
    )


def _other_cases(dtype: str) -> Iterator[KernelCase]:
    anywhere: dict[int, str | None] = {80: None, 90: None}
    matrix = {"values": f"*{dtype}", "columns": "*i16", "row_offsets": "*i32"}
    for bits in (2, 3, 4):
        for kind in ("default" if dtype == "fp16" else "other", "odd"):
            yield KernelCase(
                name=f"dequantize-{kind}-{bits}-{dtype}",
                kernel=dequantize,
                types={
                    **{"weight": f"*{dtype}", "codes": "*u8", "table": "*i32"},
                    **dict.fromkeys(("out", "width", "padded", "blocks"), "i32"),
                },
                constants={"BITS": bits, "OUT": _WRITTEN_ROWS, "PTX": True},
                options={},
                mma=anywhere,
                unaligned=frozenset({"out", "blocks"} | ({"width"} if kind == "odd" else set())),
                flaw=rows_are_apart,
            )
    yield KernelCase(
        name=f"add-sparse-{dtype}",
        kernel=add_sparse,
        types={"weight": f"*{dtype}", **matrix, "out": "i32", "width": "i32"},
        constants={"OUT": _SPARSE_ROWS, "STEP": _SPARSE_STEP},
        options={},
        mma=anywhere,
        unaligned=frozenset({"out", "width"}),
    )
    for rows in (1, 2, 4, 8, 16, 32):
        for is_sparse in (True, False):
            kind = "default" if rows == 1 and dtype == "fp16" else "other"
            yield KernelCase(
                name=f"finish-{kind}-{rows}-{'sparse' if is_sparse else 'dense'}-{dtype}",
                kernel=finish,
                types={
                    **{"y": f"*{dtype}", "partial": "*fp32", "x": f"*{dtype}", "bias": f"*{dtype}", **matrix},
                    **dict.fromkeys(("rows", "out", "x_row", "x_column"), "i32"),
                },
                constants=_finish_constants(rows, _MOST_SPLITS, is_sparse, True),
                options={},
                mma=anywhere,
                unaligned=frozenset({"rows", "out", "x_row", "x_column"}),
            )
