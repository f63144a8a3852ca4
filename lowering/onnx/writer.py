"""Writes a graph as an ONNX folder: ``model.onnx``, ``model.onnx.data``, and what a runtime needs beside them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import InputError, TargetError, VerificationError
from qcompiler.graph import Graph, ancestors, is_op, site_name
from qcompiler.lowering.onnx.caches import CACHE_BUILDERS
from qcompiler.lowering.onnx.canonical import CANONICAL_BUILDERS, code_dtype, is_linear_weight
from qcompiler.lowering.onnx.codebooks import CODEBOOK_BUILDERS
from qcompiler.lowering.onnx.elementwise import ELEMENTWISE_BUILDERS
from qcompiler.lowering.onnx.emitter import Emitter
from qcompiler.lowering.onnx.experts import EXPERT_BUILDERS
from qcompiler.lowering.onnx.folder import copy_companions, generation_config
from qcompiler.lowering.onnx.products import PRODUCT_BUILDERS
from qcompiler.lowering.onnx.shapes import SHAPE_BUILDERS
from qcompiler.lowering.onnx.storage import DATA_FILE
from qcompiler.lowering.onnx.target import OnnxTarget
from qcompiler.model_config import declared_positions
from qcompiler.staging import StagedFiles
from qcompiler.target import Support

__all__ = ["write"]

MODEL_FILE = "model.onnx"
METADATA_PREFIX = "qcompiler."

BUILDERS = {
    **CANONICAL_BUILDERS,
    **CACHE_BUILDERS,
    **CODEBOOK_BUILDERS,
    **EXPERT_BUILDERS,
    **ELEMENTWISE_BUILDERS,
    **PRODUCT_BUILDERS,
    **SHAPE_BUILDERS,
}
_WORKING = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def write(
    graph: Graph, directory: str | Path, *, opset: int, float_dtype: str, companions: str | Path | None
) -> dict[str, Any]:
    """See `qcompiler.lowering.onnx.lower`."""
    if float_dtype not in _WORKING:
        raise TargetError("unknown float dtype", where="float_dtype", got=float_dtype, expected=" or ".join(_WORKING))
    target = OnnxTarget(opset, float_dtype)  # type: ignore[arg-type]
    final = Path(directory)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise InputError("the output is not empty", where=final, remedy="choose another directory, or remove this one")
    source = companions if companions is not None else graph.provenance.get("source")
    emitter, outputs = _emit(graph, opset, _WORKING[float_dtype])
    model = _model(graph, emitter, outputs, target)
    staging = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of an earlier process that was killed
        with StagedFiles(staging) as staged:
            with staged.file(DATA_FILE) as append:
                emitter.data.write(append)
            with staged.file(MODEL_FILE) as append:
                append(ir.serde.serialize_model(model).SerializeToString())
            copied = copy_companions(Path(source) if source else None, graph.provenance.get("config"), staged)
            settings, missing = generation_config(graph, copied, final)
            if settings is not None:
                with staged.file("genai_config.json") as append:
                    append(json.dumps(settings, indent=2).encode() + b"\n")
        _check(staging / MODEL_FILE)
        _move(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _report(graph, emitter, target, final, float_dtype=float_dtype, missing=missing)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference raise types of their own, without a common base
        raise VerificationError(
            "the ONNX checker refuses what was written", where=path.name, got=str(error).strip().splitlines()[0]
        ) from error


def _move(staging: Path, final: Path) -> None:
    try:
        os.rename(staging, final)  # onto nothing, or onto an empty directory
    except OSError as error:
        raise InputError("the output cannot be written", where=final, got=error.strerror) from error


# --- the graph -------------------------------------------------------------------------------------------------------


def _emit(graph: Graph, opset: int, working: ir.DataType) -> tuple[Emitter, list[ir.Value]]:
    emitter = Emitter(graph, opset=opset, working=working)
    live = ancestors(graph.outputs)
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        emitter.input(node, port)
    for node in graph.fx.nodes:
        if node.op == "call_function" and node in live and not (is_linear_weight(node) and node.users):
            emitter.scope = node.name
            emitter.values[node] = _builder(node)(emitter, node)
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
        value.shape = ir.Shape(port.shape)
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


def _builder(node: fx.Node) -> Callable[[Emitter, fx.Node], Any]:
    builder = BUILDERS.get(node.target)
    if builder is None:
        raise TargetError(
            "this operator has no ONNX form yet",
            where=node.name,
            got=node.target,
            expected="a canonical operator, or one of the ATen operators of decoders and encoders",
        )
    return builder


def _model(graph: Graph, emitter: Emitter, outputs: list[ir.Value], target: OnnxTarget) -> ir.Model:
    body = ir.Graph(
        emitter.inputs,
        outputs,
        nodes=emitter.nodes,
        initializers=list(emitter.initializers.values()),
        opset_imports={"": target.opset},
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
    return ir.Model(body, ir_version=target.ir_version, producer_name="qcompiler", metadata_props=metadata)


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    graph: Graph, emitter: Emitter, target: OnnxTarget, path: Path, *, float_dtype: str, missing: list[str]
) -> dict[str, Any]:
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
        sites[site_name(name.removesuffix("_codes"))] = {
            "codes": info.dtype,
            "stored": code_dtype(info.dtype, target.opset).name.lower(),
            "block": None if is_codebook else node.args[4] or None,
            "status": support.status,
            "reason": support.reason,
        }
    notes = sorted({site["reason"] for site in sites.values() if site["reason"]})
    if missing:
        notes.append(f"no genai_config.json: unknown {', '.join(missing)}")
    files = sorted(entry.name for entry in path.iterdir())
    return {
        "target": target.name,
        "path": str(path),
        "opset": target.opset,
        "ir_version": target.ir_version,
        "float_dtype": float_dtype,
        "nodes": len(emitter.nodes),
        "bytes": sum((path / name).stat().st_size for name in files),
        "weight_bytes": emitter.weight_bytes,
        "files": files,
        "sites": sites,
        "notes": notes,
    }
