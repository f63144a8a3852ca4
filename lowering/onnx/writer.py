"""Writes a graph as an ONNX folder: ``model.onnx``, ``model.onnx.data``, and what a runtime needs beside them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError, VerificationError
from qcompiler.frontend import declared_positions
from qcompiler.ir import (
    Graph,
    ancestors,
    is_op,
    site_name,
)
from qcompiler.lowering.onnx import folder
from qcompiler.lowering.onnx.builders.canonical import code_dtype, is_linear_weight, weight_code_dtype
from qcompiler.lowering.onnx.dialect import BUILDERS, Dialect, portable
from qcompiler.lowering.onnx.emitter import Builders, Emitter
from qcompiler.lowering.onnx.storage import DATA_FILE
from qcompiler.lowering.onnx.target import OPSETS, OnnxTarget
from qcompiler.protocol import Support
from qcompiler.storage import StagedFiles, filled_directory

__all__ = ["MODEL_FILE", "Emitted", "check", "companion_files", "emit", "store", "write"]

MODEL_FILE = "model.onnx"
METADATA_PREFIX = "qcompiler."


def write(
    graph: Graph, directory: str | Path, target: OnnxTarget, *, companions: str | Path | None = None
) -> dict[str, Any]:
    """See `qcompiler.lowering.onnx.lower`."""
    target = _high_enough(graph, target)
    files = companion_files(graph, companions)
    settings, missing = folder.generation_config(graph, files)
    if settings is not None:
        files["genai_config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
    emitted = emit(graph, portable(target))
    store(emitted, directory, files)
    return _report(graph, emitted.emitter, target, Path(directory), missing)


def check(graph: Graph, target: OnnxTarget) -> None:
    """See `OnnxTarget.check_graph`: everything that `write` does ahead of the weights."""
    target = _high_enough(graph, target)
    folder.generation_config(graph, companion_files(graph))
    emit(graph, portable(target))


def companion_files(graph: Graph, companions: str | Path | None = None) -> dict[str, bytes]:
    """The files that go beside the model, by name: of a directory, by default that which the model came from.

    Raises:
        InputError: if one cannot be read.
    """
    source = companions or graph.provenance.get("companions") or graph.provenance.get("source")
    return folder.companions(Path(source) if source else None, graph.provenance.get("config"))


@dataclass(frozen=True)
class Emitted:
    """A graph as ONNX, its weights not read yet.

    Attributes:
        model: with external weights.
        emitter: what grew it: it produces the weights, and knows which nodes came of what.
    """

    model: ir.Model
    emitter: Emitter


def emit(graph: Graph, dialect: Dialect) -> Emitted:
    """All of a model but the bytes of its weights.

    Raises:
        TargetError: for an operator, dtype or size that has no form in the dialect.
    """
    emitter, outputs = _emit(graph, dialect)
    return Emitted(_model(graph, emitter, outputs, dialect), emitter)


def store(emitted: Emitted, directory: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes ``model.onnx``, ``model.onnx.data`` and what goes beside them, one weight in memory at a time.

    Raises:
        InputError: if the directory is not empty or cannot be written.
        ResourceError: if the disk is full.
        VerificationError: if the checker refuses the result.
    """
    with filled_directory(directory, last=MODEL_FILE) as place:
        with StagedFiles(place) as staged:
            with staged.file(DATA_FILE) as append:
                emitted.emitter.data.write(append)
            with staged.file(MODEL_FILE) as append:
                append(ir.serde.serialize_model(emitted.model).SerializeToString())
            for name, content in files.items():
                with staged.file(name) as append:
                    append(content)
        _check(place / MODEL_FILE)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference raise types of their own, without a common base
        raise VerificationError(
            "the ONNX checker refuses what was written", where=path.name, got=str(error).strip().splitlines()[0]
        ) from error


# --- the graph -------------------------------------------------------------------------------------------------------


def _emit(graph: Graph, dialect: Dialect) -> tuple[Emitter, list[ir.Value]]:
    emitter = Emitter(
        graph,
        opset=dialect.opset,
        working=dialect.working,
        unsigned_products=dialect.unsigned_products,
        ports=dialect.ports,
    )
    builders = {**BUILDERS, **dialect.builders}
    live = ancestors(graph.outputs)
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        emitter.input(node, port)
    calls = [
        node
        for node in graph.fx.nodes
        if node.op == "call_function" and node in live and not (is_linear_weight(node) and node.users)
    ]
    _check_operators(calls, builders)
    for node in calls:
        emitter.scope = node.name
        try:
            emitter.values[node] = builders[node.target](emitter, node)
        except TargetError as error:
            if error.where in (None, node.name):
                error.where = _place(node)
            raise
    outputs: list[ir.Value] = []
    given = {value.name for value in emitter.inputs}
    for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
        emitter.scope = port.name
        value = emitter.value(node)
        if port.role != "present" and port.dtype == "float32":
            value = emitter.cast(value, ir.DataType.FLOAT)
        if value.name in given or value.name in emitter.initializers or any(value is other for other in outputs):
            result = ir.Value(type=value.type)
            emitter.nodes.append(
                ir.node("Identity", [value], outputs=[result], name=emitter.unique(f"{port.name}/Identity"))
            )
            value = result
        value.name = port.name
        value.shape = ir.Shape(dialect.ports.get(port.name, (None, port.shape))[1])
        outputs.append(value)
    _prune(emitter, outputs)
    return emitter, outputs


def _prune(emitter: Emitter, outputs: list[ir.Value]) -> None:
    """Drops what no output needs: sizes whose use became a constant."""
    needed = set(outputs)
    kept: list[ir.Node] = []
    for node in reversed(emitter.nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(value for value in node.inputs if value is not None)
    emitter.nodes = kept[::-1]
    emitter.initializers = {name: value for name, value in emitter.initializers.items() if value in needed}


def _check_operators(calls: Iterable[fx.Node], builders: Builders) -> None:
    unknown: dict[object, fx.Node] = {}
    for node in calls:
        if node.target not in builders:
            unknown.setdefault(node.target, node)
    if unknown:
        raise TargetError(
            f"{'this operator has' if len(unknown) == 1 else 'these operators have'} no ONNX form yet",
            where=_place(next(iter(unknown.values()))),
            got=", ".join(map(str, unknown)),
            expected="canonical operators, and the ATen operators of decoders and encoders",
            remedy="leave this target out: the native artifact runs every operator",
        )


def _place(node: fx.Node) -> str:
    """The name of a node, and the stored tensor nearest to it, which tells its place in the model."""
    seen, ring = {node}, [node]
    while ring:
        for near in ring:
            if near.op == "get_attr":
                return f"{node.name}, near {near.target}"
        ring = [item for near in ring for item in (*near.all_input_nodes, *near.users)]
        ring = [item for item in dict.fromkeys(ring) if item not in seen]
        seen.update(ring)
    return node.name


def _model(graph: Graph, emitter: Emitter, outputs: list[ir.Value], dialect: Dialect) -> ir.Model:
    domains = sorted({node.domain for node in emitter.nodes} - {""})
    body = ir.Graph(
        emitter.inputs,
        outputs,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": dialect.opset, **{name: dialect.domains[name] for name in domains}},
        name="model",
    )
    facts = {
        "parameters": graph.provenance.get("parameters"),
        "max_positions": declared_positions(graph.provenance.get("config")),
        "weight_bytes": emitter.weight_bytes,
        "fingerprint": graph.provenance.get("fingerprint"),
        "source": graph.provenance.get("source"),
        "in_memory": graph.provenance.get("in_memory"),
        "schemes": {site: scheme.to_dict() for site, scheme in graph.schemes.items()},
    }
    metadata = {METADATA_PREFIX + key: json.dumps(value) for key, value in facts.items() if value is not None}
    if usual := folder.usual_names(graph):
        metadata[f"{METADATA_PREFIX}ports"] = json.dumps(usual)
    metadata |= _kept_metadata(graph)
    return ir.Model(body, ir_version=dialect.ir_version, producer_name="qcompiler", metadata_props=metadata)


def _kept_metadata(graph: Graph) -> dict[str, str]:
    """What a model that came from ONNX had beside its graph, but for what an earlier writing of ours said of it."""
    given = graph.provenance.get("onnx", {}).get("metadata", {})
    return {key: value for key, value in given.items() if not key.startswith(METADATA_PREFIX)}


def _high_enough(graph: Graph, target: OnnxTarget) -> OnnxTarget:
    """The target with an operator set no lower than that of the ONNX model a graph came from."""
    given = graph.provenance.get("onnx", {}).get("opset", 0)
    return replace(target, opset=min(given, max(OPSETS))) if given > target.opset else target


# --- the report ------------------------------------------------------------------------------------------------------


def _report(graph: Graph, emitter: Emitter, target: OnnxTarget, path: Path, missing: list[str]) -> dict[str, Any]:
    sites: dict[str, dict[str, Any]] = {}
    for node in graph.fx.nodes:
        is_codebook = is_op(node, torch.ops.qcompiler.codebook_dequantize.default)
        if not (is_codebook or is_linear_weight(node)) or not node.users:
            continue
        name = str(node.args[0].target)
        info = graph.weights.info(name)
        scheme = graph.schemes.get(site_name(name.removesuffix("_codes")))
        support = (
            target.supports(scheme, info.shape[1]) if scheme is not None else Support("runs", "its scheme is not known")
        )
        if is_codebook:
            stored = code_dtype(info.dtype, target.opset)
        else:
            stored = weight_code_dtype(node, graph, target.opset, unsigned=emitter.unsigned_products)
        sites[site_name(name.removesuffix("_codes"))] = {
            "codes": info.dtype,
            "stored": stored.name.lower(),
            "block": None if is_codebook else node.args[4] or None,
            "status": support.status,
            "reason": support.reason,
        }
    notes = sorted({site["reason"] for site in sites.values() if site["reason"]})
    if missing:
        notes.append(f"no genai_config.json: unknown {', '.join(missing)}")
    files = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    return {
        "target": target.name,
        "path": str(path),
        "opset": target.opset,
        "ir_version": target.ir_version,
        "float_dtype": target.float_dtype,
        "nodes": len(emitter.nodes),
        "bytes": sum((path / name).stat().st_size for name in files),
        "weight_bytes": emitter.weight_bytes,
        "files": files,
        "sites": sites,
        "notes": notes,
    }
