"""What a matrix product multiplies: quantized weights and rounded activations, found behind what may stand between."""

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.lowering.tensorrt.legality.model import is_constant

__all__ = [
    "Granularity",
    "Operand",
    "Product",
    "Shape",
    "computed_weight",
    "dtype_of",
    "granularity",
    "product_of",
    "shape_of",
]

_DEQUANTIZE = ("DequantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4DequantizeLinear")
_PASSES = ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_SCALES = ("Mul", "Div")
_LOOKUPS = ("Gather", "GatherElements", "GatherND")

Shape = tuple[int | str | None, ...]


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """Type of a value's elements; None where it is not known."""
    return None if value is None else value.dtype


def shape_of(value: ir.Value | None) -> Shape | None:
    """Sizes of a value, those that are not fixed by name; None where even the rank is not known."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share a scale.

    Attributes:
        kind: "tensor", "channel", "block", or "unknown".
        axis: of the channels, or along which blocks lie; not below 0.
        blocks: how many lie along that axis.
        is_whole: whether all blocks are of one size, and they lie along one axis alone.
    """

    kind: str
    axis: int = 0
    blocks: int = 1
    is_whole: bool = True

    @property
    def is_blocked(self) -> bool:
        """Whether there are several blocks in a row."""
        return self.kind == "block" and self.blocks > 1


def granularity(node: ir.Node) -> Granularity:
    """Of the scales of a node that quantizes or dequantizes.

    Source: ONNX, QuantizeLinear-21: a scalar, one for each index of ``axis``, or as many dimensions as the data.
    """
    data, scale = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if data is None or scale is None:
        return Granularity("unknown")
    if not scale or (len(scale) == 1 and scale[0] == 1):
        return Granularity("tensor")
    axis = node.attributes.get_int("axis", 1) % max(len(data), 1)
    if len(scale) == 1 and (len(data) != 1 or scale == data):
        return Granularity("channel", axis)
    differ = [i for i, (have, want) in enumerate(zip(scale, data, strict=False)) if have != want]
    along = differ[0] if differ else axis
    size, blocks = data[along] if along < len(data) else None, scale[along]
    if not isinstance(size, int) or not isinstance(blocks, int):
        return Granularity("block" if len(scale) == len(data) else "unknown", along, 2)
    whole = len(scale) == len(data) and len(differ) == 1 and blocks > 0 and size % blocks == 0
    return Granularity("block", along, blocks, whole)


@dataclass(frozen=True)
class Operand:
    """One side of a product that comes from codes.

    Attributes:
        dequantize: the node that makes floats of codes.
        path: the nodes between it and the product, from the product back.
    """

    dequantize: ir.Node
    path: tuple[ir.Node, ...]

    @property
    def codes(self) -> ir.DataType | None:
        """Type of the codes."""
        return dtype_of(self.dequantize.inputs[0])

    @property
    def scale(self) -> ir.Value | None:
        """The scales."""
        return self.dequantize.inputs[1]

    @property
    def is_weight(self) -> bool:
        """Whether the codes are constants."""
        return is_constant(self.dequantize.inputs[0])

    @property
    def granularity(self) -> Granularity:
        """See `granularity`."""
        return granularity(self.dequantize)


@dataclass(frozen=True)
class Product:
    """A matrix product with a quantized weight.

    Attributes:
        node: MatMul or Gemm.
        weight: the side that is constant.
        activation: the other, where it is rounded and goes into the product as it is dequantized.
        summed_axis: of the codes, counted from their end: -1 or -2; the other is that of the output channels.
        shape: of the weight, as it is multiplied; the last two are those of the matrix.
        rank: of the other side; None where it is not known.
    """

    node: ir.Node
    weight: Operand
    activation: Operand | None
    summed_axis: int
    shape: Shape | None
    rank: int | None

    @property
    def rounds(self) -> bool:
        """Whether codes of both sides could be multiplied: no scale differs along the axis that is summed over."""
        if self.activation is None or self.activation.granularity.kind == "channel":
            return False
        codes, scales = shape_of(self.weight.dequantize.inputs[0]), self.weight.granularity
        return scales.kind != "channel" or codes is None or scales.axis - len(codes) != self.summed_axis


def product_of(node: ir.Node) -> Product | None:
    """What a node multiplies, if that is a quantized weight."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    sides = [_operand(value) for value in node.inputs[:2]]
    for place in (1, 0):
        weight, other = sides[place], sides[1 - place]
        if weight is not None and weight.is_weight:
            rest = shape_of(node.inputs[1 - place])
            activation = None if other is None or other.is_weight else other
            shape, rank = shape_of(node.inputs[place]), None if rest is None else len(rest)
            return Product(node, weight, activation, _summed_axis(node, weight, place), shape, rank)
    return None


def _summed_axis(node: ir.Node, weight: Operand, place: int) -> int:
    turns = node.attributes.get_int("transB" if place else "transA", 0) if node.op_type == "Gemm" else 0
    turns += sum(each.op_type == "Transpose" for each in weight.path)
    return -1 if (turns + place) % 2 == 0 else -2


def computed_weight(node: ir.Node) -> str | None:
    """The operator that stands between codes and a product and that no kernel takes in; None if there is none.

    For products whose weight is a constant computed from codes in another way than by DequantizeLinear, moving of
    elements and scaling: by a table, or a difference of two.
    """
    if node.op_type not in ("MatMul", "Gemm") or product_of(node) is not None:
        return None
    for value in node.inputs[:2]:
        if is_constant(value) and value is not None and value.producer() is not None:
            found = _computes(value)
            if found is not None:
                return found
    return None


def _computes(value: ir.Value) -> str | None:
    """The operator next to the product, on a way to codes."""
    stack: list[tuple[ir.Value, str]] = [(value, "")]
    seen: set[int] = set()
    while stack:
        here, first = stack.pop()
        node = here.producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type in (*_DEQUANTIZE, *_LOOKUPS):
            return first or node.op_type
        passes = node.op_type in (*_PASSES, *_SCALES)
        stack += [(each, first or ("" if passes else node.op_type)) for each in node.inputs if each is not None]
    return None


def _operand(value: ir.Value | None) -> Operand | None:
    """Follows a value back to the node that dequantizes it."""
    path: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in _DEQUANTIZE and len(node.inputs) > 1:
            return Operand(node, tuple(path))
        path.append(node)
        if node.op_type in _PASSES:
            value = node.inputs[0]
        elif node.op_type in _SCALES:
            for one, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                rest = _operand(one) if is_constant(other) else None
                if rest is not None:
                    return Operand(rest.dequantize, (*path, *rest.path))
            return None
        else:
            return None
    return None
