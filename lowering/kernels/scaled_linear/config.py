"""How products of 8-bit codes are split over a GPU: defaults, and what a search tries."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from qcompiler.lowering.kernels.launch.machine_code import SHARED_MEMORY

__all__ = ["CODE_NAMES", "Config", "configs", "default_config"]

_SMALL = 64
_PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132}  # multiprocessors of the largest device of each kind
CODE_NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
"""Dtypes of codes that are multiplied, with a short name."""


@dataclass(frozen=True)
class Config:
    """How a product is split.

    Attributes:
        rows, columns, depth: of a tile, in rows of activations, output channels and elements of K.
        splits: parts of K computed apart.
        warps: of 32 threads, per tile.
        stages: tiles under way at once.
        swapped: the weight is the left operand.
        library: PyTorch's own product instead; the rest is then not looked at.
    """

    rows: int = 0
    columns: int = 0
    depth: int = 0
    splits: int = 1
    warps: int = 4
    stages: int = 4
    swapped: bool = True
    library: bool = False

    @property
    def shared_bytes(self) -> int:
        """What tiles under way take, at most."""
        return self.stages * (self.rows + self.columns) * self.depth


@cache  # asked at every launch
def default_config(
    rows: int, outputs: int, width: int, codes: torch.dtype, capability: int, *, has_blocks: bool = False
) -> Config:
    """What is launched where nothing was tuned."""
    if rows > _SMALL:
        if _library_takes(outputs, width, codes, capability) and not has_blocks:
            return Config(library=True)
        return Config(64, 64, 32, 1, 4, 3, swapped=False) if width % 16 else _large(codes, capability)[0]
    tile = max(8, 1 << (rows - 1).bit_length())
    if width % 16:  # rows begin anywhere, and are read byte by byte: small tiles, or registers do not suffice
        return Config(tile, 64, 32, 1, 4, 3)
    depth = 128 if has_blocks or tile > 16 or width < 1024 else 256
    tiles, splits = -(-outputs // 64), 1
    processors = _PROCESSORS.get(capability, 132)
    while tiles * splits < 0.8 * processors and splits < 8 and width >= splits * 2 * 4 * depth:
        splits *= 2
    return _fitting(Config(tile, 64, depth, splits, 4, 4), capability)


def configs(
    rows: int, outputs: int, width: int, codes: torch.dtype, capability: int, *, has_blocks: bool = False
) -> tuple[Config, ...]:
    """What a search tries, the default first."""
    first = default_config(rows, outputs, width, codes, capability, has_blocks=has_blocks)
    if width % 16:
        return (first,)
    if rows > _SMALL:
        return tuple(dict.fromkeys((first, *_large(codes, capability))))
    tile = max(8, 1 << (rows - 1).bit_length())
    found = [
        _fitting(Config(tile, columns, depth, splits, 4, stages), capability)
        for columns, depth, stages in _tiles(tile, codes, capability)
        for splits in (1, 2, 4, 8)
        if (splits == 1 or width >= splits * 2 * depth) and (depth == 128 or not has_blocks)
    ]
    return tuple(dict.fromkeys((first, *found)))


def _tiles(rows: int, codes: torch.dtype, capability: int) -> tuple[tuple[int, int, int], ...]:
    """Columns, depth and stages that are tried; below 9.0 operands pass through registers, which must hold them."""
    if codes == torch.float8_e5m2:
        return ()
    if capability >= 90:
        return (64, 128, 4), (64, 128, 6), (64, 256, 4), (128, 128, 4)
    return ((64, 128, 4), (64, 256, 4), (128, 128, 4)) if rows <= 16 else ((64, 128, 4),)


def _fitting(config: Config, capability: int) -> Config:
    """With as many stages as the shared memory takes."""
    most = SHARED_MEMORY.get(capability, 99 * 1024)
    stages = min(config.stages, most // (config.shared_bytes // config.stages))
    return replace(config, stages=max(2, stages))


def _large(codes: torch.dtype, capability: int) -> tuple[Config, ...]:
    """Tiles for many rows."""
    if capability < 90:
        return (Config(64, 128 if codes == torch.int8 else 64, 64, 1, 4, 3, swapped=False),)
    found: tuple[Config, ...] = (
        Config(128, 128, 128, 1, 8, 3, swapped=False),
        Config(64, 128, 128, 1, 4, 4, swapped=False),
    )
    found = (Config(128, 256, 128, 1, 8, 3, swapped=False), *found) if codes == torch.int8 else found
    return tuple(_fitting(config, capability) for config in found)


def _library_takes(outputs: int, width: int, codes: torch.dtype, capability: int) -> bool:
    """Whether PyTorch multiplies such matrices on CUDA."""
    if codes == torch.int8:
        return outputs % 8 == 0 and width % 8 == 0
    return codes == torch.float8_e4m3fn and capability >= 89 and outputs % 16 == 0 and width % 16 == 0
