"""`Emitter`: grows an ONNX graph node by node while an fx graph is walked."""

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.ir import Dim, Graph, Port, ancestors
from qcompiler.lowering.onnx.dtypes import DTYPES, FLOATS, TORCH, dtype_of, onnx_dtype
from qcompiler.lowering.onnx.storage import Chunks, DataFile, code_chunks, float_chunks, stored_bytes

__all__ = ["Builder", "Builders", "Emitter", "Ports", "argument", "is_size", "tensor_arguments"]

Ports = Mapping[str, tuple[ir.DataType, Sequence[Dim]]]

_INLINE_BYTES = 1024  # smaller initializers live in the .onnx file itself


class Emitter:
    """Turns fx values into ONNX values.

    Every operator emitted is pure, so one applied again to the same inputs gives the value it gave before: masks, cache
    lengths, casts and rotary tables that each layer of a model asks for anew are computed once.

    Float tensors have one *working* dtype (float32 or float16). Values computed from integers alone (positions, masks)
    stay float32 until they meet one of the working dtype; weights take the dtype of what they are combined with.

    Args:
        graph: what is lowered.
        opset: the ONNX operator set.
        working: the dtype of weights and activations.
        unsigned_products: store int8 weights as uint8 where an integer product is made of them.
        ports: how inputs and outputs are declared, dtype and shape by name, where not as their own.

    Attributes:
        products: of each layer whose weight is quantized, the name of the node that multiplies with it.
        attentions: of each attention, the names of the nodes that multiply queries, keys and values.
        floats_times_bytes: layers whose weight has codes of 8 bits by channel, which floats are multiplied with.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        opset: int,
        working: ir.DataType,
        unsigned_products: bool = True,
        ports: Ports | None = None,
    ) -> None:
        self.graph = graph
        self.opset = opset
        self.ports = ports or {}
        self.unsigned_products = unsigned_products and working == ir.DataType.FLOAT
        self.working = working
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.data = DataFile()
        self.inputs: list[ir.Value] = []
        self.scope = ""
        self.weight_bytes = 0
        self.products: dict[str, str] = {}
        self.attentions: dict[str, list[str]] = {}
        self.floats_times_bytes: set[str] = set()
        self.values: dict[fx.Node, ir.Value | tuple[ir.Value, ...]] = {}
        self.uses = _uses(graph)
        self._names: set[str] = {port.name for port in (*graph.signature.inputs, *graph.signature.outputs)}
        self._owners: dict[str, str] = {}
        self._known: dict[Any, tuple[ir.Value, ...]] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._placed: dict[Any, ir.ExternalTensor] = {}
        self._dims: dict[str, tuple[ir.Value, int]] = {}

    # --- names and nodes ---------------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """``name``, or the name with the first free number behind it."""
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def op(
        self, kind: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, name: str = "", **attributes: Any
    ) -> ir.Value:
        """Emits an operator with one output.

        Args:
            kind: the ONNX operator type.
            inputs: None for an optional input left out.
            dtype: of the output; by default that of the first input.
            name: for the node, instead of one made from the fx node being lowered.
            attributes: of the node; None leaves one out.
        """
        first = next(value for value in inputs if value is not None)
        return self.ops(kind, *inputs, dtypes=(dtype or dtype_of(first),), name=name, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        dtypes: Sequence[ir.DataType | None],
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Emits an operator with several outputs, of a ``domain`` if not of ONNX itself; dtype None leaves one out."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = {key: value for key, value in attributes.items() if value is not None}
        key = (
            kind,
            tuple(id(value) for value in inputs),
            tuple(dtypes),
            tuple(sorted((k, repr(v)) for k, v in given.items())),
        )
        if key not in self._known:
            label = self.unique(name or f"{self.scope}/{kind}")
            outputs = tuple(
                ir.Value(name="")
                if dtype is None
                else ir.Value(name=self.unique(f"{label}_output_{i}"), type=ir.TensorType(dtype))
                for i, dtype in enumerate(dtypes)
            )
            self.nodes.append(ir.node(kind, list(inputs), given, domain=domain, outputs=outputs, name=label))
            self._known[key] = outputs
        return self._known[key]

    def input(self, node: fx.Node, port: Port) -> None:
        """Declares a graph input; its symbolic sizes become known to `dim`."""
        dtype = onnx_dtype(getattr(torch, port.dtype))
        is_cache = port.role == "past"
        if is_cache and dtype == ir.DataType.FLOAT:
            dtype = ir.DataType.FLOAT16 if port.dtype == "float16" else self.working
        dtype, shape = self.ports.get(port.name, (dtype, port.shape))
        value = ir.Value(name=port.name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        self.scope = port.name
        self.values[node] = self.cast(value, self.working) if dtype == ir.DataType.FLOAT else value
        for axis, size in enumerate(port.shape):
            if isinstance(size, str):
                self._dims.setdefault(size, (value, axis))

    # --- values ------------------------------------------------------------------------------------------------------

    def value(self, arg: object, dtype: ir.DataType | None = None) -> ir.Value:
        """The ONNX value of an fx argument, cast to ``dtype`` if one is given.

        Symbolic sizes and Python numbers give 0-D tensors here (`ints` gives them as 1-D).
        """
        if isinstance(arg, fx.Node):
            if arg.op == "get_attr":
                return self.weight(arg, dtype)
            found = self.values[arg]
            if isinstance(found, tuple):
                raise TargetError("a tuple where one tensor is expected", where=arg.name)
            if is_size(arg):
                found = self.op("Squeeze", found, self.const([0]))
            return found if dtype is None else self.cast(found, dtype)
        if isinstance(arg, (bool, int, float)):
            if dtype is None:
                dtype = DTYPES[torch.tensor(arg).dtype]
            return self.const(arg, dtype)
        raise TargetError("an argument that is neither a tensor nor a number", where=self.scope, got=repr(arg))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``."""
        return value if dtype_of(value) == dtype else self.op("Cast", value, dtype=dtype, to=int(dtype))

    def const(self, data: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant held in the model file."""
        array = np.asarray(data, dtype=dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.unique(f"constant_{len(self._constants)}")
            self._constants[key] = self._initializer(name, ir.tensor(array, dtype=dtype, name=name))
        return self._constants[key]

    def float_like(self, *args: object) -> ir.DataType:
        """The float dtype in which values are combined: the working one as soon as one of them has it, else float32."""
        nodes = [arg for arg in args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        dtypes = {value.dtype for value in map(self.values.__getitem__, nodes) if isinstance(value, ir.Value)}
        return next((dtype for dtype in (ir.DataType.DOUBLE, self.working) if dtype in dtypes), ir.DataType.FLOAT)

    # --- weights -----------------------------------------------------------------------------------------------------

    def weight_name(self, node: fx.Node) -> str:
        """The name a stored tensor goes by: of tied names the one read first."""
        name = str(node.target)
        if name not in self._owners:
            for tied in (name, *self.graph.weights.tied(name)):
                self._owners[tied] = name
        return self._owners[name]

    def weight(
        self, node: fx.Node, dtype: ir.DataType | None = None, *, transpose: bool = False, flat: bool = False
    ) -> ir.Value:
        """A float, integer or boolean tensor of the weight store as an initializer.

        Args:
            node: the ``get_attr`` node.
            dtype: wanted; floats are stored in it, by default in float32.
            transpose: store the transpose of a matrix.
            flat: store it as one dimension.
        """
        name, store = self.weight_name(node), self.graph.weights
        info = store.info(name)
        kind: torch.dtype = getattr(torch, info.dtype)
        stored = onnx_dtype(kind)
        if stored in FLOATS and dtype in FLOATS:
            assert dtype is not None
            stored = dtype
        chunks = float_chunks(lambda: store.read(name), TORCH[stored], name, transpose=transpose)
        value = self._stored(name, stored, info.shape, chunks, transpose=transpose, flat=flat)
        return value if dtype is None else self.cast(value, dtype)

    def codes(self, node: fx.Node, dtype: ir.DataType, *, transpose: bool = False, flat: bool = False) -> ir.Value:
        """Integer codes of the weight store as an initializer of ``dtype``; otherwise as `weight`."""
        name, store = self.weight_name(node), self.graph.weights
        chunks = code_chunks(lambda: store.read(name), dtype, transpose=transpose)
        return self._stored(name, dtype, store.info(name).shape, chunks, transpose=transpose, flat=flat)

    def computed(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], chunks: Chunks) -> ir.Value:
        """What is made of stored tensors while the file is written, as an initializer; ``name`` says what it is."""
        return self._stored(name, dtype, shape, chunks, transpose=False, flat=False)

    def _stored(
        self, source: str, dtype: ir.DataType, shape: tuple[int, ...], chunks: Chunks, *, transpose: bool, flat: bool
    ) -> ir.Value:
        shape = (math.prod(shape),) if flat else shape[::-1] if transpose else shape
        key = (source, dtype, shape, transpose)
        if key not in self._constants:
            name = self.unique(source)
            size = stored_bytes(dtype, shape)
            if size >= _INLINE_BYTES:
                place = (source, dtype, size, transpose)
                if place in self._placed:  # the same bytes in another shape
                    tensor: ir.TensorProtocol = self.data.again(self._placed[place], name, shape)
                    self.weight_bytes -= size
                else:
                    tensor = self._placed[place] = self.data.add(name, dtype, shape, chunks)
            else:
                raw = b"".join(bytes(chunk.view(torch.uint8).numpy().data) for chunk in chunks())
                tensor = _inline(raw, dtype, shape, name)
            self._constants[key] = self._initializer(name, tensor)
            self.weight_bytes += size
        return self._constants[key]

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=tensor
        )
        self.initializers[name] = value
        return value

    # --- sizes -------------------------------------------------------------------------------------------------------

    def dim(self, node: fx.Node, axis: int) -> ir.Value | int:
        """The size of an axis of an fx tensor: a number, or an int64 ``[1]`` value."""
        size = node.meta["shape"][axis]
        if isinstance(size, int):
            return size
        known = self._expression(size)
        if known is not None:
            return known
        axis %= len(node.meta["shape"])
        return self.op("Shape", self.value(node), dtype=ir.DataType.INT64, start=axis, end=axis + 1)

    def size(self, node: fx.Node, axis: int) -> ir.Value:
        """As `dim`, always an int64 ``[1]`` value."""
        found = self.dim(node, axis)
        return self.const([found]) if isinstance(found, int) else found

    def _expression(self, text: str) -> ir.Value | None:
        """An expression of the inputs' symbolic sizes, or None where it names something else."""
        if text in self._dims:
            value, axis = self._dims[text]
            return self.op("Shape", value, dtype=ir.DataType.INT64, start=axis, end=axis + 1)
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return None
        return self._evaluate(tree)

    def _evaluate(self, tree: ast.expr) -> ir.Value | None:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return self.const([tree.value])
        if isinstance(tree, ast.Name):
            return self._expression(tree.id) if tree.id in self._dims else None
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            operand = self._evaluate(tree.operand)
            return None if operand is None else self.op("Neg", operand)
        if isinstance(tree, ast.BinOp):
            kind = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}.get(type(tree.op))
            left, right = self._evaluate(tree.left), self._evaluate(tree.right)
            if kind is not None and left is not None and right is not None:
                return self.op(kind, left, right)
        return None

    def ints(self, items: Iterable[object]) -> ir.Value:
        """A list of numbers and symbolic sizes as one int64 1-D tensor."""
        parts: list[ir.Value] = []
        literal: list[int] = []
        for item in items:
            if isinstance(item, int):
                literal.append(item)
                continue
            if literal:
                parts.append(self.const(literal))
                literal = []
            parts.append(self.size_value(item))
        if literal or not parts:
            parts.append(self.const(literal))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def size_value(self, item: object) -> ir.Value:
        """A number or symbolic size as an int64 ``[1]`` value."""
        if isinstance(item, int):
            return self.const([item])
        if isinstance(item, fx.Node):
            found = self.values[item]
            if isinstance(found, ir.Value):
                return (
                    found if is_size(item) else self.op("Reshape", self.cast(found, ir.DataType.INT64), self.const([1]))
                )
        raise TargetError("a size that is neither a number nor symbolic", where=self.scope, got=repr(item))


_SIZE_FUNCTIONS = frozenset(
    getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "truediv")
) | {torch.sym_max, torch.sym_min, torch.sym_float, torch.sym_int, torch.sym_not}


def is_size(node: fx.Node) -> bool:
    """Whether an fx node yields a symbolic size, kept as an int64 ``[1]`` value."""
    return node.target is torch.ops.aten.sym_size.int or node.target in _SIZE_FUNCTIONS


def _uses(graph: Graph) -> dict[str, set[str]]:
    """How each stored tensor is read: as the weight of a ``linear``, or otherwise; tied names share an entry."""
    found: dict[str, set[str]] = {}
    live = ancestors(graph.outputs)
    for node in graph.fx.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        kinds = found.setdefault(name, set())
        for tied in graph.weights.tied(name):
            kinds |= found.get(tied, set())
            found[tied] = kinds
        for user in live.intersection(node.users):
            is_weight = user.target is torch.ops.qcompiler.linear.default and user.args[1] is node
            kinds.add("linear" if is_weight and node not in (user.args[0], *user.args[2:]) else "other")
    return found


def _inline(raw: bytes, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.TensorProtocol:
    if dtype.bitwidth < 8:
        packed = np.frombuffer(raw, dtype=np.uint8)
        return ir.PackedTensor(packed, dtype, shape=ir.Shape(shape), name=name)
    return ir.tensor(np.frombuffer(raw, dtype=dtype.numpy()).reshape(shape), dtype=dtype, name=name)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it was given."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def tensor_arguments(node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """The first arguments of a call that takes tensors there."""
    found = tuple(arg for arg in node.args[:count] if isinstance(arg, fx.Node))
    if len(found) != count:
        raise TargetError("a tensor is missing", where=node.name, got=node.args[:count])
    return found


Builder = Callable[[Emitter, fx.Node], ir.Value | tuple[ir.Value, ...]]
Builders = Mapping[object, Builder]
