"""Opens an ONNX file that anybody may have written, and holds its parts to each other, with the weights left on disk.

Source: the ONNX specification (IR.md: unique names, nodes in topological order, external data below the model's
folder) and protobuf's limit of 2 GiB for a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qcompiler.errors import InputError, ResourceError

if TYPE_CHECKING:  # this module is imported where nobody has ONNX, too
    import onnx

__all__ = ["check_parts", "external_place", "graphs_of", "parse", "sort_nodes", "stored_bytes"]

_MOST_BYTES = (1 << 31) - 1


def parse(path: Path) -> onnx.ModelProto:
    """The message in a file.

    Raises:
        InputError: for none, or one that is no model's.
        ResourceError: if the memory does not suffice.
    """
    import onnx
    from google.protobuf.message import DecodeError

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


def check_parts(model: onnx.ModelProto, folder: Path | None, where: str) -> None:
    """Holds names, attributes, constants and external data to what ONNX says of them.

    Args:
        model: not changed.
        folder: that of the file; None where external data need not exist yet.
        where: what errors name.

    Raises:
        InputError: for what does not.
    """
    import onnx

    _check_nodes(model, where)
    for graph in graphs_of(model.graph):
        for tensor in (*graph.initializer, *_attribute_tensors(graph)):
            _check_values(tensor, where)
            if tensor.data_location == onnx.TensorProto.EXTERNAL and folder is not None:
                _check_external(tensor, folder, where)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graphs_of(inner)


def _attribute_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _check_nodes(model: onnx.ModelProto, where: str) -> None:
    """Holds names to text, and attributes to the types that operators of ONNX give them."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for graph in graphs_of(model.graph):
        named = [*graph.initializer, *graph.input, *graph.output, *graph.value_info]
        texts = [graph.name, *(each.name for each in named)]
        for node in graph.node:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            texts += [attribute.name for attribute in node.attribute]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("names that are no text", where=where, expected="UTF-8")
        for node in graph.node:
            known = _attribute_types(node, versions)
            for attribute in node.attribute:
                if attribute.type != known.get(attribute.name, attribute.type) or not attribute.type:
                    raise InputError(
                        "an attribute of another type than ONNX gives it",
                        where=f"{where}: {_called(node)}",
                        got=f"{attribute.name}, of type {attribute.type}",
                    )


def _attribute_types(node: onnx.NodeProto, versions: Mapping[str, int]) -> dict[str, int]:
    import onnx

    version = versions.get(node.domain, 0)
    if not version or not onnx.defs.has(node.op_type, version, node.domain):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    return {name: attribute.type.value for name, attribute in schema.attributes.items()}  # type: ignore[attr-defined]


def _check_values(tensor: onnx.TensorProto, where: str) -> None:
    """Holds a constant to its type and shape."""
    import onnx
    import onnx_ir as ir

    known = tensor.data_type in list(ir.DataType) and tensor.data_type != onnx.TensorProto.UNDEFINED
    if not known or any(size < 0 for size in tensor.dims):
        raise InputError(
            "a constant of no known type or shape",
            where=f"{where}: {tensor.name}",
            got=f"type {tensor.data_type}, shape {list(tensor.dims)}",
        )
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.data_type == onnx.TensorProto.STRING:
        return
    got, expected = len(tensor.raw_data), stored_bytes(tensor)
    if not tensor.HasField("raw_data"):
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        got = expected if not expected or any(fields) else 0
    if got != expected:
        raise InputError(
            "a constant with values that do not fill its shape",
            where=f"{where}: {tensor.name}",
            got=f"{got:,} bytes",
            expected=f"{expected:,} bytes for {list(tensor.dims)}",
        )


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
        offset, wanted = int(entry.get("offset", "0")), stored_bytes(tensor)
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


def _external(tensor: onnx.TensorProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def external_place(tensor: onnx.TensorProto) -> tuple[str, int]:
    """The file of external data, relative to the model's folder, and where in it they begin; once checked."""
    entry = _external(tensor)
    return entry["location"], int(entry.get("offset", "0"))


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of this type and shape takes."""
    import onnx_ir as ir

    elements = 1
    for size in tensor.dims:
        elements *= size
    return -(-elements * ir.DataType(tensor.data_type).bitwidth // 8)


def sort_nodes(graph: onnx.GraphProto, outer: set[str], where: str) -> None:
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
        copies = [type(node)() for _ in nodes]
        for copy, node in zip(copies, nodes, strict=True):
            copy.CopyFrom(node)
        del graph.node[:]
        graph.node.extend(copies)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                sort_nodes(inner, known | set(makers), where)


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
