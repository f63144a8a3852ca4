"""Initializers on disk: shape and dtype tell their place in the data file; their bytes are produced while writing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.errors import TargetError, VerificationError
from qcompiler.numerics import pack_bits

__all__ = ["DATA_FILE", "Chunks", "DataFile", "code_chunks", "float_chunks", "stored_bytes"]

DATA_FILE = "model.onnx.data"

_ALIGNMENT = 64  # bytes: a cache line, so that kernels read mapped weights aligned
_CHUNK_ELEMENTS = 1 << 22

Chunks = Callable[[], Iterator[Tensor]]
"""Gives the bytes of a tensor as a run of contiguous CPU tensors."""


@dataclass(frozen=True)
class _Entry:
    name: str
    offset: int
    length: int
    chunks: Chunks


class DataFile:
    """Lays tensors out one after the other, then writes them in that order with one chunk in memory at a time."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._end = 0

    def add(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], chunks: Chunks) -> ir.ExternalTensor:
        """Reserves room for a tensor.

        Args:
            name: of the initializer.
            dtype: as stored.
            shape: as stored.
            chunks: called at `write`; yields contiguous CPU tensors whose bytes, in order, are the stored bytes.
        """
        offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        length = stored_bytes(dtype, shape)
        self._entries.append(_Entry(name, offset, length, chunks))
        self._end = offset + length
        return ir.ExternalTensor(DATA_FILE, offset, length, dtype, shape=ir.Shape(shape), name=name)

    @staticmethod
    def again(tensor: ir.ExternalTensor, name: str, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """The bytes of a tensor that has room already, in another shape."""
        place = (DATA_FILE, tensor.offset, tensor.length, tensor.dtype)
        return ir.ExternalTensor(*place, shape=ir.Shape(shape), name=name)

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self._end

    def write(self, write: Callable[[memoryview], None]) -> None:
        """Produces the file's contents.

        Args:
            write: appends bytes to the file.

        Raises:
            VerificationError: if a tensor yields more or fewer bytes than its shape says.
        """
        position = 0
        for entry in self._entries:
            write(memoryview(bytes(entry.offset - position)))
            written = 0
            for chunk in entry.chunks():
                view = chunk.view(torch.uint8).numpy().data.cast("B")
                write(view)
                written += len(view)
            if written != entry.length:
                raise VerificationError(
                    "a weight does not have the size its shape says",
                    where=entry.name,
                    got=f"{written} bytes",
                    expected=f"{entry.length} bytes",
                )
            position = entry.offset + entry.length


def stored_bytes(dtype: ir.DataType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in ONNX's layout; sub-byte elements are packed over the whole tensor."""
    elements = 1
    for size in shape:
        elements *= size
    return -(-elements * dtype.bitwidth // 8)


def _rows_per_chunk(width: int) -> int:
    return max(8, _CHUNK_ELEMENTS // max(width, 1) // 8 * 8)  # a multiple of 8 keeps sub-byte chunks on byte borders


def _row_chunks(tensor: Tensor, *, transpose: bool) -> Iterator[Tensor]:
    """Strips of whole rows of ``tensor`` (or of its transpose), each a small contiguous vector."""
    if tensor.dim() < 2:
        yield tensor.reshape(-1).contiguous()
        return
    matrix = tensor.reshape(-1, tensor.shape[-1])
    length, width = matrix.shape[::-1] if transpose else matrix.shape
    rows = _rows_per_chunk(width)
    for start in range(0, length, rows):
        if transpose:  # copied before it is turned: torch transposes a whole matrix several times faster than a view
            yield matrix[:, start : start + rows].contiguous().t().reshape(-1)
        else:
            yield matrix[start : start + rows].reshape(-1)


def float_chunks(read: Callable[[], Tensor], dtype: torch.dtype, name: str, *, transpose: bool = False) -> Chunks:
    """The bytes of a float tensor, converted to ``dtype`` strip by strip.

    Raises (while writing):
        TargetError: if a finite value becomes infinite in ``dtype``, or a positive scale zero.
    """

    def chunks() -> Iterator[Tensor]:
        for strip in _row_chunks(read(), transpose=transpose):
            converted = strip.to(dtype)
            if converted.dtype != strip.dtype and dtype == torch.float16:
                _check_range(strip, converted, name)
            yield converted

    return chunks


def _check_range(before: Tensor, after: Tensor, name: str) -> None:
    overflow = bool((after.isinf() & before.isfinite()).any())
    if overflow or (name.endswith("_scale") and bool((after == 0).any())):
        raise TargetError(
            "a value does not fit float16",
            where=name,
            got=f"magnitude {before.abs().max().item():.3g}" if overflow else f"scale {before.min().item():.3g}",
            expected="magnitudes between 6e-8 and 65504",
            remedy="lower with float_dtype='float32'",
        )


def code_chunks(read: Callable[[], Tensor], dtype: ir.DataType, *, transpose: bool) -> Chunks:
    """The bytes of integer codes; those narrower than a byte are packed in row-major order, low bits first.

    Signed codes of 8 bits that are stored as unsigned ones are moved by 128; unsigned ones that are stored as signed
    ones, by half of what the dtype holds.
    """

    def chunks() -> Iterator[Tensor]:
        for strip in _row_chunks(read(), transpose=transpose):
            if dtype == ir.DataType.UINT8 and strip.dtype == torch.int8:
                strip = strip.view(torch.uint8) ^ 128
            elif dtype == ir.DataType.INT8 and strip.dtype == torch.uint8:
                strip = (strip ^ 128).view(torch.int8)
            elif dtype == ir.DataType.INT4 and strip.dtype == torch.uint8:
                strip = strip ^ 8
            yield pack_bits(strip.reshape(1, -1), dtype.bitwidth) if dtype.bitwidth < 8 else strip

    return chunks
