"""Reads an ONNX file: its structure, types and shapes, and the small constants that rules look at."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions
from onnx.shape_inference import InferenceError

from qcompiler.errors import InputError
from qcompiler.storage import onnx_file

__all__ = ["constant_of", "is_constant", "read_model"]

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
        model, folder, where = onnx_file.parse(path), path.parent, str(path)
    onnx_file.check_parts(model, folder, where)
    stored = [tensor for graph in onnx_file.graphs_of(model.graph) for tensor in graph.initializer]
    counts = Counter(tensor.name for tensor in stored)  # graphs beside each other may use a name twice
    tensors = {tensor.name: tensor for tensor in stored if counts[tensor.name] == 1}
    skeleton = _skeleton(model, folder)
    onnx_file.sort_nodes(skeleton.graph, set(), where)
    if skeleton.functions:
        skeleton = inline_local_functions(skeleton)
    try:
        found = ir.from_proto(_infer(skeleton, where))
    except ir.serde.SerdeError as error:
        raise InputError("not a legal ONNX model", where=where, got=error.__cause__ or error) from error
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
        if tensor.data_type == onnx.TensorProto.STRING or onnx_file.stored_bytes(tensor) <= _SMALL:
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
