"""Writes a graph as a folder for ONNX Runtime and onnxruntime-genai."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from qcompiler.errors import TargetError
from qcompiler.frontend import declared_positions
from qcompiler.ir import Graph
from qcompiler.lowering.onnx.folder import generation_config
from qcompiler.lowering.onnx.writer import Emitted, companion_files, emit, store
from qcompiler.lowering.ort.cuda import nodes_off_cuda
from qcompiler.lowering.ort.dialect import DOMAIN, ort_dialect
from qcompiler.lowering.ort.fusing import fuse
from qcompiler.lowering.ort.installed import check_installed
from qcompiler.lowering.ort.levels import choose_level
from qcompiler.lowering.ort.sharing import shares_caches
from qcompiler.lowering.ort.target import OrtTarget
from qcompiler.protocol import Compilation, Support
from qcompiler.storage import StagedFiles

__all__ = ["CHOICES_FILE", "check", "finish", "write"]

CHOICES_FILE = "ort.json"


def check(graph: Graph, target: OrtTarget) -> None:
    """Refuses what cannot be written, or run by the ONNX Runtime that is installed, ahead of the weights.

    Raises:
        TargetError: for operators, options or versions.
        InputError: if a file that goes beside the model cannot be read.
    """
    emitted = emit(_fused(graph, target), ort_dialect(target.float_dtype))
    generation_config(graph, companion_files(graph))
    check_installed(emitted.model)


def write(graph: Graph, directory: Path, target: OrtTarget) -> dict[str, Any]:
    """Fills a directory; products are exact until `finish` has chosen.

    Raises:
        TargetError: for what has no form.
        ResourceError: if the disk is full.
    """
    files = companion_files(graph)
    fused = _fused(graph, target)
    emitted = emit(fused, ort_dialect(target.float_dtype))
    is_shared = shares_caches(emitted.model)
    settings, missing = generation_config(
        fused, files, shares_buffer=is_shared, provider="cuda" if target.float_dtype == "float16" else None
    )
    if settings is not None:
        files["genai_config.json"] = json.dumps(settings, indent=2).encode() + b"\n"
    store(emitted, directory, files)
    _write_choices(directory, {"accuracy_level": 0})
    return _report(graph, emitted, target, directory, missing, is_shared=is_shared)


def finish(directory: Path, report: dict[str, Any], wanted: int | str, compilation: Compilation) -> None:
    """Sets the accuracy level that was asked for, or that the text of a compilation allows."""
    if any(site["operator"] == "MatMulNBits" for site in report["sites"].values()):
        chosen = choose_level(directory, wanted, compilation.tokens)
        report.update(chosen.to_dict())
        report["notes"].append(str(chosen))
        _write_choices(directory, chosen.to_dict())
        report["bytes"] = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())


def _write_choices(directory: Path, choices: dict[str, Any]) -> None:
    with StagedFiles(directory) as staged, staged.file(CHOICES_FILE) as append:
        append(json.dumps(choices, indent=2).encode() + b"\n")


def _fused(graph: Graph, target: OrtTarget) -> Graph:
    """What is written; tables of positions are as long as sequences may be.

    Raises:
        TargetError: if more are asked for than the model has.
    """
    positions = declared_positions(graph.provenance.get("config"))
    if target.length is not None and positions is not None and target.length > positions:
        raise TargetError(
            "sequences longer than the model's positions",
            where="length",
            got=target.length,
            expected=f"at most {positions}",
        )
    return fuse(graph, target.length or positions)


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    graph: Graph, emitted: Emitted, target: OrtTarget, directory: Path, missing: list[str], *, is_shared: bool
) -> dict[str, Any]:
    emitter = emitted.emitter
    widths = {site.name: site.in_features for site in graph.sites()}
    sites = {}
    for name, scheme in graph.schemes.items():
        support = target.supports(scheme, widths[name]) if name in widths else Support("runs")
        operator = "MatMulNBits" if emitter.products.get(name, "").endswith("/MatMulNBits") else "MatMul"
        sites[name] = {"status": support.status, "reason": support.reason, "operator": operator}
    counts = Counter(node.op_type for node in emitter.nodes if node.domain == DOMAIN)
    notes = sorted({site["reason"] for site in sites.values() if site["reason"]})
    if missing:
        notes.append(f"no genai_config.json: unknown {', '.join(missing)}")
    off_cuda = nodes_off_cuda(emitted.model) if target.float_dtype == "float16" else []
    if off_cuda:
        notes.append(f"on CUDA, {len(off_cuda)} nodes run on the CPU, such as {off_cuda[0]}")
    files = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    return {
        "target": target.name,
        "path": str(directory),
        "opset": emitter.opset,
        "float_dtype": target.float_dtype,
        "nodes": len(emitter.nodes),
        "operators": dict(sorted(counts.items())),
        "shared_caches": is_shared,
        "off_cuda": off_cuda,
        "bytes": sum((directory / name).stat().st_size for name in files),
        "weight_bytes": emitter.weight_bytes,
        "files": files,
        "sites": sites,
        "notes": notes,
    }
