"""Blocks of GGUF: 32 weights along a row, their scale ahead of their codes.

Of nibbles, element i has the low half of byte i, element i + 16 the high half. Source: ``gguf.quants`` 0.19.
"""

import torch
from torch import Tensor

__all__ = ["BLOCK", "mxfp4", "q4_0", "q4_1", "q8_0"]

BLOCK = 32
"""Weights in a block."""


def q8_0(codes: Tensor, scale: Tensor) -> Tensor:
    """``w = code * scale``.

    Args:
        codes: int8 ``[rows, columns]``.
        scale: float16 ``[rows, columns / 32]``.

    Returns:
        uint8 ``[rows, columns / 32 * 34]``.
    """
    return _joined(_bytes(scale), _blocks(codes.view(torch.uint8)))


def q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """``w = (nibble - 8) * scale``; as `q8_0`, with int8 codes from -8 to 7 and 18 bytes to a block."""
    return _joined(_bytes(scale), _nibbles((codes + 8).view(torch.uint8)))


def q4_1(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """``w = nibble * scale + minimum``; as `q8_0`, with uint8 codes from 0 to 15 and 20 bytes to a block."""
    return _joined(_bytes(scale), _bytes(minimum), _nibbles(codes))


def mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """4-bit floats with a power of two.

    Args:
        codes: uint8 ``[rows, columns]``, 0 to 15.
        scale: uint8 ``[rows, columns / 32]``, E8M0.

    Returns:
        uint8 ``[rows, columns / 32 * 17]``.
    """
    return _joined(scale[..., None], _nibbles(codes))


def _blocks(values: Tensor) -> Tensor:
    return values.reshape(*values.shape[:-1], -1, BLOCK)


def _bytes(halves: Tensor) -> Tensor:
    return halves.contiguous()[..., None].view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    low, high = _blocks(codes).chunk(2, dim=-1)
    return low | (high << 4)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1).flatten(-2)
