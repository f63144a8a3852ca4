"""How weight-only kernels are launched: variants, defaults by shape, and what a search tries.

The kernel comes in variants:

* rows of activations as rows of the product, or ``swap``: ``out^T = W x^T``, for few rows, since the smaller side of a
  tensor-core instruction is 8, the other 16;
* scales applied to the product of a group, in float32, so that codes stay exact; or ``prescale``: to the weights, for
  many rows, where a second set of accumulators does not fit the registers;
* ``split`` over input channels where the output alone does not fill the device: partial sums in float32, added up in
  order by a second kernel, so that results do not depend on timing.

For many rows the weight is written out once, dequantized, and the matrix product is PyTorch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcompiler.lowering.kernels.weight_only_layout import Layout

__all__ = ["SPLITS", "Config", "configs", "default_config", "default_shapes", "is_hopper", "shapes_for"]

_IN_FLIGHT = 40 << 10  # bytes that each multiprocessor asks for ahead: bandwidth times latency, and some more
SPLITS = (1, 2, 4, 8, 16)
"""Into how many pieces input channels may be split."""
_TILES_PER_PIECE = 4  # at least, so that there is something to pipeline


@dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Attributes:
        rows: of activations in a block; 0: the weight is dequantized for PyTorch's matrix product.
        out: output channels in a block.
        split: pieces of the input channels, each in a block of its own.
        swap: compute the transpose.
        prescale: multiply scales into weights, not into products.
        warps, stages: of a block.
    """

    rows: int
    out: int = 128
    split: int = 1
    swap: bool = False
    prescale: bool = False
    warps: int = 4
    stages: int = 4


_DEQUANTIZED = Config(0)
_FEW = Config(8, 64, swap=True, warps=2)
_SIXTEEN = Config(16, 64, swap=True, warps=2)
_HOPPER = (_FEW, _SIXTEEN, Config(64, prescale=True, stages=3), Config(128, prescale=True, stages=3))
"""By rows, for devices with products of 64 rows that read shared memory themselves (``wgmma``)."""
_AMPERE = (_FEW, _SIXTEEN, Config(32, swap=True), Config(64, swap=True, prescale=True, stages=3))
"""By rows, for all others."""
_FUSED_ROWS = {True: 384, False: 128}
"""By whether `_HOPPER`: beyond, unpacking for every block of rows costs more than writing the weight once."""
_ALTERNATIVES = (
    Config(4, swap=True),
    replace(_FEW, stages=6),
    replace(_SIXTEEN, stages=6),
    Config(16),
    Config(16, 256, warps=8, stages=3),
)
"""What else a search tries, where the rows fit."""


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
    if rows > _FUSED_ROWS[is_hopper(capability)]:
        return _DEQUANTIZED
    shapes = default_shapes(capability)
    config = next((shape for shape in shapes if shape.rows >= rows), shapes[-1])
    layout = Layout.of(bits, width, width)
    blocks = -(-out // config.out) * -(-rows // config.rows)
    ahead = (config.stages - 1) * config.out * layout.tile_bytes
    wanted = processors * (max(1.0, _IN_FLIGHT / ahead) if config.rows <= 64 else 1.0)
    split = 1
    while blocks * split < 0.75 * wanted and 2 * split in _splits(layout.tiles(width)):
        split *= 2
    return replace(config, split=split)


def configs(
    rows: int, out: int, width: int, bits: int, *, capability: int = 90, processors: int = 132
) -> Sequence[Config]:
    """The search space for a shape, the default first; arguments as in `default_config`."""
    default = default_config(rows, out, width, bits, capability=capability, processors=processors)
    shapes = [shape for shape in shapes_for(capability) if rows <= shape.rows <= max(16, 4 * rows)]
    shapes += [default_shapes(capability)[-1]]
    tiles = Layout.of(bits, width, width).tiles(width)
    space = [replace(shape, split=split) for shape in dict.fromkeys(shapes) for split in _splits(tiles)]
    return list(dict.fromkeys([default, *space, *([_DEQUANTIZED] if rows > 16 else [])]))


def default_shapes(capability: int) -> tuple[Config, ...]:
    """What `default_config` chooses from, by rows."""
    return _HOPPER if is_hopper(capability) else _AMPERE


def shapes_for(capability: int) -> tuple[Config, ...]:
    """Every configuration that may be launched on a device, but for the split."""
    return default_shapes(capability) + _ALTERNATIVES


def is_hopper(capability: int) -> bool:
    """Whether a device has ``wgmma``."""
    return 90 <= capability < 100


def _splits(tiles: int) -> list[int]:
    """Those of `SPLITS` that leave enough tiles."""
    return [s for s in SPLITS if s == 1 or tiles >= _TILES_PER_PIECE * s]
