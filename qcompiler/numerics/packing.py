"""Codes as a dense stream of bits."""

import math

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes into a dense little-endian bit stream per row.

    Code ``i`` of a row occupies bits ``[i*bits, (i+1)*bits)``, least significant first; signed codes are stored in
    two's complement. At 4 bits that is ONNX's layout: the first element in the low nibble.

    Args:
        codes: int8 or uint8 ``[..., width]``.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., ceil(width * bits / 8)]``.
    """
    width = codes.shape[-1]
    count, size = _byte_period(bits)
    values: Tensor = codes.view(torch.uint8) & ((1 << bits) - 1)
    values = torch.nn.functional.pad(values, (0, -width % count)).unflatten(-1, (-1, count))
    packed = values.new_zeros(*values.shape[:-1], size)
    for i in range(count):
        byte, offset = divmod(i * bits, 8)
        packed[..., byte] |= values[..., i] << offset
        if offset + bits > 8:
            packed[..., byte + 1] |= values[..., i] >> (8 - offset)
    packed = packed.flatten(-2)
    return packed[..., : -(-width * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, width: int, *, signed: bool) -> Tensor:
    """The inverse of `pack_bits`: int8 (signed) or uint8 codes ``[..., width]``."""
    count, size = _byte_period(bits)
    stream = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size))
    values = packed.new_empty(*stream.shape[:-1], count)
    for i in range(count):
        byte, offset = divmod(i * bits, 8)
        values[..., i] = stream[..., byte] >> offset
        if offset + bits > 8:
            values[..., i] |= stream[..., byte + 1] << (8 - offset)
    values = values.flatten(-2)[..., :width]
    unused = 8 - bits
    values = values << unused  # drops the bits of the next code
    return (values.view(torch.int8) if signed else values) >> unused


def _byte_period(bits: int) -> tuple[int, int]:
    """How many codes fill whole bytes, and how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
