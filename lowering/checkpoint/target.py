"""What checkpoints take, how they are written, and who reads them."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from typing_extensions import Doc

import qcompiler
from qcompiler.artifacts import HFArtifact
from qcompiler.errors import MissingDependencyError
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.checkpoint import awq, card, compressed_tensors, gptq
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.numerics import Scheme
from qcompiler.protocol import Artifact, Lowered, Reader, Support, Target, choose_device
from qcompiler.storage import StagedFiles, read_companions

__all__ = ["CheckpointTarget"]

_LAYOUTS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq}
_MARK = "qcompiler_version"  # in config.json
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class CheckpointTarget(Target):
    """Checkpoints that vLLM, SGLang and transformers load: safetensors, config.json, tokenizer, model card.

    Tensors are computed as they are written, one at a time. Answers about schemes are those of vLLM 0.32: ``fused``
    where it has a kernel, ``writes-only`` where the layout holds what no engine is known to run.
    """

    format: Annotated[Literal["compressed-tensors", "gptq", "awq"], Doc("The library whose layout it has.")] = (
        "compressed-tensors"
    )

    name: ClassVar[str] = "checkpoint"
    main_file: ClassVar[str | None] = "config.json"
    packages: ClassVar[Mapping[str, str]] = {"compressed_tensors": "compressed-tensors"}

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        return Support("fused") if scheme == Scheme() else _LAYOUTS[self.format].supports(scheme, width)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """Engines quantize caches themselves."""
        return Support(
            "refused", "a quantized cache is not written into checkpoints yet", "leave it to the engine, by its options"
        )

    def check_graph(self, graph: Graph) -> None:
        """Refuses what did not come from a Hugging Face directory.

        Raises:
            TargetError: if so.
            MissingDependencyError: without the library whose layout it has.
        """
        if self.format == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
            raise MissingDependencyError(
                "writing this layout needs a package that is not installed",
                got="no module compressed_tensors",
                remedy="pip install compressed-tensors",
            )
        Contents(graph)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes the directory; ``config.json`` appears last."""
        assert directory is not None
        layout = _LAYOUTS[self.format]
        contents = Contents(graph)
        for layer in contents.layers:
            layout.add_layer(contents, layer)
        config = _config(graph, contents)
        quantization = layout.quantization_config(contents)
        if quantization is not None:
            config["quantization_config"] = quantization
        files = read_companions(Path(str(graph.provenance["companions"])))
        files |= {name: _json(value) for name, value in layout.extra_files(contents).items()}
        files["README.md"] = card.text(graph, self.format).encode()
        files["config.json"] = _json({**config, _MARK: qcompiler.__version__})
        contents.store.save(directory, max_shard_bytes=_SHARD_BYTES)
        with StagedFiles(directory) as staged:
            for name in sorted(files, key=lambda name: name == "config.json"):
                with staged.file(name) as write:
                    write(files[name])
        written = sorted(path.name for path in directory.rglob("*") if path.is_file())
        report = {
            "target": self.name,
            "format": self.format,
            "path": str(directory),
            "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
            "files": written,
            "ignored": contents.ignored,
            "notes": [],
        }
        if layout.READER is None:
            report["notes"] = [f"not compared: nothing here reads {self.format}"]
            return Lowered(report)
        return Lowered(report, readers=[Reader(lambda: HFArtifact(directory))])

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """Run by transformers, in float32."""
        return HFArtifact(directory, device=choose_device(device))

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        """By a field of ``config.json``."""
        try:
            return _MARK in json.loads((directory / "config.json").read_bytes())
        except (OSError, ValueError, TypeError):
            return False


def _config(graph: Graph, contents: Contents) -> dict[str, Any]:
    """The model's configuration; a head that is no longer the embedding is said to be none."""
    config: dict[str, Any] = dict(graph.provenance["config"])
    if not contents.ties:
        config["tie_word_embeddings"] = False
    return config


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
