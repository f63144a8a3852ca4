"""Weights that an ONNX file holds as codes: Q/DQ pairs, MatMulNBits, GatherBlockQuantized. None is read.

Each becomes a `Layer` of a `Checkpoint`, as those of quantized checkpoints do, and a node over its float weight.
Sources: onnx/docs/Operators.md (DequantizeLinear), onnxruntime/docs/ContribOperators.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints import Checkpoint, Layer
from qcompiler.frontend.onnx.interpreter import LINEAR
from qcompiler.frontend.onnx.nodes import Node, Source
from qcompiler.numerics import QuantSpec, Scheme, unpack_bits

__all__ = ["Weights", "find_layers"]

_DTYPES = {
    "int8": "int8",
    "uint8": "int8",
    "int4": "int4",
    "uint4": "int4",
    "int2": "int2",
    "uint2": "int2",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}
_SUFFIXES = ("_codes", "_quantized", "_qweight", ".qweight", "_Q4", "_Q8", "_Q4G32", "_q4", "_q8", "_quant", "_DQ")


@dataclass
class Weights:
    """What is left of a graph when its weights are taken out.

    Attributes:
        nodes: those of the file, without what dequantizes weights.
        checkpoint: stored tensors and quantized layers.
        turned: by value: the name of a stored matrix, and whether the value is its transpose.
    """

    nodes: list[Node]
    checkpoint: Checkpoint
    turned: dict[str, tuple[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Codes:
    """Codes of a matrix as they are stored.

    Attributes:
        name, scale, zero: of stored tensors.
        axis, block: as DequantizeLinear has them; block 0: one scale per slice of the axis, or for all.
        turned: whether they are ``[in, out]``.
    """

    name: str
    scale: str
    zero: str | None
    axis: int
    block: int
    turned: bool


def find_layers(source: Source) -> Weights:
    """Takes weights with codes out of a graph.

    Raises:
        UnsupportedModelError: for codes in a form that is not read.
        WeightError: for parts of shapes that do not fit each other.
    """
    return _Finder(source).found


class _Finder:
    def __init__(self, source: Source) -> None:
        self._source, self._stored, self._readers = source, source.stored, source.readers()
        self._checkpoint = Checkpoint(source.stored, "onnx")
        self._names: set[str] = set()
        self.found = Weights([], self._checkpoint)
        for node in source.nodes:
            self.found.nodes += self._taken(node)
        for name in self._names:
            self._checkpoint.take_over(name)
        self._checkpoint.finish()

    def _taken(self, node: Node) -> list[Node]:
        """The nodes in the place of one."""
        if node.op == "DequantizeLinear" and all(name in self._stored for name in node.inputs if name):
            return self._dequantized(node)
        if node.domain == "com.microsoft" and node.op == "MatMulNBits":
            return self._product(node)
        if node.domain == "com.microsoft" and node.op == "GatherBlockQuantized":
            return self._lookup(node)
        return [node]

    # --- Q/DQ -----------------------------------------------------------------------------------------------------

    def _dequantized(self, node: Node) -> list[Node]:
        codes = self._stored.info(node.inputs[0])
        if len(codes.shape) != 2 or codes.dtype not in _DTYPES:
            return [node]
        scale = self._stored.info(node.inputs[1])
        zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None
        turned = self._is_factor(node.outputs[0])
        axis = node.attributes.get("axis", 1) % 2
        block = node.attributes.get("block_size", 0)
        form = _Codes(codes.name, scale.name, zero, axis, block, turned)
        inner = 0 if turned else 1  # the axis of input channels
        if torch.Size(scale.shape).numel() == 1:
            spec = self._spec(codes.dtype, "per_tensor", None, form)
        elif len(scale.shape) == 1 and not block and axis != inner and scale.shape[0] == codes.shape[axis]:
            spec = self._spec(codes.dtype, "per_channel", None, form)
        elif len(scale.shape) == 2 and block and axis == inner:
            wanted = [-(-size // block) if place == axis else size for place, size in enumerate(codes.shape)]
            if list(scale.shape) != wanted:
                raise WeightError(
                    "scales that do not fit their codes",
                    where=f"{self._source.path}: {scale.name}",
                    got=tuple(scale.shape),
                    expected=tuple(wanted),
                )
            spec = self._spec(codes.dtype, "per_group", block, form)
        else:
            return [node]
        if spec is None:
            return [node]
        self._add(self._name_of(codes.name), spec, form, node.outputs[0])
        return []

    def _is_factor(self, value: str) -> bool:
        """Whether a value is a right factor ``[in, out]`` of products, and nothing else."""
        readers = self._readers.get(value, [])
        return bool(readers) and all(
            index == 1 and (node.op == "MatMul" or (node.op == "Gemm" and not node.attributes.get("transB", 0)))
            for node, index in readers
        )

    def _spec(self, dtype: str, granularity: Any, group: int | None, form: _Codes) -> QuantSpec | None:
        """The format of codes; None for one that a site cannot have."""
        symmetric = form.zero is None if dtype.startswith(("int", "float")) else self._zeros_are(form, _middle(dtype))
        if dtype.startswith(("int", "float")) and form.zero is not None:
            symmetric = self._zeros_are(form, 0)
        kind = _DTYPES[dtype]
        if kind.startswith("float") and not symmetric:
            return None
        return QuantSpec(kind, granularity, group, symmetric, self._scale_dtype(form))

    def _scale_dtype(self, form: _Codes) -> str:
        return self._stored.info(form.scale).dtype

    def _zeros_are(self, form: _Codes, number: int) -> bool:
        """Whether all zero points are one number; left out, they are 0."""
        if form.zero is None:
            return number == 0
        zeros = self._stored.read(form.zero, check_finite=False)
        return bool((zeros.float() == number).all())

    def _add(self, name: str, spec: QuantSpec, form: _Codes, value: str) -> None:
        codes = self._stored.info(form.name)
        rows, columns = codes.shape[::-1] if form.turned else codes.shape
        scale = self._stored.info(form.scale)
        moved = _moved(codes.dtype, spec)
        turn = form.turned
        self._part(
            name, "codes", form.name, partial(_codes, turned=turn, moved=moved), spec.stored_dtype, (rows, columns)
        )
        groups = -(-columns // spec.group_of(columns)) if spec.granularity == "per_group" else 1
        shapes = {"per_group": (rows, groups), "per_channel": (rows,), "per_tensor": ()}
        shape = shapes[spec.granularity]
        blocked = turn and spec.granularity == "per_group"
        self._part(name, "scale", form.scale, partial(_scales, turned=blocked, shape=shape), scale.dtype, shape)
        if not spec.symmetric:
            if form.zero is not None:
                zeros = partial(_zeros, turned=blocked, moved=moved, shape=shape)
                self._part(name, "zero_point", form.zero, zeros, spec.stored_dtype, shape)
            else:  # unsigned codes around 0
                fill = partial(torch.zeros, shape, dtype=torch.uint8)
                self._checkpoint.part(name, "zero_point", [], lambda: fill(), spec.stored_dtype, shape)
        self._names.update(part for part in (form.name, form.scale, form.zero) if part)
        layer = Layer(name, rows, columns, Scheme(weight=spec))
        self._checkpoint.add(layer)
        self.found.turned[value] = (layer.weight, form.turned)

    def _part(
        self,
        name: str,
        part: str,
        source: str,
        function: Callable[[Tensor], Tensor],
        dtype: str,
        shape: tuple[int, ...],
    ) -> None:
        self._checkpoint.part(name, part, [source], function, dtype, shape)

    def _name_of(self, codes: str) -> str:
        """The path of a layer, by the name of its codes."""
        name = codes
        for suffix in _SUFFIXES:
            name = name.removesuffix(suffix)
        name = name.removesuffix(".weight")
        unique, count = name, 1
        while f"{unique}.weight" in self._checkpoint.layers:
            unique, count = f"{name}_{count}", count + 1
        return unique

    # --- operators of ONNX Runtime ---------------------------------------------------------------------------------

    def _product(self, node: Node) -> list[Node]:
        """MatMulNBits: codes ``[N, blocks, bytes]`` of K columns, low bits first."""
        data, scale = node.inputs[1:3]
        zero, order, bias = ((*node.inputs, "", "", "", "")[index] for index in (3, 4, 5))
        self._must_be_stored(node, [data, scale, *([zero] if zero else [])])
        if order or node.attributes.get("weight_prepacked", 0):
            self._refuse(node, "an order of columns, or a layout of one kind of GPU")
        columns, rows = node.attributes["K"], node.attributes["N"]
        bits, block = node.attributes.get("bits", 4), node.attributes["block_size"]
        name = self._name_of(data)
        self._blocks(node, name, data, scale, zero or None, rows, columns, bits, block)
        weight = f"{name}.weight"
        self.found.turned[weight] = (weight, False)
        return [Node("Linear", LINEAR, [node.inputs[0], weight, bias], node.outputs, {}, node.name)]

    def _lookup(self, node: Node) -> list[Node]:
        """GatherBlockQuantized: rows of a table with codes along its last axis."""
        data, places, scale = node.inputs[:3]
        zero = node.inputs[3] if len(node.inputs) > 3 else ""
        self._must_be_stored(node, [data, scale, *([zero] if zero else [])])
        info, block = self._stored.info(data), node.attributes.get("block_size", 128)
        bits = node.attributes.get("bits", 4)
        rank = len(info.shape)
        if (
            rank != 2
            or node.attributes.get("gather_axis", 0) % 2 != 0
            or node.attributes.get("quantize_axis", 1) % 2 != 1
        ):
            self._refuse(node, "blocks along another axis than the last of two")
        name = self._name_of(data)
        if f"{name}.weight" not in self.found.turned:
            if info.dtype == "uint8":
                columns = info.shape[1] * 8 // bits
                self._blocks(node, name, data, scale, zero or None, info.shape[0], columns, bits, block)
            else:
                form = _Codes(data, scale, zero or None, 1, block, False)
                spec = self._spec(info.dtype, "per_group", block, form)
                assert spec is not None
                self._add(name, spec, form, f"{name}.weight")
        weight = f"{name}.weight"
        self.found.turned[weight] = (weight, False)
        return [Node("Gather", "", [weight, places], node.outputs, {"axis": 0}, node.name)]

    def _blocks(
        self,
        node: Node,
        name: str,
        data: str,
        scale: str,
        zero: str | None,
        rows: int,
        columns: int,
        bits: int,
        block: int,
    ) -> None:
        """Unsigned codes in bytes, by block along columns; zero points in bytes by row, or as floats."""
        if bits not in (2, 4, 8):
            self._refuse(node, f"codes of {bits} bits")
        groups = -(-columns // block)
        stored = self._stored.info(data)
        if torch.Size(stored.shape).numel() not in (rows * groups * block * bits // 8, rows * columns * bits // 8):
            raise WeightError(
                "codes that do not fill their shape",
                where=f"{self._source.path}: {data}",
                got=tuple(stored.shape),
                expected=f"{rows} rows of {columns} codes of {bits} bits in blocks of {block}",
            )
        middle = 1 << (bits - 1)
        unpacked = partial(_unpacked, rows=rows, columns=columns, bits=bits)
        zeros: Tensor | None = None
        if zero is not None:
            read = self._stored.read(zero, check_finite=False)
            zeros = read.reshape(rows, groups) if read.is_floating_point() else _unpacked(read, rows, groups, bits)
            if not torch.equal(zeros.float(), zeros.float().round()) or float(zeros.min()) < 0:
                self._refuse(node, "zero points between codes")
            zeros = zeros.to(torch.uint8)
        symmetric = zeros is None or bool((zeros == middle).all())
        scale_dtype = self._stored.info(scale).dtype
        spec = QuantSpec(f"int{bits}", "per_group", block, symmetric, scale_dtype)
        codes: Callable[[Tensor], Tensor] = unpacked
        if symmetric:
            codes = partial(_centred, unpacked, middle)
        self._part(name, "codes", data, codes, spec.stored_dtype, (rows, columns))
        shape = (rows, groups)
        self._part(name, "scale", scale, partial(_scales, turned=False, shape=shape), scale_dtype, shape)
        if not symmetric and zeros is not None:
            kept = zeros
            self._checkpoint.part(name, "zero_point", [], lambda: kept, spec.stored_dtype, shape)
        self._names.update(part for part in (data, scale, zero) if part)
        self._checkpoint.add(Layer(name, rows, columns, Scheme(weight=spec)))

    def _must_be_stored(self, node: Node, names: list[str]) -> None:
        if not all(name in self._stored for name in names):
            self._refuse(node, "codes that are computed")

    def _refuse(self, node: Node, got: str) -> None:
        raise UnsupportedModelError(
            "codes in a form that is not read", where=f"{self._source.path}: {node.called} ({node.op})", got=got
        )


def _middle(dtype: str) -> int:
    """Of unsigned codes."""
    return 1 << (int(dtype.removeprefix("uint")) - 1)


def _moved(dtype: str, spec: QuantSpec) -> int:
    """What is added to stored codes: unsigned ones around their middle become signed, signed ones with zero points
    unsigned.
    """
    if dtype.startswith("float") or dtype.startswith("uint") is not spec.symmetric:
        return 0
    return -_middle(dtype) if spec.symmetric else _middle(f"u{dtype}")


def _codes(stored: Tensor, *, turned: bool, moved: int) -> Tensor:
    return _shifted(stored.t().contiguous() if turned else stored, moved)


def _shifted(codes: Tensor, moved: int) -> Tensor:
    return codes if not moved else (codes.to(torch.int16) + moved).to(torch.int8 if moved < 0 else torch.uint8)


def _scales(stored: Tensor, *, turned: bool, shape: tuple[int, ...]) -> Tensor:
    return (stored.t() if turned else stored).reshape(shape).contiguous()


def _zeros(stored: Tensor, *, turned: bool, moved: int, shape: tuple[int, ...]) -> Tensor:
    return _shifted(_scales(stored, turned=turned, shape=shape), moved)


def _unpacked(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """uint8 ``[rows, columns]`` of bytes by row, padding dropped."""
    flat = packed.reshape(rows, -1).contiguous()
    return unpack_bits(flat, bits, columns, signed=False) if bits < 8 else flat[:, :columns].contiguous()


def _centred(unpack: Callable[[Tensor], Tensor], middle: int, packed: Tensor) -> Tensor:
    return (unpack(packed).to(torch.int16) - middle).to(torch.int8)
