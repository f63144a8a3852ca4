"""What checkpoints take, how they are written, and who reads them."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from typing_extensions import Doc

import qcompiler
from qcompiler.artifacts import HFArtifact, load
from qcompiler.errors import MissingDependencyError
from qcompiler.ir import CacheFormat, Graph, is_op
from qcompiler.lowering.checkpoint import awq, card, compressed_tensors, gguf, gptq, modelopt
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.lowering.checkpoint.layers import (
    Layer,
    build_source,
    check_layers,
    fused_layers,
    planned_layers,
    written_layers,
)
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Artifact, Lowered, Reader, Support, Target, Within, choose_device
from qcompiler.storage import SOURCE_ONLY, StagedFiles, read_companions

__all__ = ["CheckpointTarget"]

_LAYOUTS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq, "modelopt": modelopt, "gguf": gguf}
_MARK = "qcompiler_version"  # in config.json


@dataclass(frozen=True)
class CheckpointTarget(Target):
    """Checkpoints that vLLM, SGLang, transformers and llama.cpp load: weights, config.json, tokenizer, model card.

    Tensors are computed as they are written, one at a time. Answers about schemes are those of vLLM 0.32 (of
    GGUF, llama.cpp): ``fused`` where it has a kernel, ``writes-only`` where no engine is known to run it.
    """

    format: Annotated[
        Literal["compressed-tensors", "gptq", "awq", "modelopt", "gguf"], Doc("The library whose layout it has.")
    ] = "compressed-tensors"
    shard_bytes: Annotated[
        int, Within(1), Doc("The most that a file of tensors holds; a larger tensor has its own.")
    ] = 5_000_000_000

    name: ClassVar[str] = "checkpoint"
    main_file: ClassVar[str | None] = "config.json"
    packages: ClassVar[Mapping[str, str]] = {"compressed_tensors": "compressed-tensors", "gguf": "gguf"}

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        return Support("fused") if scheme == Scheme() else _LAYOUTS[self.format].supports(scheme, width)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """Engines quantize caches themselves."""
        return Support(
            "refused", "a quantized cache is not written into checkpoints yet", "leave it to the engine, by its options"
        )

    def check_graph(self, graph: Graph) -> None:
        """Refuses what did not come from a Hugging Face directory, or computes what no checkpoint tells.

        Raises:
            TargetError: if so.
            MissingDependencyError: without the library whose layout it has.
        """
        module = self.format.replace("-", "_")
        if module in self.packages and importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                "writing this layout needs a package that is not installed",
                where="checkpoint",
                got=f"no module {module}",
                remedy=f"pip install {self.packages[module]}",
            )
        self._check(graph, [])

    def check_assigned(self, graph: Graph) -> None:
        """Refuses layers that the layout cannot pack, different formats of layers that engines fuse, and new tensors.

        Raises:
            TargetError: that names them.
        """
        self._check(graph, planned_layers(graph))

    def _check(self, graph: Graph, layers: list[Layer]) -> None:
        model = build_source(graph)
        check_layers(graph, layers, model)
        _LAYOUTS[self.format].check_layers(layers)
        if self.format == "gguf":
            gguf.check_model(graph, model)
        Contents(graph, model, written_layers(graph))

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes the directory; ``config.json`` appears last."""
        assert directory is not None
        layout, model, layers = _LAYOUTS[self.format], build_source(graph), written_layers(graph)
        contents = Contents(graph, model, layers)
        for layer in layers:
            layout.add_layer(contents, layer)
        _note_factors(graph, contents)
        config = _config(graph, contents)
        quantization = layout.quantization_config(contents)
        if quantization is not None:
            config["quantization_config"] = quantization
        files = read_companions(Path(str(graph.provenance["companions"])))
        files |= {name: _json(value) for name, value in layout.extra_files(contents).items()}
        files["README.md"] = card.text(graph, self.format).encode()
        files["config.json"] = _json({**config, _MARK: qcompiler.__version__})
        if self.format == "gguf":
            gguf.save(contents, graph, model, directory)
        else:
            contents.store.save(directory, max_shard_bytes=self.shard_bytes)
        with StagedFiles(directory) as staged:
            for name in sorted(files, key=lambda name: name == "config.json"):
                with staged.file(name) as write:
                    write(files[name])
        readers = self._readers(graph, contents, directory)
        written = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        report = {
            "target": self.name,
            "format": self.format,
            "path": str(directory),
            "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
            "files": written,
            "ignored": contents.ignored,
            "notes": contents.notes,
        }
        return Lowered(report, readers=readers)

    def _readers(self, graph: Graph, contents: Contents, directory: Path) -> list[Reader]:
        """transformers, for what it reads of a model that predicts tokens."""
        if self.format == "gguf":
            return [Reader(lambda: load(directory).artifact())]
        if self.format in ("gptq", "awq") and graph.signature.index_of_output("logits") is not None:
            contents.note(f"compared as qcompiler reads it back: transformers needs gptqmodel for {self.format}")
            return [Reader(lambda: load(directory).artifact())]
        if self.format != "compressed-tensors":
            contents.note(f"not compared: nothing here reads {self.format}")
            return []
        if not graph.signature.has_cache:
            contents.note("not compared: transformers reads it back as a model that predicts tokens, and this is none")
            return []
        if not any(layer.weight.is_fp4 for layer in contents.layers):
            return [Reader(lambda: HFArtifact(directory))]
        if any(_chooses_exponents(layer.activation) for layer in contents.layers):
            contents.note("not compared: readers of MXFP4 choose the scales of inputs by rules of their own")
            return []
        contents.note("transformers rounds the weights of 4-bit floats to bfloat16; engines do not")
        weights = [node.args[1] for site in graph.sites() for node in site.nodes]
        rounded = {str(node) for node in weights if is_op(node, torch.ops.qcompiler.fp4_dequantize.default)}
        return [Reader(lambda: HFArtifact(directory), dtype=torch.bfloat16, rounded=rounded)]

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """Run by transformers, in float32; GGUF as it is read back."""
        if (directory / gguf.FILE).is_file():
            return load(directory).artifact(choose_device(device))
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
    config: dict[str, Any] = {key: value for key, value in graph.provenance["config"].items() if key not in SOURCE_ONLY}
    if not contents.ties:
        config["tie_word_embeddings"] = False
    return config


def _chooses_exponents(activation: QuantSpec | None) -> bool:
    """Whether inputs are rounded to MXFP4."""
    return activation is not None and activation.is_fp4 and not activation.has_factor


def _note_factors(graph: Graph, contents: Contents) -> None:
    """Engines that fuse layers take one factor of NVFP4 for all of them: the weights of the others would be off."""
    layers = {layer.name: layer for layer in contents.layers if layer.weight.has_factor}
    worst: tuple[float, list[str]] = (1.0, [])
    for names in fused_layers(graph):
        factors = [float(contents.read(layers[name], "factor")) for name in names if name in layers]
        if factors:
            worst = max(worst, (max(factors) / min(factors), names))
    if worst[0] > 1:
        contents.note(
            f"layers that read one value have factors of their own, up to {worst[0]:.2f} times each other "
            f"({', '.join(worst[1])}): vLLM takes one for all of them, and so gets other weights; transformers does not"
        )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
