"""A compiled model: what `compile` returns, and `load` reads back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qcompiler
from qcompiler.artifacts.native import (
    MANIFEST,
    NativeArtifact,
    load_held_out,
    load_native,
    save_native,
)
from qcompiler.artifacts.streamed import StreamedArtifact
from qcompiler.frontend import capture_checkpoint, is_quantized_checkpoint
from qcompiler.ir import Graph, free_memory
from qcompiler.protocol import Artifact
from qcompiler.reporting import CompileReport

__all__ = ["CompileResult", "load", "native_directory"]


@dataclass(repr=False)
class CompileResult:
    """A compiled model: what `compile` returns and `load` reads back.

    Attributes:
        graph: the quantized graph.
        report: what was done.
        manifest: recipe, seed, versions and source.
        held_out: int64 ``[n, length]``, tokens that calibration did not see; what `evaluate` measures with by default.
        saved_in: the native artifact it was written to last, or read from; the report there grows with each target.
    """

    graph: Graph
    report: CompileReport
    manifest: dict[str, Any]
    held_out: Tensor | None = None
    saved_in: Path | None = None

    def __repr__(self) -> str:
        recipe = ", ".join(str(item.get("pass")) for item in self.manifest.get("recipe", ()))
        return f"<CompileResult of {recipe or 'nothing'}: {self.graph!r}, {self.report!r}>"

    def save(self, directory: str | Path) -> None:
        """Writes the native artifact to a new or empty directory; see `qcompiler.artifacts.native`."""
        save_native(self.graph, directory, self.manifest, self.report.to_dict(), self.held_out)
        self.saved_in = Path(directory).resolve()

    def artifact(self, device: str | torch.device = "cpu", *, streamed: bool | None = None) -> Artifact:
        """The compiled model, ready to run.

        Args:
            device: where it runs.
            streamed: with one segment of its weights in memory at a time. By default, where all of them in float32
                would take more than half of the memory that is free.
        """
        companions = self.graph.provenance.get("companions")
        if streamed is None:
            size = torch.float32.itemsize * int(self.graph.provenance.get("parameters", 0))
            streamed = size > free_memory(torch.device(device)) // 2
        kind = StreamedArtifact if streamed else NativeArtifact
        return kind(self.graph, Path(companions) if companions else None, device)


def load(directory: str | Path, *, trust_remote_code: bool = False) -> CompileResult:
    """Reads a native artifact (``OUT`` or ``OUT/native``), a quantized checkpoint of another program, or an ONNX file.

    Weights stay on disk until they are used. What is made of a checkpoint has an empty recipe.

    Args:
        directory: of either.
        trust_remote_code: run modelling code that a checkpoint brings along.

    Raises:
        ArtifactError: if there is none, or it is damaged.
        QCompilerError: for a checkpoint, as `qcompiler.frontend.capture_checkpoint`.
    """
    root = native_directory(Path(directory))
    if root.suffix == ".onnx" or (not (root / MANIFEST).is_file() and is_quantized_checkpoint(root)):
        return _of_checkpoint(root, trust_remote_code)
    graph, manifest, report = load_native(root)
    manifest.pop("schema")
    return CompileResult(graph, CompileReport.from_dict(report), manifest, load_held_out(root), root.resolve())


def _of_checkpoint(directory: Path, trust_remote_code: bool) -> CompileResult:
    graph = capture_checkpoint(directory, trust_remote_code=trust_remote_code)
    size = graph.weights.stored_bytes(graph.weight_names())
    report = CompileReport(
        unrecognized=list(graph.unrecognized),
        notes=[*graph.notes, *graph.lost],
        bytes_before=size,
        bytes_after=size,
        parameters=int(graph.provenance["parameters"]),
        cache_bytes_per_token=graph.signature.cache_bytes_per_token,
    )
    manifest = {"qcompiler": qcompiler.__version__, "torch": torch.__version__, "recipe": []}
    return CompileResult(graph, report, manifest)


def native_directory(path: Path) -> Path:
    """``OUT/native`` of ``OUT``; any other path as it is."""
    return path / "native" if (path / "native" / MANIFEST).is_file() else path
