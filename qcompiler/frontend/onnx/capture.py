"""An ONNX file becomes a canonical `Graph`: traced by torch over its own names of inputs, outputs and weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.checkpoints import place_layers
from qcompiler.frontend.exporting import Exported, export
from qcompiler.frontend.onnx.activations import describe_activations
from qcompiler.frontend.onnx.interpreter import Interpreter, check_operators, live
from qcompiler.frontend.onnx.layers import Weights, find_layers
from qcompiler.frontend.onnx.naming import name_weights
from qcompiler.frontend.onnx.nodes import Source, read_source
from qcompiler.frontend.onnx.ports import Ports, find_ports
from qcompiler.ir import BATCH, PAST, SEQUENCE, TOTAL, Dim, Graph, Port, Signature, symbolic_size
from qcompiler.storage import SOURCE_ONLY

__all__ = ["capture_onnx", "has_codes"]

_EXAMPLE: dict[Dim, int] = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
_OTHER_SIZES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43)


def capture_onnx(path: Path) -> Graph:
    """The canonical graph of an ONNX file.

    Args:
        path: of the file; external data lie in its folder.

    Raises:
        InputError: for a file that is none of ONNX, or contradicts itself.
        WeightError: for external data that cannot be read, and codes and scales that do not fit each other.
        UnsupportedModelError: for operators, dtypes or ports that are not read.
    """
    source = read_source(path)
    ports = find_ports(source)
    weights = find_layers(source)
    nodes = live(weights.nodes, ports.outputs)
    check_operators(nodes, source.versions, path)
    exported, interpreter = _traced(source, ports, weights)
    graph = _graph(source, ports, weights, exported, interpreter)
    canonicalize(graph)
    name_weights(graph, nodes)
    if weights.checkpoint.layers:
        graph.provenance["checkpoint"] = weights.checkpoint.method
    place_layers(graph, weights.checkpoint, ())
    describe_activations(graph)
    return graph


def has_codes(path: Path) -> bool:
    """Whether weights of a file are codes already.

    Raises:
        QCompilerError: as `capture_onnx`.
    """
    return bool(find_layers(read_source(path)).checkpoint.layers)


def _traced(source: Source, ports: Ports, weights: Weights) -> tuple[Exported, Interpreter]:
    interpreter = Interpreter(
        weights.nodes,
        [port.name for port in ports.inputs],
        list(ports.outputs),
        weights.checkpoint.floats,
        source.versions,
        turned=weights.turned,
    )
    examples = dict(_EXAMPLE)
    for port in ports.inputs:
        for size in port.shape:
            if isinstance(size, str) and size not in examples:
                examples[size] = _OTHER_SIZES[(len(examples) - len(_EXAMPLE)) % len(_OTHER_SIZES)]
    inputs, axes = [], []
    for port in ports.inputs:
        sizes = [examples[size] if isinstance(size, str) else size for size in port.shape]
        inputs.append(torch.empty(sizes, dtype=getattr(torch, port.dtype), device="meta"))
        axes.append({axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(port.shape) if isinstance(size, str)})
    exported = export(interpreter.eval(), (tuple(inputs),), (tuple(axes),), source.path.name)
    return exported, interpreter


def _graph(source: Source, ports: Ports, weights: Weights, exported: Exported, interpreter: Interpreter) -> Graph:
    symbols = exported.symbols(Signature(tuple(ports.inputs), ()))
    outputs = []
    for (name, (role, layer, part)), value in zip(ports.outputs.items(), exported.outputs, strict=True):
        shape = tuple(symbolic_size(size, symbols) for size in value.shape)
        outputs.append(Port(name, role, str(value.dtype).removeprefix("torch."), shape, layer, part))
    signature = Signature(
        tuple(_settled(port, value, symbols) for port, value in zip(ports.inputs, exported.inputs, strict=True)),
        tuple(outputs),
    )
    store = weights.checkpoint.floats
    names = {buffer: [name] for buffer, name in interpreter.stored.items()}
    traced = exported.to_fx(signature, store, names, "")
    graph = Graph(traced, signature, store)
    read = set(graph.weight_names())
    graph.provenance.update(
        source=str(source.path),
        companions=str(source.path.parent),
        config=_config(source.path.parent),
        fingerprint=weights.checkpoint.stored.fingerprint(),
        limits=exported.limits(symbols),
        parameters=sum(torch.Size(store.info(name).shape).numel() for name in store.names() if name in read),
        onnx={"metadata": source.metadata, "opset": source.versions.get("", 1)},
    )
    return graph


def _settled(port: Port, value: Tensor, symbols: dict[str, Dim]) -> Port:
    """A port with the sizes that tracing found to be one."""
    shape = tuple(symbolic_size(size, symbols) for size in value.shape)
    return Port(port.name, port.role, port.dtype, shape, port.layer, port.part)


def _config(folder: Path) -> dict[str, Any] | None:
    """The ``config.json`` beside a file; None where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return {key: value for key, value in config.items() if key not in SOURCE_ONLY} if isinstance(config, dict) else None
