"""How the fused kernels store low-bit weights: tiles of input channels, in the order registers are filled.

A weight ``[out, in]`` becomes uint8 ``[tiles, out, tile_bytes]``. The bytes of one tile of all output channels lie
together, so that a thread block reads one contiguous piece of memory per step. Codes are unsigned: symmetric ones have
half their number, ``2^bits / 2``, added. Within a tile, byte ``j`` holds one code of each *part*, consecutive input
channels, so that unpacking a tile of bytes gives whole tiles of weights and moves nothing between threads:

| bits | part | parts | tile | byte ``j``, from the lowest bit |
|---|---|---|---|---|
| 8 | 32, 64, 128 | 1 | 32, 64, 128 | ``w[j]`` |
| 4 | 32, 64 | 2 | 64, 128 | ``w[j]``, ``w[part + j]`` |
| 2 | 32 | 4 | 128 | ``w[j]``, ``w[32 + j]``, ``w[64 + j]``, ``w[96 + j]`` |
| 3 | 32 | 8 | 256 | two low bits of parts 0-3 (bytes 0-31) and 4-7 (32-63) as for 2 bits; the third bit of
parts 0, 4, 1, 5, 2, 6, 3, 7 (64-95) |

A part never reaches over the border of two groups. The end of the last tile is filled with the code of zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]

_SMALLEST_PART = 32


@dataclass(frozen=True)
class Layout:
    """The order of codes in memory.

    Attributes:
        bits: of one code: 2, 3, 4 or 8.
        part: consecutive input channels that are unpacked together.
    """

    bits: int
    part: int

    @staticmethod
    def fits(group: int, width: int) -> bool:
        """Whether weights whose scales are shared by ``group`` of ``width`` input channels can be stored so."""
        return group >= width or group % _SMALLEST_PART == 0

    @classmethod
    def of(cls, bits: int, group: int, width: int) -> "Layout":
        """The layout of a weight: parts as long as its groups and bits allow."""
        largest = {8: 128, 4: 64, 3: 32, 2: 32}[bits]
        if group < width:
            while group % largest:
                largest //= 2
        return cls(bits, largest)

    @property
    def parts(self) -> int:
        """Parts in a tile."""
        return 8 if self.bits == 3 else 8 // self.bits

    @property
    def tile(self) -> int:
        """Input channels in a tile."""
        return self.part * self.parts

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile of one output channel."""
        return self.tile * self.bits // 8

    def tiles(self, width: int) -> int:
        """Tiles that ``width`` input channels take."""
        return -(-width // self.tile)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes in the order of this layout.

        Args:
            codes: uint8 ``[out, in]``, each smaller than ``2^bits``.

        Returns:
            uint8 ``[tiles, out, tile_bytes]``.
        """
        out, width = codes.shape
        missing = self.tiles(width) * self.tile - width
        zero = 1 << (self.bits - 1)
        parts = torch.nn.functional.pad(codes, (0, missing), value=zero).reshape(out, -1, self.parts, self.part)
        packed = torch.empty(parts.shape[1], out, self.tile_bytes, dtype=torch.uint8, device=codes.device)
        if self.bits == 3:
            for half in range(2):
                packed[..., 32 * half : 32 * half + 32] = _merge(parts[:, :, 4 * half : 4 * half + 4] & 3, 2)
            packed[..., 64:] = _merge(parts[:, :, [0, 4, 1, 5, 2, 6, 3, 7]] >> 2, 1)
        else:
            packed.copy_(_merge(parts, self.bits))
        return packed

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """The inverse of `pack`: uint8 ``[out, width]``."""
        if self.bits == 3:
            low = torch.cat([_split(packed[..., 32 * half : 32 * half + 32], 2) for half in range(2)], dim=2)
            parts = low | (_split(packed[..., 64:], 1)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]] << 2)
        else:
            parts = _split(packed, self.bits)
        return parts.reshape(packed.shape[1], -1)[:, :width]


def _merge(parts: Tensor, bits: int) -> Tensor:
    """``[out, tiles, 8 / bits, part]``, the first in the lowest bits → ``[tiles, out, part]``."""
    merged = parts[:, :, 0].clone()
    for i in range(1, parts.shape[2]):
        merged |= parts[:, :, i] << (bits * i)
    return merged.transpose(0, 1)


def _split(packed: Tensor, bits: int) -> Tensor:
    """``[tiles, out, part]`` → ``[out, tiles, 8 / bits, part]``."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=2).transpose(0, 1)
