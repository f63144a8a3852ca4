"""Hugging Face directories: their configuration, and their tensors bound to a model by name."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.skeleton import (
    Binding,
    bind_checkpoint,
    build_on_meta,
)
from qcompiler.storage import WeightStore, no_directory

__all__ = ["bound_checkpoint", "fingerprint_directory", "open_checkpoint", "read_config"]


def fingerprint_directory(path: str | Path, *, trust_remote_code: bool = False) -> str:
    """The ``fingerprint`` that `capture_directory` puts into the provenance of a graph; the same wherever the directory
    lies and however its tensors are divided into files.

    Raises:
        QCompilerError: as `capture_directory`.
    """
    _, _, binding = bound_checkpoint(Path(path), trust_remote_code)
    return binding.weights.fingerprint()


def bound_checkpoint(directory: Path, trust_remote_code: bool) -> tuple[WeightStore, nn.Module, Binding]:
    """The stored tensors, the model on meta, and which tensor is which parameter."""
    config, store = open_checkpoint(directory)
    model, computed = build_on_meta(directory, config, trust_remote_code, stored_bytes=store.stored_bytes())
    return store, model, bind_checkpoint(store, model, computed)


def open_checkpoint(directory: Path) -> tuple[dict[str, Any], WeightStore]:
    """The configuration and the stored tensors of a Hugging Face directory; headers are read, no weight.

    Raises:
        InputError: no such directory, a missing or broken ``config.json``, or a compiled model.
        WeightError: a damaged checkpoint.
        UnsupportedModelError: the model is quantized already, or its weights lie elsewhere.
    """
    _refuse_artifact(directory)
    config = read_config(directory)
    if config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        raise UnsupportedModelError(
            "this checkpoint is quantized already",
            where=directory / "config.json",
            got=settings.get("quant_method") if isinstance(settings, dict) else settings,
            expected="a float checkpoint",
            remedy="compile the original model",
        )
    if config.get("transformers_weights") is not None:
        raise UnsupportedModelError(
            "config.json says that the weights lie elsewhere than usual",
            where=f"{directory / 'config.json'}: transformers_weights",
            got=config["transformers_weights"],
            expected="model.safetensors or its shards, and no such field",
            remedy="load the model with transformers and save it anew: model.save_pretrained(DIR)",
        )
    return config, WeightStore.from_directory(directory)


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
