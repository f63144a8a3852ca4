"""What checkpoints take, how they are written, and who reads them."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from typing_extensions import Doc

import qcompiler
from qcompiler.artifacts import HFArtifact, StreamedArtifact, load
from qcompiler.errors import MissingDependencyError
from qcompiler.ir import CacheFormat, Graph, Site, is_expert, is_op, site_name
from qcompiler.lowering.checkpoint import awq, card, compressed_tensors, gguf, gptq, modelopt
from qcompiler.lowering.checkpoint.caches import check_cached, supports_cache
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.lowering.checkpoint.experts import check_experts, find_sources, in_source
from qcompiler.lowering.checkpoint.layers import (
    Layer,
    build_source,
    check_layers,
    fused_layers,
    planned_layers,
    written_layers,
)
from qcompiler.lowering.checkpoint.serving import are_experts_run, serving_commands
from qcompiler.lowering.checkpoint.streamed import StreamedHFArtifact
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Artifact, Compilation, Lowered, Reader, Support, Target, Within, choose_device
from qcompiler.storage import SOURCE_ONLY, StagedFiles, read_companions

__all__ = ["CheckpointTarget"]

_LAYOUTS = {
    "compressed-tensors": compressed_tensors.LAYOUT,
    "gptq": gptq.LAYOUT,
    "awq": awq.LAYOUT,
    "modelopt": modelopt.LAYOUT,
    "gguf": gguf.LAYOUT,
}
_READ_HERE = {
    "gptq": "transformers needs gptqmodel for gptq",
    "awq": "transformers needs gptqmodel for awq",
    "modelopt": "transformers does not read modelopt",
}
_MARK = "qcompiler_version"  # in config.json
_WHOLE_BYTES = 128 << 20
"""Of a model's weights in float32, up to which transformers loads it as a whole to compare."""


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

    def supports_table(self, spec: QuantSpec, width: int) -> Support:
        """What becomes of an embedding table."""
        return _LAYOUTS[self.format].supports_table(spec, width)

    @property
    def has_one_group(self) -> bool:
        """Whether the layout says the size of groups once, as AWQ's does; ModelOpt's, unless it mixes algorithms."""
        return self.format in ("awq", "modelopt")

    def ties(self, graph: Graph) -> list[list[str]]:
        """Layers that read one value."""
        return fused_layers(graph)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: engines take calibrated scales of 8-bit floats, and make all others."""
        return supports_cache(spec, self.format)

    def check_cached(self, formats: Mapping[str, CacheFormat | None]) -> None:
        """Refuses caches that are not all of one format.

        Raises:
            TargetError: that names one.
        """
        check_cached(formats)

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
        sources = find_sources(graph, model)
        check_layers(graph, layers, model)
        check_experts(graph, {layer.name: layer for layer in layers}, sources, self.format)
        _LAYOUTS[self.format].check_layers(in_source(layers, sources))
        _LAYOUTS[self.format].check_model(graph, model)
        Contents(graph, model, written_layers(graph), sources)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes the directory, ``config.json`` last; the model card comes when the readers have been compared."""
        assert directory is not None
        layout, model, layers = _LAYOUTS[self.format], build_source(graph), written_layers(graph)
        contents = Contents(graph, model, layers, find_sources(graph, model), ties_codes=layout.ties_codes)
        for layer in contents.layers:
            layout.add_layer(contents, layer)
        layout.add_caches(contents)
        _note_factors(graph, contents)
        _note_experts(contents, self.format)
        config = _config(graph, contents)
        quantization = layout.quantization_config(contents)
        if quantization is not None:
            config["quantization_config"] = quantization
        files = read_companions(Path(str(graph.provenance["companions"])))
        files |= {name: _json(value) for name, value in layout.extra_files(contents).items()}
        files["config.json"] = _json({**config, _MARK: qcompiler.__version__})
        if layout.save is not None:
            layout.save(contents, graph, model, directory)
        else:
            contents.store.save(directory, max_shard_bytes=self.shard_bytes)
        with StagedFiles(directory) as staged:
            for name in sorted(files, key=lambda name: name == "config.json"):
                with staged.file(name) as write:
                    write(files[name])
        readers = self._readers(graph, contents, directory)
        report = {"target": self.name, "format": self.format, "path": str(directory), **_sizes(directory)}
        report |= {"ignored": contents.ignored, "notes": contents.notes}

        def finish(compilation: Compilation) -> None:
            found = card.text(graph, self.format, compilation, self._serving(contents), report["weight_bytes"])
            with StagedFiles(directory) as staged, staged.file("README.md") as write:
                write(found.encode())
            report.update(_sizes(directory))

        return Lowered(report, readers=readers, finish=finish)

    def _serving(self, contents: Contents) -> dict[str, str]:
        """The commands of the engines that take what was written."""
        layout = _LAYOUTS[self.format]
        answers = [
            layout.supports_table(layer.weight, layer.columns)
            if layer.is_table
            else layout.supports(Scheme(layer.weight, layer.activation), layer.columns)
            for layer in contents.layers
        ]
        is_fused = all(answer.status == "fused" for answer in answers)
        return serving_commands(self.format, contents.layers, is_fused=is_fused)

    def _readers(self, graph: Graph, contents: Contents, directory: Path) -> list[Reader]:
        """transformers, for what it reads of a model that predicts tokens."""
        if self.format == "gguf":
            return [Reader(lambda: StreamedArtifact(load(directory).graph, directory))]
        if self.format in _READ_HERE and graph.signature.index_of_output("logits") is not None:
            contents.note(f"compared as qcompiler reads it back: {_READ_HERE[self.format]}")
            return [Reader(lambda: StreamedArtifact(load(directory).graph, directory))]
        if self.format != "compressed-tensors":
            contents.note(f"not compared: nothing here reads {self.format}")
            return []
        if not graph.signature.has_cache:
            contents.note("not compared: transformers reads it back as a model that predicts tokens, and this is none")
            return []
        if any(layer.is_table for layer in contents.layers):
            contents.note("compared as qcompiler reads it back: transformers reads no table of codes, vLLM on GPUs")
            return [Reader(lambda: StreamedArtifact(load(directory).graph, directory))]
        experts = [site for site in graph.sites() if is_expert(site)]
        if experts and contents.layers:
            return self._readers_of_experts(experts, contents, directory)
        if not any(layer.weight.is_fp4 for layer in contents.layers):
            return [_by_transformers(graph, directory)]
        if any(_chooses_exponents(layer.activation) for layer in contents.layers):
            contents.note("not compared: readers of MXFP4 choose the scales of inputs by rules of their own")
            return []
        contents.note("transformers rounds the weights of 4-bit floats to bfloat16; engines do not")
        weights = [node.args[1] for site in graph.sites() for node in site.nodes]
        rounded = {str(node) for node in weights if is_op(node, torch.ops.qcompiler.fp4_dequantize.default)}
        return [replace(_by_transformers(graph, directory), dtype=torch.bfloat16, rounded=rounded)]

    def _readers_of_experts(self, experts: list[Site], contents: Contents, directory: Path) -> list[Reader]:
        """Transformers 5.23 merges packed symmetric experts, unpacked to bfloat16; of others, it fails or errs."""
        known = {site_name(layer.stored): layer for layer in contents.layers}
        found = [known.get(site.name) for site in experts]
        formats = [None if layer is None else layer.weight for layer in found]
        if not all(spec is not None and spec.symmetric and not spec.is_float for spec in formats) or any(
            layer is not None and layer.activation is not None for layer in found
        ):
            contents.note("not compared: transformers merges packed symmetric experts alone")
            return []
        contents.note("transformers rounds the weights of experts to bfloat16; engines do not")
        rounded = {str(node.args[1]) for site in experts for node in site.nodes}
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


def _by_transformers(graph: Graph, directory: Path) -> Reader:
    """The whole model where it is small; else module by module, in few steps, as each reads all weights."""
    if 4 * int(graph.provenance["parameters"]) <= _WHOLE_BYTES:
        return Reader(lambda: HFArtifact(directory))
    return Reader(lambda: StreamedHFArtifact(directory), steps=1)


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
    """Engines that fuse layers take one scale of whole tensors for all: the weights of the others would be off."""
    parts = {
        site_name(layer.stored): (layer, "factor" if layer.weight.has_factor else "scale")
        for layer in contents.layers
        if layer.weight.is_float and layer.weight.scales_the_tensor
    }
    worst: tuple[float, list[str]] = (1.0, [])
    for names in fused_layers(graph):
        scales = [float(contents.read(*parts[name])) for name in names if name in parts]
        if scales:
            worst = max(worst, (max(scales) / min(scales), names))
    if worst[0] > 1:
        contents.note(
            f"layers that read one value have scales of whole tensors of their own, up to {worst[0]:.2f} times each "
            f"other ({', '.join(worst[1])}): vLLM takes one for all of them, and so gets other weights; transformers "
            "does not. Compiled for this target, they have one"
        )


def _sizes(directory: Path) -> dict[str, Any]:
    """``bytes`` of all files, ``weight_bytes`` of those that hold tensors, and their names."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
    tensors = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".gguf")))
    return {"bytes": sum(sizes.values()), "weight_bytes": tensors, "files": list(sizes)}


def _note_experts(contents: Contents, layout: str) -> None:
    """Engines run the experts of a mixture as one, with one scale of their inputs, and not in all formats."""
    if any(layer.input_scale is not None and layer.mixture for layer in contents.layers):
        contents.note("experts have input scales of their own: vLLM takes the largest of a mixture for all of them")
    if not are_experts_run(layout, contents.layers):
        contents.note(f"vLLM has no kernel for experts of this format in the layout of {layout}")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
