"""Reads an ONNX file that anybody may have written: its structure, types and shapes, with the weights left on disk.

Source: the ONNX specification (IR.md: unique names, nodes in topological order, external data below the model's
folder) and protobuf's limit of 2 GiB for a message.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.inliner import inline_local_functions
from onnx.shape_inference import InferenceError

from qcompiler.errors import InputError, ResourceError

__all__ = ["constant_of", "is_constant", "read_model"]

_MOST_BYTES = onnx.checker.MAXIMUM_PROTOBUF
_SMALL = 1024  # bytes of a constant that shape inference may want to look at
_MOST_READ = 256 << 20  # bytes of a constant whose values a rule may want to look at
_STUB = "left in the model"
_CONSTANT = "is constant"
_SAME_VALUES = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Flatten", "Expand")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


def read_model(source: str | Path | ir.Model) -> ir.Model:
    """A model with inferred types and shapes, local functions inlined, and nodes in topological order.

    Weights are neither loaded nor copied. What depends on constants alone is marked, see `is_constant`.

    Args:
        source: an ONNX file; or a model in memory, which is not changed and whose external data need not exist yet.

    Raises:
        InputError: for a file that is none of ONNX's or larger than a protobuf may be, external data that is missing,
            too short or outside the folder, values that nothing makes or that two nodes make, cycles, and types or
            shapes that do not fit.
        ResourceError: if the memory does not suffice.
    """
    if isinstance(source, ir.Model):
        model, folder, where = ir.to_proto(source), None, source.graph.name or "the model"
    else:
        path = Path(source)
        model, folder, where = _parse(path), path.parent, str(path)
    tensors = {tensor.name: tensor for graph in _graphs(model.graph) for tensor in graph.initializer}
    for tensor in [*tensors.values(), *_attribute_tensors(model.graph)]:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and folder is not None:
            _check_external(tensor, folder, where)
    skeleton = _skeleton(model, folder)
    _sort(skeleton.graph, set(), where)
    if skeleton.functions:
        skeleton = inline_local_functions(skeleton)
    found = ir.from_proto(_infer(skeleton, where))
    for graph in (found.graph, *found.graph.subgraphs()):
        for name, value in graph.initializers.items():
            if name in tensors:
                value.const_value = _lazy(tensors[name], folder)
        _mark_constants(graph)
    return found


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value of a model that `read_model` gave depends on constants alone."""
    return value is not None and bool(value.meta.get(_CONSTANT, False))


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Values of a constant, also behind operators that leave them as they are; in any shape.

    None where it is computed, not known before the model runs, not written yet, or very large.
    """
    while value is not None:
        node = value.producer()
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return _values(tensor)
        if node is None or node.op_type not in _SAME_VALUES:
            return None
        value = node.inputs[0]
    return None


def _values(tensor: ir.TensorProtocol) -> np.ndarray | None:
    if tensor.dtype == ir.DataType.STRING or tensor.nbytes > _MOST_READ:
        return None
    try:
        return np.asarray(tensor.numpy())
    except FileNotFoundError:  # of a model that is still being written
        return None


def _parse(path: Path) -> onnx.ModelProto:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise InputError("a file cannot be read", where=path, got=error.strerror) from error
    if size is None:
        raise InputError("no such file", where=path, expected="an ONNX file, such as OUT/onnx/model.onnx")
    if size > _MOST_BYTES:
        raise InputError(
            "an ONNX file is larger than a protobuf message may be",
            where=path,
            got=f"{size:,} bytes",
            expected=f"at most {_MOST_BYTES:,}",
            remedy="save it with external data: onnx.save_model(model, path, save_as_external_data=True)",
        )
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise InputError("not an ONNX file", where=path, got="no protobuf message of a model") from error
    except MemoryError as error:
        raise ResourceError("not enough memory for an ONNX file", where=path, got=f"{size:,} bytes") from error
    except OSError as error:
        raise InputError("a file cannot be read", where=path, got=error.strerror) from error
    if not model.HasField("graph") or not model.opset_import:
        raise InputError("not an ONNX model", where=path, got="no graph" if model.opset_import else "no opset")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for each in _graphs(graph):
        for node in each.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t


def _external(tensor: onnx.TensorProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of this type and shape takes."""
    elements = 1
    for size in tensor.dims:
        elements *= size
    return -(-elements * ir.DataType(tensor.data_type).bitwidth // 8)


def _check_external(tensor: onnx.TensorProto, folder: Path, where: str) -> None:
    """Holds external data to the folder of the model, and to the length that type and shape ask for."""
    entry = _external(tensor)
    location = entry.get("location", "")
    pure = PurePosixPath(location)
    file = folder / location
    if not location or pure.is_absolute() or ".." in pure.parts or not _lies_in(file, folder):
        raise InputError(
            "external data outside the folder of the model",
            where=f"{where}: {tensor.name}",
            got=location or "no location",
            expected=f"a file in {folder}",
        )
    if not file.is_file():
        raise InputError("external data is missing", where=f"{where}: {tensor.name}", got=file, expected="a file")
    try:
        offset, wanted = int(entry.get("offset", "0")), _nbytes(tensor)
        length = int(entry.get("length", wanted))
    except ValueError as error:
        raise InputError("external data with no number for its place", where=f"{where}: {tensor.name}") from error
    size = file.stat().st_size
    if offset < 0 or length < wanted or offset + length > size:
        raise InputError(
            "external data is too short",
            where=f"{where}: {tensor.name}",
            got=f"{max(0, min(length, size - offset)):,} bytes at {offset:,} of {file.name}, which has {size:,}",
            expected=f"{wanted:,} bytes for {list(tensor.dims)}",
        )


def _lies_in(file: Path, folder: Path) -> bool:
    """Links followed."""
    return file.resolve().is_relative_to(folder.resolve())


def _skeleton(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """The model with small constants in it, and of all others only what they are."""
    found = onnx.ModelProto(ir_version=model.ir_version)
    found.opset_import.extend(model.opset_import)
    found.functions.extend(model.functions)
    _copy_graph(model.graph, found.graph, folder)
    return found


def _copy_graph(graph: onnx.GraphProto, into: onnx.GraphProto, folder: Path | None) -> None:
    into.name = graph.name
    into.node.extend(graph.node)
    into.input.extend(graph.input)
    into.output.extend(graph.output)
    into.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if tensor.data_type == onnx.TensorProto.STRING or _nbytes(tensor) <= _SMALL:
            values = _values(_lazy(tensor, folder)) if is_external and folder is not None else None
            if not is_external or values is not None:
                into.initializer.append(tensor if values is None else _inline(tensor, values))
                continue
        stub = into.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = onnx.TensorProto.EXTERNAL
        stub.external_data.add(key="location", value=_STUB)


def _inline(tensor: onnx.TensorProto, values: np.ndarray) -> onnx.TensorProto:
    return ir.serde.serialize_tensor(ir.tensor(values, dtype=ir.DataType(tensor.data_type), name=tensor.name))


def _lazy(tensor: onnx.TensorProto, folder: Path | None) -> ir.TensorProtocol:
    found = ir.serde.deserialize_tensor(tensor)
    if isinstance(found, ir.ExternalTensor) and folder is not None:
        found.base_dir = str(folder)
    return found


def _sort(graph: onnx.GraphProto, outer: set[str], where: str) -> None:
    """Puts nodes behind what they read, also inside of nodes.

    Raises:
        InputError: for a value that nothing makes, that two make, and for cycles.
    """
    known = outer | {port.name for port in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    makers: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        for name in (name for name in node.output if name):
            if name in makers or name in known - outer:
                raise InputError("a value is made twice", where=f"{where}: {name}", got=f"by {_called(node)} again")
            makers[name] = place
    reads = [[name for name in _reads(node) if name] for node in graph.node]
    for node, names in zip(graph.node, reads, strict=True):
        for name in names:
            if name not in known and name not in makers:
                raise InputError(
                    "a value that nothing makes",
                    where=f"{where}: {_called(node)}",
                    got=name,
                    expected="an input, an initializer, or what another node makes",
                )
    for port in graph.output:
        if port.name not in known and port.name not in makers:
            raise InputError("an output that nothing makes", where=f"{where}: {port.name}")
    order = _order([{makers[name] for name in names if name in makers} for names in reads])
    if len(order) < len(graph.node):
        stuck = sorted(set(range(len(graph.node))) - set(order))
        raise InputError(
            "a cycle: nodes that wait for each other",
            where=f"{where}: {', '.join(_called(graph.node[i]) for i in stuck[:4])}",
            got=f"{len(stuck)} nodes",
            expected="a graph without cycles",
        )
    nodes = [graph.node[i] for i in order]
    if order != list(range(len(order))):
        copies = [onnx.NodeProto() for _ in nodes]
        for copy, node in zip(copies, nodes, strict=True):
            copy.CopyFrom(node)
        del graph.node[:]
        graph.node.extend(copies)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _sort(inner, known | set(makers), where)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads from its graph, also by the graphs inside of it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            own = {port.name for port in inner.input} | {tensor.name for tensor in inner.initializer}
            own |= {name for each in inner.node for name in each.output}
            for each in inner.node:
                yield from (name for name in _reads(each) if name not in own)


def _order(after: list[set[int]]) -> list[int]:
    """Numbers in an order in which each comes behind those it names, near to the given one; cycles are left out."""
    behind: list[list[int]] = [[] for _ in after]
    for i, before in enumerate(after):
        for j in before:
            behind[j].append(i)
    waits = [len(before) for before in after]
    ready = [i for i in reversed(range(len(after))) if not waits[i]]
    found = []
    while ready:
        i = ready.pop()
        found.append(i)
        for j in reversed(behind[i]):
            waits[j] -= 1
            if not waits[j]:
                ready.append(j)
    return found


def _called(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} of {node.output[0] if node.output else 'nothing'}"


def _infer(skeleton: onnx.ModelProto, where: str) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True)
    except (InferenceError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            "types or shapes that do not fit",
            where=where,
            got=lines[0] if lines else type(error).__name__,
            expected="a model that ONNX's shape inference accepts",
        ) from error


def _mark_constants(graph: ir.Graph) -> None:
    """Marks initializers and what is computed from them alone."""
    for value in graph.initializers.values():
        value.meta[_CONSTANT] = True
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        known = all(is_constant(value) for value in inputs) and node.op_type not in _RANDOM
        if known and (inputs or node.op_type == "Constant"):
            for output in node.outputs:
                output.meta[_CONSTANT] = True
