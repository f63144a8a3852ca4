"""How weight-only kernels are launched: variants, defaults by shape, and what a search tries.

Two kernels of several variants unpack codes in registers:

* up to 16 rows of activations, ``depth``: each warp of a block takes other input channels of the same output channels,
  which fills the device with warps without splitting the work over blocks; computes the transpose;
* rows of activations as rows of the product, or ``swap``: ``out^T = W x^T``, since the smaller side of a tensor-core
  instruction is 8, the other 16;
* scales applied to the product of a group, in float32, so that codes stay exact; or ``prescale``: to the weights, for
  many rows, where a second set of accumulators does not fit the registers;
* ``split`` over input channels where the output alone does not fill the device: partial sums in float32, added up in
  order by another kernel, so that results do not depend on timing.

For many rows the weight is written out once, dequantized, and the matrix product is PyTorch's. No default has been
measured on a device: they follow from bytes in flight, warps per multiprocessor, and instructions per weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from qcompiler.lowering.kernels.launch.machine_code import SHARED_MEMORY
from qcompiler.lowering.kernels.weight_only.layout import Layout

__all__ = ["SPLITS", "Config", "configs", "default_config", "fits", "is_default", "is_hopper", "shapes_for"]

SPLITS = (1, 2, 4, 8, 16)
"""Into how many pieces input channels may be split."""
_IN_FLIGHT = 40 << 10  # bytes that each multiprocessor asks for ahead: bandwidth times latency, and some more
_TILES_PER_PIECE = 4  # at least, so that there is something to pipeline
_SMALLEST_SHARED_MEMORY = min(SHARED_MEMORY.values())
_SPARE = 2 << 10  # bytes of shared memory beside tiles: scales on their way between threads


@dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Attributes:
        rows: of activations in a block; 0: the weight is dequantized for PyTorch's matrix product.
        out: output channels in a block.
        split: pieces of the input channels, each in a block of its own.
        depth: tiles of input channels that a block works on at once, one for each warp; 0: the other kernel.
        swap: compute the transpose.
        prescale: multiply scales into weights, not into products.
        warps, stages: of a block.
    """

    rows: int
    out: int = 128
    split: int = 1
    depth: int = 0
    swap: bool = False
    prescale: bool = False
    warps: int = 4
    stages: int = 4


_DEQUANTIZED = Config(0)
_FEW_ROWS = (
    *(Config(rows, 32, depth=depth, warps=depth) for rows in (4, 8) for depth in (4, 8)),
    *(Config(16, out, depth=depth, warps=depth, stages=3) for out in (32, 64) for depth in (4, 8)),
)
_HOPPER = (Config(64, prescale=True, stages=3), Config(128, prescale=True, stages=3))
"""For more rows on devices with products of 64 rows that read shared memory themselves (``wgmma``)."""
_AMPERE = (Config(32, swap=True, prescale=True), Config(64, swap=True, prescale=True, stages=3))
"""For more rows on all others."""
_ALTERNATIVES = (
    Config(8, 64, swap=True, warps=2),
    Config(16, 64, swap=True, warps=2),
    Config(16),
    Config(16, 256, warps=8, stages=3),
)
"""What else a search tries."""
_FUSED_BLOCKS = {True: 3, False: 2}
"""By `is_hopper`: with more blocks of rows, unpacking for each costs more than writing the weight once."""


@cache  # asked at every launch
def default_config(
    rows: int, out: int, width: int, bits: int, *, capability: int = 90, processors: int = 132
) -> Config:
    """What to launch where no search was run.

    Args:
        rows: of activations.
        out: output channels.
        width: input channels.
        bits: of a code.
        capability: of the device.
        processors: multiprocessors of the device.
    """
    layout = Layout.of(bits, width, width)
    if rows <= 16:
        config = next(c for c in _preferred(rows, out, processors) if fits(c, layout, capability))
        wanted = processors / 4  # a block has all the warps and bytes in flight that a multiprocessor needs
    else:
        shapes = [shape for shape in _many_rows(capability) if fits(shape, layout, capability)]
        if rows > _FUSED_BLOCKS[is_hopper(capability)] * shapes[-1].rows:
            return _DEQUANTIZED
        config = next((shape for shape in shapes if shape.rows >= rows), shapes[-1])
        ahead = (config.stages - 1) * config.out * layout.tile_bytes
        wanted = 0.75 * processors * (max(1.0, _IN_FLIGHT / ahead) if config.rows <= 64 else 1.0)
    blocks = -(-out // config.out) * -(-rows // config.rows)
    split = 1
    while blocks * split < wanted and 2 * split in _splits(layout.tiles(width), config):
        split *= 2
    return replace(config, split=split)


def _preferred(rows: int, out: int, processors: int) -> list[Config]:
    """Configurations for up to 16 rows, the best first; the last fits any device."""
    few = [config for config in _FEW_ROWS if rows <= config.rows <= max(4, 2 * (rows - 1))]
    if rows > 8:
        # Every block reads all activations: wide blocks, unless that leaves half of the multiprocessors idle.
        wide = 2 * -(-out // 64) > processors
        few.sort(key=lambda config: (config.out == 64) != wide)
    blocks = -(-out // few[0].out)
    deep = blocks <= processors * (2 if rows <= 8 else 1)
    return sorted(few, key=lambda config: ((config.out != few[0].out), (config.depth == 8) != deep))


def configs(
    rows: int, out: int, width: int, bits: int, *, capability: int = 90, processors: int = 132
) -> Sequence[Config]:
    """The search space for a shape, the default first; arguments as in `default_config`."""
    default = default_config(rows, out, width, bits, capability=capability, processors=processors)
    layout = Layout.of(bits, width, width)
    shapes = [shape for shape in shapes_for(capability) if rows <= shape.rows <= max(16, 4 * rows)]
    shapes += [_many_rows(capability)[-1]] if rows > 16 else []
    space = [
        replace(shape, split=split)
        for shape in dict.fromkeys(shapes)
        if fits(shape, layout, capability)
        for split in _splits(layout.tiles(width), shape)
    ]
    return list(dict.fromkeys([default, *space, *([_DEQUANTIZED] if rows > 16 else [])]))


def shapes_for(capability: int) -> tuple[Config, ...]:
    """Every configuration that may be launched on a device, but for the split; those of a search come last."""
    return _FEW_ROWS + _many_rows(capability) + _ALTERNATIVES


def is_default(config: Config) -> bool:
    """Whether a configuration, but for the split, is one that `default_config` may give."""
    return config not in _ALTERNATIVES


def fits(config: Config, layout: Layout, capability: int) -> bool:
    """Whether the tiles that are under way fit a block's shared memory, and what is unpacked its registers."""
    if layout.bits == 3 and config.depth and config.rows * config.out > 16 * 32:
        return False  # eight parts at once, and as many scales: spills
    step = max(1, config.depth) * (2 * config.rows * layout.tile + config.out * layout.tile_bytes)
    needed = (config.stages - 1) * step + _SPARE
    if is_hopper(capability) and config.rows >= 64:  # products read both operands from there
        needed += step + 2 * config.out * layout.tile
    return needed <= SHARED_MEMORY.get(capability, _SMALLEST_SHARED_MEMORY)


def is_hopper(capability: int) -> bool:
    """Whether a device has ``wgmma``."""
    return 90 <= capability < 100


def _many_rows(capability: int) -> tuple[Config, ...]:
    return _HOPPER if is_hopper(capability) else _AMPERE


def _splits(tiles: int, config: Config) -> list[int]:
    """Those of `SPLITS` that leave enough tiles."""
    return [s for s in SPLITS if s == 1 or tiles >= _TILES_PER_PIECE * max(1, config.depth) * s]
