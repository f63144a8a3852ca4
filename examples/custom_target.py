"""A target of your own in one file: `FloatCheckpoint`, for tools that know no codes.

``qcompiler compile MODEL -r w4a16-gptq --calib TEXT --to examples/custom_target.py:FloatCheckpoint -o OUT``
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from safetensors.torch import save_file
from typing_extensions import Doc

import qcompiler as qc
from qcompiler.extend import Artifact, Graph, Lowered, Reader, Scheme, Support, Target


@dataclass(frozen=True)
class FloatCheckpoint(Target):
    """A Hugging Face directory of float weights: those that the codes stand for."""

    dtype: Annotated[Literal["float32", "bfloat16"], Doc("Of the weights; bfloat16 rounds them once more.")] = "float32"

    name: ClassVar[str] = "float_checkpoint"
    main_file: ClassVar[str | None] = "model.safetensors"
    packages: ClassVar[Mapping[str, str]] = {"safetensors": "safetensors"}

    def supports(self, scheme: Scheme, width: int) -> Support:
        """Weights alone: a float checkpoint rounds no inputs."""
        if scheme.activation is not None:
            return Support("refused", "a float checkpoint rounds no inputs", "choose a recipe of weights alone")
        return Support("runs", "as float weights")

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes the weights under the names that they had, and the files that lie beside them."""
        assert directory is not None
        dtype = getattr(torch, self.dtype)
        tensors = {site.weight: graph.read_weight(site).to(dtype) for site in graph.sites()}
        for name in graph.weights.names():
            if name in graph.weight_names() and not name.startswith(tuple(f"{weight}_" for weight in tensors)):
                tensors.setdefault(name, graph.weights.read(name).to(dtype))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        for path in Path(graph.provenance["companions"]).glob("*token*.json"):
            shutil.copy(path, directory)
        (directory / "config.json").write_text(json.dumps(graph.provenance["config"]))
        report = {"notes": [], "bytes": (directory / "model.safetensors").stat().st_size}
        tolerance = 1e-3 if self.dtype == "float32" else 5e-2
        return Lowered(report, readers=[Reader(lambda: qc.open_artifact(directory), tolerance=tolerance)])

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """Run by transformers."""
        return qc.open_artifact(directory, device=device)
