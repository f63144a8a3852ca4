"""Hugging Face directories: their configuration, and their tensors bound to a model by name."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.checkpoints import (
    Checkpoint,
    Settings,
    check_linear,
    find_gguf,
    find_settings,
    open_gguf,
    read_checkpoint,
)
from qcompiler.frontend.onnx_files import find_onnx, has_onnx_codes
from qcompiler.frontend.skeleton import (
    Binding,
    bind_checkpoint,
    build_on_meta,
)
from qcompiler.ir import Graph
from qcompiler.storage import WeightStore, no_directory

__all__ = [
    "Opened",
    "bound_checkpoint",
    "fingerprint_directory",
    "is_quantized_checkpoint",
    "read_config",
    "refuse_quantized",
]


@dataclass(frozen=True)
class Opened:
    """A Hugging Face directory, its tensors bound to its model by name.

    Attributes:
        store: the tensors of the model as stored; of a quantized checkpoint, those of the unquantized model.
        model: on meta.
        binding: which tensor is which parameter.
        quantized: layers with codes; None for a float checkpoint.
        fingerprint: of what lies in the files.
        config: of the model.
        companions: the directory of ``config.json`` and the tokenizer.
    """

    store: WeightStore
    model: nn.Module
    binding: Binding
    quantized: Checkpoint | None
    fingerprint: str
    config: dict[str, Any]
    companions: Path


def fingerprint_directory(path: str | Path, *, trust_remote_code: bool = False) -> str:
    """The ``fingerprint`` that `capture_directory` puts into the provenance of a graph; the same wherever the directory
    lies and however its tensors are divided into files.

    Raises:
        QCompilerError: as `capture_directory`; besides, for a quantized checkpoint, which nothing is compiled from.
    """
    refuse_quantized(path)
    return bound_checkpoint(Path(path), trust_remote_code).fingerprint


def bound_checkpoint(directory: Path, trust_remote_code: bool) -> Opened:
    """The stored tensors, the model on meta, and which tensor is which parameter.

    Raises:
        QCompilerError: as `capture_directory`.
    """
    if find_gguf(directory) is not None:
        return _bound_gguf(directory)
    config, settings = _read_settings(directory)
    stored = store = WeightStore.from_directory(directory)
    quantized = None
    if settings is not None and settings.describe(stored):
        quantized = read_checkpoint(stored, settings)
        store = quantized.floats
    model, computed = build_on_meta(directory, config, trust_remote_code, stored_bytes=stored.stored_bytes())
    checked = None if quantized is None else partial(check_linear, quantized)
    binding = bind_checkpoint(store, model, computed, checked)
    fingerprint = (binding.weights if quantized is None else stored).fingerprint()
    return Opened(store, model, binding, quantized, fingerprint, config, directory)


def _bound_gguf(path: Path) -> Opened:
    opened = open_gguf(path)
    found = opened.checkpoint
    quantized = found if found.layers else None
    checked = None if quantized is None else partial(check_linear, quantized)
    binding = bind_checkpoint(found.floats, opened.model, opened.computed, checked)
    fingerprint = (binding.weights if quantized is None else found.stored).fingerprint()
    return Opened(found.floats, opened.model, binding, quantized, fingerprint, opened.config, opened.companions)


def refuse_quantized(model: str | Path | Graph) -> None:
    """Refuses what was quantized by another program: the directory of a checkpoint, or what was captured from it.

    Of a directory, headers are read, no weight.

    Raises:
        UnsupportedModelError: if it was, or the weights of a directory lie elsewhere.
        InputError: no such directory, a missing or broken ``config.json``, or a compiled model.
        WeightError: a damaged checkpoint.
    """
    if isinstance(model, Graph):
        if "checkpoint" in model.provenance:
            raise _quantized(model.provenance["source"], model.provenance["checkpoint"])
        return
    if (file := find_onnx(model)) is not None:
        if has_onnx_codes(file):
            raise _quantized(str(model), "onnx")
        return
    if find_gguf(Path(model)) is not None:
        if open_gguf(Path(model)).checkpoint.layers:
            raise _quantized(str(model), "gguf")
        return
    _, settings = _read_settings(Path(model))
    store = WeightStore.from_directory(Path(model))
    if settings is not None and settings.describe(store):
        raise _quantized(settings.where, settings.method)


def _quantized(where: str, method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this checkpoint is quantized already",
        where=where,
        got=method,
        expected="a float checkpoint",
        remedy="compile the original model; `qcompiler convert` takes this one to a target as it is",
    )


def is_quantized_checkpoint(directory: Path) -> bool:
    """Whether a path holds a quantized checkpoint in a layout that `capture_directory` reads, or a GGUF file.

    Raises:
        WeightError: a damaged checkpoint.
    """
    if find_gguf(directory) is not None:
        return True
    if not (directory / "config.json").is_file():
        return False
    try:
        settings = find_settings(directory, read_config(directory))
    except (InputError, UnsupportedModelError):
        return False
    return settings is not None and settings.describe(WeightStore.from_directory(directory))


def _read_settings(directory: Path) -> tuple[dict[str, Any], Settings | None]:
    """``config.json``, and what the directory says of its quantization."""
    _refuse_artifact(directory)
    config = read_config(directory)
    settings = find_settings(directory, config)
    if config.get("transformers_weights") is not None:
        raise UnsupportedModelError(
            "config.json says that the weights lie elsewhere than usual",
            where=f"{directory / 'config.json'}: transformers_weights",
            got=config["transformers_weights"],
            expected="model.safetensors or its shards, and no such field",
            remedy="load the model with transformers and save it anew: model.save_pretrained(DIR)",
        )
    return config, settings


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``config.json``.

    Raises:
        InputError: if the directory or the file is missing, or the file is not a JSON object.
    """
    if not directory.is_dir():
        raise no_directory(directory)
    file = directory / "config.json"
    if not file.is_file():
        if (directory / "adapter_config.json").is_file():
            raise InputError(
                "this directory holds an adapter, not a model",
                where=directory,
                expected="config.json and weights",
                remedy="merge it into its model first: PeftModel.from_pretrained(model, path).merge_and_unload()"
                ".save_pretrained(DIR)",
            )
        raise InputError("the model directory has no config.json", where=directory)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("config.json is not valid JSON", where=file, got=error) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError("config.json does not describe a model", where=file, expected="an object with a model_type")
    return config


def _refuse_artifact(directory: Path) -> None:
    """Refuses what was compiled already: the native artifact, the directory it lies in, an ONNX folder."""
    marks = ("manifest.json", "native/manifest.json", "model.onnx", "onnx/model.onnx")
    mark = next((mark for mark in marks if (directory / mark).is_file()), None)
    has_weights = any(next(directory.glob(pattern), None) for pattern in ("model*.safetensors", "*.bin", "*.pth"))
    if mark is not None and not has_weights:
        raise InputError(
            "this is a compiled model already",
            where=directory,
            got=mark,
            expected="the directory of an original model",
            remedy="compile the original again with the new recipe; `qcompiler convert` lowers what is compiled, "
            "`qcompiler evaluate` and `generate` run it",
        )
