"""Stored codes as TensorRT multiplies with them: signed, the scale in the dtype of the product, straight into MatMul.

Source: what the builder of TensorRT for RTX 1.7 makes of hand-made graphs. INT4 codes are fused in blocks smaller than
the width only, so that a scale per channel becomes equal blocks; INT8 and FP8 codes with one scale per channel.
"""

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.builders.canonical import is_linear_weight
from qcompiler.lowering.onnx.dtypes import TORCH
from qcompiler.lowering.onnx.emitter import Emitter
from qcompiler.lowering.onnx.storage import float_chunks
from qcompiler.lowering.tensorrt.support import equal_blocks

__all__ = ["Weight", "multiplied", "offsets", "stored_weight", "sums", "weight_of"]

_FLOAT, _FLOAT8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
_STORED = {2: ir.DataType.INT4, 3: ir.DataType.INT4, 4: ir.DataType.INT4, 8: ir.DataType.INT8}


@dataclass(frozen=True)
class Weight:
    """A matrix ``[out, in]`` of stored codes.

    Attributes:
        node: the ``dequantize`` node.
        rows, width: its shape.
        bits: of a code.
        is_float8: whether codes are 8-bit floats.
        block: input channels that share a scale; ``width`` where one serves a whole row, or all.
        side: output channels that share a scale in squares; 1 for one row; 0 for one scale for everything.
    """

    node: fx.Node
    rows: int
    width: int
    bits: int
    is_float8: bool
    block: int
    side: int

    @property
    def codes(self) -> str:
        """Name of the stored codes."""
        return str(self.node.args[0].target)  # type: ignore[union-attr]

    @property
    def is_blocked(self) -> bool:
        """Whether a row has several scales."""
        return self.block < self.width

    @property
    def stored(self) -> ir.DataType:
        """What ONNX holds the codes in: signed."""
        return _FLOAT8 if self.is_float8 else _STORED[self.bits]

    @property
    def has_zero_point(self) -> bool:
        """Whether codes are relative to a zero point."""
        return self.node.args[2] is not None


def weight_of(e: Emitter, node: fx.Node) -> Weight | None:
    """What a linear layer multiplies with, if that is affine codes of its own."""
    return _stored(e, node) if is_linear_weight(node) else None


def _stored(e: Emitter, node: fx.Node) -> Weight:
    codes, scale, _, _, block = node.args[:5]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(block, int)
    info, scales = e.graph.weights.info(str(codes.target)), e.graph.weights.info(str(scale.target)).shape
    rows, width = info.shape
    is_float8 = info.dtype.startswith("float8")
    if info.dtype == "float8_e5m2":
        raise TargetError("TensorRT has no E5M2 floats", where=str(codes.target), remedy="choose fp8 (E4M3)")
    bits = 8 if is_float8 else int(info.dtype.lstrip("uint"))
    side = 0 if not scales else 1 if scales[0] == rows else block
    return Weight(node, rows, width, bits, is_float8, block if 0 < block < width else width, side)


def _scales(e: Emitter, weight: Weight) -> Tensor:
    """float32 ``[out, width / block]``."""
    read = e.graph.weights.read(str(weight.node.args[1].target)).float()  # type: ignore[union-attr]
    if weight.side == 0:
        return read.reshape(1, 1).expand(weight.rows, 1)
    read = read.reshape(-1, weight.width // weight.block)
    return read.repeat_interleave(weight.side, 0)[: weight.rows] if weight.side > 1 else read


def multiplied(e: Emitter, weight: Weight, dtype: ir.DataType) -> ir.Value:
    """``[in, out]``, ready for MatMul: signed codes behind one DequantizeLinear."""
    scale_name = f"{weight.codes.removesuffix('_codes')}_scale"
    codes = weight.node.args[0]
    assert isinstance(codes, fx.Node)
    block = weight.block
    if weight.stored == ir.DataType.INT4 and not weight.is_blocked:
        block = equal_blocks(weight.width) or weight.width
    inputs = [e.codes(codes, weight.stored, transpose=True)]
    if weight.stored == ir.DataType.INT4 or weight.is_blocked:

        def blocks() -> Tensor:
            return _scales(e, weight).repeat_interleave(weight.block // block, 1).t().contiguous()

        shape, places = (weight.width // block, weight.rows), {"axis": 0, "block_size": block}
        inputs.append(e.computed(f"{scale_name}/{block}", dtype, shape, float_chunks(blocks, TORCH[dtype], scale_name)))
    else:

        def channels() -> Tensor:
            return _scales(e, weight)[:, 0].contiguous()

        places = {"axis": 1}
        chunks = float_chunks(channels, TORCH[dtype], scale_name)
        inputs.append(e.computed(f"{scale_name}/channel", dtype, (weight.rows,), chunks))
    return e.op("DequantizeLinear", *inputs, dtype=dtype, name=f"{weight.codes}/DequantizeLinear", **places)


def offsets(e: Emitter, weight: Weight, dtype: ir.DataType) -> ir.Value:
    """What zero points take off, ``[width / block, out]``: to be multiplied with the means of the input's blocks.

    ``x·s·(q − z) = x·s·(q − m) − sum(x)·s·(z − m)``, where m is the middle of unsigned codes; the mean instead of the
    sum, and s times the size of a block, keeps float16 from overflowing.
    """
    zero_point = weight.node.args[2]
    assert isinstance(zero_point, fx.Node)
    middle = 128 if weight.bits == 8 else 8

    def chunks() -> Tensor:
        zero = e.graph.weights.read(str(zero_point.target)).float().reshape(-1, weight.width // weight.block)
        return (_scales(e, weight) * (zero - middle) * weight.block).t().contiguous()

    name = f"{weight.codes.removesuffix('_codes')}_offsets"
    shape = (weight.width // weight.block, weight.rows)
    return e.computed(name, dtype, shape, float_chunks(chunks, TORCH[dtype], name))


def sums(e: Emitter, weight: Weight) -> ir.Value:
    """float32 ``[out]``: sums of the rows of dequantized weights, by which a zero point of the input is multiplied."""

    def chunks() -> Tensor:
        codes = e.graph.weights.read(weight.codes)
        blocks = codes.float().reshape(weight.rows, -1, weight.block).sum(-1)
        return (blocks * _scales(e, weight)).sum(1)

    name = f"{weight.codes.removesuffix('_codes')}_sums"
    return e.computed(name, _FLOAT, (weight.rows,), float_chunks(chunks, torch.float32, name))


def stored_weight(e: Emitter, node: fx.Node, dtype: ir.DataType) -> ir.Value:
    """``[rows, width]`` of a weight that something else than linear layers reads."""
    weight = _stored(e, node)
    if weight.has_zero_point:
        raise TargetError(
            "codes with zero points that something else than linear layers reads",
            where=weight.codes,
            expected="symmetric codes",
            remedy="choose a symmetric scheme for this weight",
        )
    return e.op("Transpose", multiplied(e, weight, dtype), perm=[1, 0])
