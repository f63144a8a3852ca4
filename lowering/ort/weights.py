"""Codes, scales and zero points as ONNX Runtime's own operators take them: packed along the input channels.

Source: the schemas of MatMulNBits and GatherBlockQuantized, com.microsoft opset 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.lowering.onnx.dtypes import TORCH
from qcompiler.lowering.onnx.emitter import Emitter
from qcompiler.lowering.onnx.storage import float_chunks
from qcompiler.numerics import pack_bits

__all__ = ["Blocked", "biases_of", "codes_of", "scales_of", "zero_points_of"]

_UINT8 = ir.DataType.UINT8
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Blocked:
    """Stored tensors of one matrix, and how they are written.

    Attributes:
        codes, scale, zero_point: as the store has them.
        group: channels that share a scale there; 0, or the whole width: one for a row, or for all.
        block: channels that share one in what is written; divides ``group``.
        bits: of a code there.
        rows, width: of the matrix.
    """

    codes: str
    scale: str
    zero_point: str | None
    group: int
    block: int
    bits: int
    rows: int
    width: int

    @classmethod
    def of(
        cls, e: Emitter, codes: fx.Node, scale: fx.Node, zero: fx.Node | None, *, group: int, block: int, bits: int
    ) -> "Blocked":
        """Of the nodes that read them."""
        names = [None if node is None else e.weight_name(node) for node in (codes, scale, zero)]
        rows, width = e.graph.weights.info(str(codes.target)).shape
        assert names[0] is not None
        assert names[1] is not None
        return cls(names[0], names[1], names[2], group, block, bits, rows, width)

    @property
    def blocks(self) -> int:
        """In a row, the last of them possibly short."""
        return -(-self.width // self.block)


def codes_of(e: Emitter, parts: Sequence[Blocked], *, flat: bool = False) -> ir.Value:
    """uint8 ``[rows, blocks, block · bits / 8]``, or ``flat`` with one axis for both; matrices one below another."""
    one = parts[0]
    read = e.graph.weights.read

    def chunks() -> Iterator[Tensor]:
        for part in parts:
            codes = _unsigned(read(part.codes), part.bits)
            padding = part.blocks * part.block - part.width
            step = max(1, _CHUNK // part.width)
            for start in range(0, part.rows, step):
                strip = codes[start : start + step]
                if padding:
                    strip = torch.nn.functional.pad(strip, (0, padding), value=1 << (part.bits - 1))
                yield (pack_bits(strip, part.bits) if part.bits < 8 else strip).reshape(-1)

    bytes_of_block = one.block * one.bits // 8
    rows = sum(part.rows for part in parts)
    shape = (rows, one.blocks * bytes_of_block) if flat else (rows, one.blocks, bytes_of_block)
    return e.computed(_named(parts, "codes", f"{one.bits}x{one.block}"), _UINT8, shape, chunks)


def scales_of(e: Emitter, parts: Sequence[Blocked], dtype: ir.DataType) -> ir.Value:
    """``[rows, blocks]``."""
    read = e.graph.weights.read

    def whole() -> Tensor:
        return torch.cat([_by_block(read(part.scale).float(), part) for part in parts])

    shape = (sum(part.rows for part in parts), parts[0].blocks)
    name = _named(parts, "scale", str(parts[0].block))
    return e.computed(name, dtype, shape, float_chunks(whole, TORCH[dtype], parts[0].scale))


def zero_points_of(e: Emitter, parts: Sequence[Blocked]) -> ir.Value | None:
    """uint8 ``[rows, bytes]``, packed like codes; None where all codes are signed and relative to 0."""
    one = parts[0]
    read, info = e.graph.weights.read, e.graph.weights.info
    if all(part.zero_point is None and not info(part.codes).dtype.startswith("u") for part in parts):
        return None
    middle = 1 << (one.bits - 1)

    def chunks() -> Iterator[Tensor]:
        for part in parts:
            if part.zero_point is None:
                level = 0 if info(part.codes).dtype.startswith("u") else middle
                zero = torch.full((part.rows, part.blocks), level, dtype=torch.uint8)
            else:
                zero = _by_block(_unsigned(read(part.zero_point), part.bits), part)
            yield (pack_bits(zero, part.bits) if part.bits < 8 else zero).reshape(-1)

    shape = (sum(part.rows for part in parts), -(-one.blocks * one.bits // 8))
    return e.computed(_named(parts, "zero_point", f"{one.bits}x{one.block}"), _UINT8, shape, chunks)


def biases_of(e: Emitter, rows: Sequence[int], biases: Sequence[fx.Node | None], dtype: ir.DataType) -> ir.Value | None:
    """``[rows]`` of layers side by side, zeros for those without; None where no layer has one."""
    if all(bias is None for bias in biases):
        return None
    names = [None if bias is None else e.weight_name(bias) for bias in biases]
    read = e.graph.weights.read

    def whole() -> Tensor:
        pairs = zip(names, rows, strict=True)
        return torch.cat([torch.zeros(count) if name is None else read(name).float() for name, count in pairs])

    label = "+".join(str(name) for name in names)
    return e.computed(f"{label}/bias", dtype, (sum(rows),), float_chunks(whole, TORCH[dtype], label))


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes moved by half of what is stored holds; unsigned ones as they are."""
    return codes if codes.dtype == torch.uint8 else (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _by_block(values: Tensor, part: Blocked) -> Tensor:
    """``[rows, blocks]`` of one value for all, one for a row, or ``[rows, groups]``."""
    if math.prod(values.shape) == 1:
        return values.reshape(1, 1).expand(part.rows, part.blocks).contiguous()
    values = values.reshape(part.rows, -1)
    if values.shape[1] == 1:
        return values.expand(part.rows, part.blocks).contiguous()
    return values.repeat_interleave(part.group // part.block, 1)[:, : part.blocks].contiguous()


def _named(parts: Sequence[Blocked], kind: str, form: str) -> str:
    return f"{'+'.join(part.codes.removesuffix('_codes') for part in parts)}_{kind}/{form}"
