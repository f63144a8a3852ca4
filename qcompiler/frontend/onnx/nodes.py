"""An ONNX file as nodes over named values, its tensors left where they lie."""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.onnx.values import Known, known, shortest
from qcompiler.numerics import unpack_bits
from qcompiler.storage import RawTensor, WeightStore, onnx_file, open_raw

__all__ = ["Block", "Declared", "Node", "Source", "read_source"]

_STORED = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
}
_PACKED = {21: "uint4", 22: "int4", 25: "uint2", 26: "int2"}
_SCOPES = "pkg.torch.onnx.name_scopes"
_STANDARD = ("", "ai.onnx")


@dataclass
class Node:
    """One node.

    Attributes:
        op, domain: the operator.
        inputs, outputs: names of values; empty where left out.
        attributes: numbers, texts, lists of them, tensors, and `Block`s.
        name: as in the file.
        module: the path of the module that it was exported from; empty where nothing is said of it.
    """

    op: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    name: str
    module: str = ""

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.name or f"{self.op} of {self.outputs[0] if self.outputs else 'nothing'}"


@dataclass(frozen=True)
class Block:
    """Nodes inside of a node, and the values it gives."""

    nodes: list[Node]
    outputs: list[str]


@dataclass(frozen=True)
class Declared:
    """An input or output as the file declares it.

    Attributes:
        name: of the value.
        type: ONNX's number of the dtype.
        dims: numbers, names, or None where nothing is said; None for an unknown rank.
    """

    name: str
    type: int
    dims: tuple[int | str | None, ...] | None


@dataclass
class Source:
    """A model as it was read.

    Attributes:
        path: of the file.
        nodes: in order.
        inputs, outputs: as declared, without initializers.
        stored: initializers and constants by name; codes of less than 8 bits unpacked when they are read.
        versions: of operator sets, by domain.
        metadata: the file's own.
    """

    path: Path
    nodes: list[Node]
    inputs: list[Declared]
    outputs: list[Declared]
    stored: WeightStore
    versions: dict[str, int]
    metadata: dict[str, str] = field(default_factory=dict)

    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        """By value: the nodes that read it, with the place among their inputs."""
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                found.setdefault(name, []).append((node, index))
        return found

    def makers(self) -> dict[str, Node]:
        """By value: the node that makes it."""
        return {name: node for node in self.nodes for name in node.outputs if name}


def read_source(path: Path) -> Source:
    """Opens and checks a file that anybody may have written; of external data, sizes and places are checked.

    Raises:
        InputError: for a file that is none of ONNX, or contradicts itself.
        UnsupportedModelError: for values that are no tensors, and dtypes that are not read.
        WeightError: if external data cannot be opened.
    """
    where = str(path)
    model = onnx_file.parse(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    onnx_file.check_parts(model, path.parent, where)
    onnx_file.sort_nodes(model.graph, set(), where)
    tensors = {tensor.name: tensor for graph in onnx_file.graphs_of(model.graph) for tensor in graph.initializer}
    if any(graph.sparse_initializer for graph in onnx_file.graphs_of(model.graph)):
        raise UnsupportedModelError("sparse initializers are not read", where=where)
    nodes = list(_nodes(model.graph.node, tensors))
    versions = {"" if entry.domain in _STANDARD else entry.domain: entry.version for entry in model.opset_import}
    given = [port for port in model.graph.input if port.name not in tensors]
    return Source(
        path,
        nodes,
        [_declared(port, where) for port in given],
        [_declared(port, where) for port in model.graph.output],
        _store(tensors, path),
        versions,
        {entry.key: entry.value for entry in model.metadata_props},
    )


def _nodes(protos: Iterable[onnx.NodeProto], tensors: dict[str, onnx.TensorProto]) -> Iterator[Node]:
    """Nodes, but for constants that are tensors: those are added to ``tensors``."""
    for proto in protos:
        domain = "" if proto.domain in _STANDARD else proto.domain
        if domain == "" and proto.op_type == "Constant" and proto.attribute[0].name == "value":
            tensors[proto.output[0]] = proto.attribute[0].t
            continue
        attributes: dict[str, Any] = {}
        for attribute in proto.attribute:
            value = onnx.helper.get_attribute_value(attribute)
            if isinstance(value, onnx.GraphProto):
                value = Block(list(_nodes(value.node, tensors)), [port.name for port in value.output])
            elif isinstance(value, onnx.TensorProto):
                value = _in_memory(value)
            elif isinstance(value, bytes):
                value = value.decode("utf-8", errors="replace")
            elif isinstance(value, float):
                value = shortest(value)
            elif not isinstance(value, int):
                value = list(value)
            attributes[attribute.name] = value
        names = list(proto.input), list(proto.output)
        yield Node(proto.op_type, domain, *names, attributes, proto.name, _module(proto))


def _module(proto: onnx.NodeProto) -> str:
    """Exporters write the path of modules into the name of a node, or into what they note of it."""
    noted = {entry.key: entry.value for entry in proto.metadata_props}.get(_SCOPES)
    if noted is None:
        return ".".join(part for part in proto.name.split("/")[:-1] if part)
    try:
        scopes = ast.literal_eval(noted)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def _declared(port: onnx.ValueInfoProto, where: str) -> Declared:
    kind = port.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedModelError(
            "an input or output that is no tensor",
            where=f"{where}: {port.name}",
            got=(kind or "nothing").removesuffix("_type"),
            expected="a tensor",
        )
    tensor = port.type.tensor_type
    if not tensor.HasField("shape"):
        return Declared(port.name, tensor.elem_type, None)
    dims = tuple(
        size.dim_param or None if size.WhichOneof("value") != "dim_value" else int(size.dim_value)
        for size in tensor.shape.dim
    )
    if any(isinstance(size, int) and size < 0 for size in dims):
        raise InputError("a negative size", where=f"{where}: {port.name}", got=dims)
    return Declared(port.name, tensor.elem_type, dims)


def _store(tensors: dict[str, onnx.TensorProto], path: Path) -> WeightStore:
    refused = {
        name: tensor.data_type
        for name, tensor in tensors.items()
        if tensor.data_type not in _STORED and tensor.data_type not in _PACKED
    }
    if refused:
        kinds = sorted({onnx.TensorProto.DataType.Name(number) for number in refused.values()})
        raise UnsupportedModelError(
            "constants of a type that is not read",
            where=f"{path}: {', '.join(list(refused)[:4])}",
            got=", ".join(kinds),
        )
    placed: dict[str, RawTensor | Tensor] = {}
    packed = {}
    for name, tensor in tensors.items():
        is_packed = tensor.data_type in _PACKED
        shape: Sequence[int] = (onnx_file.stored_bytes(tensor),) if is_packed else tuple(tensor.dims)
        dtype = torch.uint8 if is_packed else _STORED[tensor.data_type]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location, offset = onnx_file.external_place(tensor)
            placed[name] = RawTensor(path.parent / location, dtype, tuple(shape), offset)
        else:
            placed[name] = _bytes(tensor).view(dtype).reshape(tuple(shape))
        if is_packed:
            packed[name] = tensor
    store = open_raw(placed)
    for name, tensor in packed.items():
        kind, shape = _PACKED[tensor.data_type], tuple(tensor.dims)
        store.derive(name, (name,), _unpacker(kind, shape), dtype=kind, shape=shape)
    return store


def _unpacker(kind: str, shape: tuple[int, ...]) -> Any:
    """Codes are packed over the whole tensor, the first in the low bits."""
    bits, signed = int(kind[-1]), kind.startswith("int")
    count = torch.Size(shape).numel()

    def unpack(packed: Tensor) -> Tensor:
        return unpack_bits(packed.reshape(1, -1), bits, count, signed=signed).reshape(shape)

    return unpack


def _bytes(tensor: onnx.TensorProto) -> Tensor:
    if not onnx_file.stored_bytes(tensor):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(ir.serde.TensorProtoTensor(tensor).tobytes()), dtype=torch.uint8)


def _in_memory(tensor: onnx.TensorProto) -> Known:
    """The value of an attribute; nothing is traced here."""
    if tensor.data_type not in _STORED:
        raise UnsupportedModelError("an attribute of a type that is not read", got=f"type {tensor.data_type}")
    dtype = _STORED[tensor.data_type]
    return known(_bytes(tensor).view(dtype).tolist(), dtype, tuple(tensor.dims))
