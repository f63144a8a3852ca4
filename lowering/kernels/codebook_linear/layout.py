"""How codebook weights are stored: re-ordered when a layer is built, so that byte permutes are all a lookup takes.

* `pack_codes`: bytes ``[rows / 16, columns / 256, bits, 16, 32]``, rounded up, so that a block of 256 columns of 16
  rows is contiguous. Column ``32 t + e`` of a block (tile ``t`` of 8, element ``e`` of 32) has its code in byte ``e``
  of its row: of four groups of such bytes, group ``t // 2`` has the codes of tiles ``t`` and ``t + 1`` in its nibbles.
  With four bits, the groups are the planes that are stored. With three, bits 0 to 2 and 4 to 6 of the three planes are
  three groups, and bits 3 and 7 of plane ``p`` are bit ``p`` of the fourth group's nibbles. With two, plane ``p``
  holds groups ``2p`` and, shifted left by two, ``2p + 1``.
* `pack_table`: planes of bytes. A table of ``2^b`` values of two bytes each is ``2^b / 4`` words of low bytes, then as
  many of high bytes; ``[words, rows]``, so that a word of neighbouring rows lies together.

Padding reads entry 0 of a table, and meets inputs that are taken as zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.errors import InputError

__all__ = [
    "BITS",
    "COLUMNS_PER_BLOCK",
    "ELEMENTS",
    "ROWS_PER_BLOCK",
    "pack_codes",
    "pack_table",
    "selectors",
    "unpack_codes",
    "unpack_table",
]

BITS = (2, 3, 4)
ROWS_PER_BLOCK = 16
COLUMNS_PER_BLOCK = 256
ELEMENTS = 32

_GROUPS = 4


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in the layout of the kernel; rows and columns that are missing from the last block have code 0.

    Args:
        codes: uint8 ``[out, in]``, below ``2^bits``.
        bits: 2, 3 or 4.

    Returns:
        uint8 ``[ceil(out / 16), ceil(in / 256), bits, 16, 32]``.

    Raises:
        InputError: for anything else.
    """
    if bits not in BITS:
        raise InputError("no codebook has so many bits", got=bits, expected="2, 3 or 4")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise InputError("codes are a matrix of bytes", got=f"{codes.dtype} {list(codes.shape)}", expected="uint8")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise InputError("a code beyond its table", got=int(codes.max()), expected=f"below {1 << bits}")
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % COLUMNS_PER_BLOCK, 0, -rows % ROWS_PER_BLOCK))
    shape = (padded.shape[0] // ROWS_PER_BLOCK, ROWS_PER_BLOCK, -1, _GROUPS, 2, ELEMENTS)
    nibbles = padded.reshape(shape).permute(0, 2, 3, 1, 4, 5)  # [blocks, blocks, groups, 16, 2, 32]
    groups = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).contiguous()
    if bits == 4:
        return groups
    if bits == 3:
        fourth = groups[:, :, 3:]
        places = torch.arange(3, dtype=torch.uint8, device=codes.device).view(1, 1, 3, 1, 1)
        return groups[:, :, :3] | (fourth >> places & 0x11) << 3
    return groups[:, :, 0::2] | groups[:, :, 1::2] << 2


def selectors(packed: Tensor) -> Tensor:
    """The four groups of bytes, two codes in each: uint8 ``[out / 16, in / 256, 4, 16, 32]``."""
    bits = packed.shape[2]
    if bits == 4:
        return packed
    if bits == 2:
        return torch.stack((packed & 0x33, packed >> 2 & 0x33), 3).flatten(2, 3)
    left = packed >> 3 & 0x11
    fourth = left[:, :, 0] | left[:, :, 1] << 1 | left[:, :, 2] << 2
    return torch.cat((packed & 0x77, fourth[:, :, None]), 2)


def unpack_codes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 ``[rows, columns]``."""
    groups = selectors(packed)
    codes = torch.stack((groups & 15, groups >> 4), 4)  # [blocks, blocks, groups, 16, 2, 32]
    padded = codes.permute(0, 3, 1, 2, 4, 5).reshape(packed.shape[0] * ROWS_PER_BLOCK, -1)
    return padded[:rows, :columns]


def pack_table(table: Tensor) -> Tensor:
    """Tables as planes of bytes.

    Args:
        table: ``[out, 2^bits]`` of two or four bytes each.

    Returns:
        int32 ``[bytes per value * 2^bits / 4, ceil(out / 16) * 16]``: words of the lowest bytes first.
    """
    rows, levels = table.shape
    padded = F.pad(table, (0, 0, 0, -rows % ROWS_PER_BLOCK)).contiguous()
    split = padded.view(torch.uint8).view(-1, levels // 4, 4, table.element_size())
    return split.permute(3, 1, 0, 2).contiguous().view(torch.int32).flatten(0, 1).squeeze(-1)


def unpack_table(packed: Tensor, bits: int, dtype: torch.dtype, rows: int) -> Tensor:
    """The inverse of `pack_table`: ``[rows, 2^bits]`` of ``dtype``."""
    words = (1 << bits) // 4
    split = packed.view(dtype.itemsize, words, packed.shape[1], 1).view(torch.uint8)
    together = split.permute(2, 1, 3, 0).contiguous()  # [rows, words, 4, bytes]
    return together.view(dtype).reshape(packed.shape[1], 1 << bits)[:rows]
