"""The native artifact: the quantized graph as data (no code, no pickle), saved, loaded and run.

It is no Hugging Face checkpoint and must not be taken for one: whoever loaded it as such would get codes or random
numbers for weights. Its weights have names of their own (``weights.safetensors``), and its ``config.json`` says so in
the two fields that loaders look at; `read_companions` takes them out again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import ArtifactError, InputError, RecipeError
from qcompiler.frontend import declared_positions
from qcompiler.ir import Graph, Stretch, activation_rounding, cache_rounding, feed
from qcompiler.reporting import render_report, strict_json
from qcompiler.storage import StagedFiles, WeightStore, filled_directory, read_companions

__all__ = ["MANIFEST", "SCHEMA", "NativeArtifact", "add_target", "load_held_out", "load_native", "save_native"]

SCHEMA = 2
MANIFEST = "manifest.json"
_GRAPH = "graph.json"
_REPORT = "report.json"
_REPORT_PAGE = "report.html"
_HELD_OUT = "held_out.json"
_WEIGHTS = "weights"
_NOT_FOR_OTHERS = {
    "quantization_config": {"quant_method": "qcompiler"},
    "transformers_weights": "none here. This model was compiled by qcompiler: run it with qcompiler.load(DIR), "
    "`qcompiler generate DIR`, or lower it to ONNX with `qcompiler.lower(DIR, 'onnx', OUT)`",
}


def save_native(
    graph: Graph,
    directory: str | Path,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    held_out: Tensor | None = None,
) -> None:
    """Writes a graph to a directory, which must not exist or be empty.

    Everything is written and synced to a hidden directory inside it first, and moved from there at the end, the
    manifest last: a directory without one is no artifact. Nothing is left behind if writing fails. Weights are
    streamed, one at a time in memory. See `qcompiler.storage.staging.filled_directory`.

    Args:
        graph: quantized or not.
        directory: made if missing.
        manifest: recipe, seed, versions; ``schema`` is added, and the graph's ``provenance`` where it has none.
        report: what ``report.json`` holds, and ``report.html`` shows.
        held_out: int64 ``[n, length]``, tokens that calibration did not see, to measure the artifact with.

    Raises:
        InputError: if the directory is not empty or cannot be written.
        ResourceError: if the disk is full.
    """
    source = graph.provenance.get("companions")
    described = _json(_described(graph, manifest))
    with filled_directory(directory, last=MANIFEST) as place:
        with StagedFiles(place) as staged:
            for name, content in read_companions(Path(source) if source else None).items():
                with staged.file(name) as write:
                    write(_marked(content) if name == "config.json" else content)
            files = {_GRAPH: graph.to_dict(), _REPORT: report}
            if held_out is not None:
                files[_HELD_OUT] = {"source": "not used in calibration", "ids": held_out.tolist()}
            for name, fields in files.items():
                with staged.file(name) as write:
                    write(_json(fields))
            with staged.file(_REPORT_PAGE) as write:
                write(render_report(json.loads(_json(report)), json.loads(described)).encode())
            with staged.file(MANIFEST) as write:
                write(described)
        graph.weights.save(place, stem=_WEIGHTS, names=graph.weight_names())


def add_target(
    directory: str | Path, graph: Graph, manifest: Mapping[str, Any], name: str, entry: Mapping[str, Any]
) -> None:
    """Adds what became of a target to the report beside a native artifact, which is replaced whole.

    Where another artifact than that of ``graph`` and ``manifest`` lies there by now, or none, nothing is done.

    Args:
        directory: what `save_native` wrote.
        graph, manifest: as they were saved.
        name, entry: of ``report.json``'s ``targets``.

    Raises:
        ArtifactError: if the report is damaged.
        InputError: if the directory cannot be written.
        ResourceError: if the disk is full.
    """
    root = Path(directory)
    described = json.loads(_json(_described(graph, manifest)))
    if not (root / MANIFEST).is_file() or _read_json(root / MANIFEST) != described:
        return
    report = _read_json(root / _REPORT)
    report["targets"] = {**report.get("targets", {}), name: strict_json(entry)}
    with StagedFiles(root) as staged:
        with staged.file(_REPORT) as write:
            write(_json(report))
        with staged.file(_REPORT_PAGE) as write:
            write(render_report(report, described).encode())


def _described(graph: Graph, manifest: Mapping[str, Any]) -> dict[str, Any]:
    provenance = {key: value for key, value in graph.provenance.items() if key != "companions"}
    return {"schema": SCHEMA, "provenance": provenance, **manifest}


def _marked(config: bytes) -> bytes:
    """A ``config.json`` that loaders of checkpoints refuse; a broken one stays as it is."""
    try:
        fields = json.loads(config)
    except ValueError:
        return config
    return _json({**fields, **_NOT_FOR_OTHERS}) if isinstance(fields, dict) else config


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(strict_json(content), indent=1, allow_nan=False, default=str) + "\n").encode()


def load_native(directory: str | Path) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    """Reads what `save_native` wrote: graph, manifest, report. Weights stay on disk.

    Raises:
        ArtifactError: if it is incomplete, damaged, or of another schema.
        WeightError: if the weights are damaged.
    """
    root = Path(directory)
    manifest = _read_json(root / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(
            "this artifact was written by another version",
            where=root / MANIFEST,
            got=f"schema {manifest.get('schema')}",
            expected=f"schema {SCHEMA}",
            remedy="compile the model again",
        )
    provenance = manifest.get("provenance")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("parameters"), int):
        raise ArtifactError("the manifest is damaged", where=root / MANIFEST, expected="a provenance with parameters")
    weights = WeightStore.from_directory(root, stem=_WEIGHTS)
    fields = _read_json(root / _GRAPH)
    try:
        graph = Graph.from_dict(fields, weights, {**provenance, "companions": str(root)})
    except ArtifactError as error:
        error.where = ": ".join(filter(None, (str(root / _GRAPH), error.where)))
        raise
    except RecipeError as error:
        raise ArtifactError("the graph file is damaged", where=root / _GRAPH, got=error.got) from error
    report = _read_json(root / _REPORT) if (root / _REPORT).is_file() else {}
    return graph, manifest, report


def load_held_out(directory: str | Path) -> Tensor | None:
    """The tokens kept to measure an artifact with, int64 ``[n, length]``; None where there are none.

    Raises:
        ArtifactError: if their file is damaged.
    """
    path = Path(directory) / _HELD_OUT
    if not path.is_file():
        return None
    try:
        ids = torch.tensor(_read_json(path)["ids"], dtype=torch.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("the held-out tokens are damaged", where=path, got=error) from error
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            "this is not a native artifact, or an incomplete one", where=path.parent, got=f"no {path.name}"
        ) from error
    except OSError as error:
        raise ArtifactError("this file cannot be read", where=path, got=error.strerror) from error
    except ValueError as error:
        raise ArtifactError("damaged JSON", where=path, got=error) from error
    if not isinstance(content, dict):
        raise ArtifactError("damaged JSON", where=path, got=type(content).__name__, expected="an object")
    return content


@dataclass
class _Cache:
    values: list[Tensor]
    length: int


class NativeArtifact:
    """Runs a graph by its reference arithmetic: weights dequantized once, float32 on the CPU.

    Args:
        graph: a causal language model; see `load_native`.
        path: its directory, for the tokenizer.
        device: where it runs.
        round_activations: False leaves in float what the graph quantizes of activations, ahead of linear layers and in
            the cache.

    Raises:
        InputError: if the graph returns no logits.
    """

    def __init__(
        self,
        graph: Graph,
        path: Path | None = None,
        device: str | torch.device = "cpu",
        *,
        round_activations: bool = True,
    ) -> None:
        index = graph.signature.index_of_output("logits")
        if index is None:
            first = graph.signature.outputs[0]
            raise InputError(
                "this model does not predict next tokens",
                where=path,
                got=f"output {first.name} {list(first.shape)}",
                expected="logits [batch, sequence, vocabulary]",
                remedy="text is scored and generated by language models alone; run this one through its ONNX form",
            )
        self._graph, self._device = graph, torch.device(device)
        self.path = path
        self.vocab_size = int(graph.signature.outputs[index].shape[-1])
        self.max_positions: int | None = declared_positions(graph.provenance.get("config"))
        self.has_cache = graph.signature.has_cache
        self.has_quantized_cache = graph.signature.has_quantized_cache
        self.cache_bytes_per_token = graph.signature.cache_bytes_per_token
        self.provenance: Mapping[str, object] = graph.provenance
        self._logits = graph.outputs[index]
        self._present = [
            node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role == "present"
        ]
        self._whole = Stretch(graph.fx.nodes, [self._logits])
        self._cached = Stretch(graph.fx.nodes, [self._logits, *self._present])
        self._loaded: dict[fx.Node, Any] | None = None
        rounding = activation_rounding(graph.fx.nodes) | cache_rounding(graph.fx.nodes)
        self._passed_through = set[fx.Node]() if round_activations else rounding

    def _weights(self) -> dict[fx.Node, Any]:
        if self._loaded is None:
            self._loaded = self._cached.load(self._graph.weights.read, self._device)
        return self._loaded

    def forward(self, ids: Tensor) -> Tensor:
        """float32 logits ``[batch, length, vocab]`` of int64 ``[batch, length]``, without a cache."""
        (logits,) = self._values(feed(self._graph, ids.to(self._device)), [self._logits])
        return logits.float()

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """Logits of ``ids``, and the cache that holds them."""
        return self._extend(ids, None)

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Logits of ``ids`` appended to the cache, and the longer cache."""
        assert isinstance(cache, _Cache)
        return self._extend(ids, cache)

    def _extend(self, ids: Tensor, cache: _Cache | None) -> tuple[Tensor, _Cache]:
        past = None if cache is None else cache.values
        values = feed(self._graph, ids.to(self._device), past)
        logits, *present = self._values(values, [self._logits, *self._present])
        return logits.float(), _Cache(present, ids.shape[1] + (0 if cache is None else cache.length))

    def _values(self, batch: Mapping[fx.Node, Any], wanted: list[fx.Node]) -> list[Tensor]:
        """What nodes give for a value per placeholder: the logits, or they and the caches."""
        stretch = self._whole if len(wanted) == 1 else self._cached
        results = stretch.run(batch, self._weights(), self._device, self._passed_through)
        return [results[node] for node in wanted]

    def stored_bytes(self) -> int:
        """Bytes of all weight tensors as stored, tied ones once."""
        return self._graph.weights.stored_bytes(self._graph.weight_names())

    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of parameters of the original model."""
        return 8 * self.stored_bytes() / int(self._graph.provenance["parameters"])
