"""What a quantized weight is: codes with their scales (`Affine`), or places in tables of values (`Codebook`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import QuantSpec

__all__ = ["Affine", "Codebook", "Csr", "QuantizedTensor"]


@dataclass(frozen=True)
class Affine:
    """``(codes - zero_point) * scale``, one scale per tensor, output channel or group of input channels.

    Attributes:
        codes: int8 (symmetric), uint8 (asymmetric, 4-bit floats) or float8 ``[out, in]``, one code per element.
        scale: float32 ``[out or 1, groups]``, equal in the rows of a block; every value is exact in ``scale_dtype``, or
            the product of such a one and the factor.
        zero_point: uint8, the shape of ``scale``; None where symmetric.
        spec: the number format.
        scale_dtype: the dtype the scale is stored in.
        factor: 0-D float32, what stored scales are relative to; None where they are not (`QuantSpec.has_factor`).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    scale_dtype: torch.dtype
    factor: Tensor | None = None

    @classmethod
    def of(
        cls, weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> "Affine":
        """A weight rounded to the nearest codes under scales and zero points of one's choice.

        Args:
            weight: float ``[out, in]``, what the scales were chosen for.
            scale: as above.
            zero_point: as above.
            spec: as above.
            scale_dtype: as above.
        """
        codes = numerics.quantize(weight, scale, zero_point, spec)
        return cls(codes, scale, zero_point, spec, scale_dtype, numerics.scale_factor(weight, spec))

    def split(self, rows: Sequence[int]) -> list["Affine"]:
        """Matrices of so many rows each, with what scales the whole tensor in common."""
        if self.spec.granularity == "per_tensor":
            return [replace(self, codes=codes.clone()) for codes in self.codes.split(list(rows))]
        parts = (self.codes.split(list(rows)), self.scale.split(list(rows)))
        return [replace(self, codes=codes.clone(), scale=scale.clone()) for codes, scale in zip(*parts, strict=True)]

    @property
    def stored_scale(self) -> Tensor:
        """Scales as they are stored, one per row of blocks; those of ``float8_e8m0fnu`` as their bytes, uint8."""
        if self.spec.granularity == "per_block":
            return self.scale[:: self.spec.group_size].to(self.scale_dtype)
        if self.scale_dtype == torch.float8_e8m0fnu:
            return (torch.frexp(self.scale)[1] + 126).to(torch.uint8)
        return (self.scale if self.factor is None else self.scale / self.factor).to(self.scale_dtype)

    def dequantize(self) -> Tensor:
        """float32 ``[out, in]``."""
        return numerics.dequantize(self.codes, self.scale, self.zero_point, self.spec)

    @property
    def stored_bits(self) -> int:
        """Bits of packed codes, scales and zero points (a file rounds each row of codes up to whole bytes)."""
        bits = self.codes.numel() * self.spec.bits + self.stored_scale.numel() * self.scale_dtype.itemsize * 8
        bits += 0 if self.factor is None else 32
        return bits + (0 if self.zero_point is None else self.zero_point.numel() * self.spec.bits)


@dataclass(frozen=True)
class Csr:
    """A sparse matrix in compressed rows, ``n`` numbers of ``[out, in]``.

    Attributes:
        values: float ``[n]``, row by row, in the dtype they are stored in.
        columns: int32 ``[n]``, ascending within a row.
        row_offsets: int32 ``[out + 1]``: where each row begins in the other two, and the end of the last.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor

    @property
    def stored_bits(self) -> int:
        """Bits of the three tensors."""
        return sum(8 * t.numel() * t.element_size() for t in (self.values, self.columns, self.row_offsets))


@dataclass(frozen=True)
class Codebook:
    """``table[row, codes[row, column]]``, and a sparse matrix added to it: a few weights that are kept more exactly.

    Attributes:
        codes: uint8 ``[out, in]``, one code per element.
        table: ``[out, 2^bits]``, ascending within a row, in the dtype it is stored in.
        sparse: what is added; None for nothing.
        spec: the number format.
    """

    codes: Tensor
    table: Tensor
    sparse: Csr | None
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """float32 ``[out, in]``."""
        dense: Tensor = torch.ops.qcompiler.codebook_dequantize(self.codes, self.table.float())
        if self.sparse is None:
            return dense
        parts = (self.sparse.values.float(), self.sparse.columns, self.sparse.row_offsets)
        added: Tensor = torch.ops.qcompiler.sparse_add(dense, *parts)
        return added

    @property
    def stored_bits(self) -> int:
        """Bits of packed codes, tables and sparse matrix (a file rounds each row of codes up to whole bytes)."""
        bits = self.codes.numel() * self.spec.bits + 8 * self.table.numel() * self.table.element_size()
        return bits + (0 if self.sparse is None else self.sparse.stored_bits)


QuantizedTensor = Affine | Codebook
