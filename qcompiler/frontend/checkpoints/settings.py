"""What a directory says of its quantization, and who reads it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.checkpoints import awq, compressed_tensors, fp8, gptq, modelopt, mxfp4
from qcompiler.frontend.checkpoints.contents import CHECK_SETTINGS, USE_ORIGINAL, Checkpoint
from qcompiler.frontend.model_config import declared
from qcompiler.storage import WeightStore

__all__ = ["Settings", "find_settings", "read_checkpoint"]

_READERS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any], str], None]] = {
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "modelopt": modelopt.read,
    "fp8": fp8.read,
    "mxfp4": mxfp4.read,
}
_FIELDS = ("quantization_config", "compression_config")
_GPTQ_FILE = "quantize_config.json"
_MODELOPT_FILE = "hf_quant_config.json"
_CODED = (".qweight", ".weight_scale", ".k_scale")
"""Ends of names that no float checkpoint has."""


@dataclass(frozen=True)
class Settings:
    """What a directory says of its quantization.

    Attributes:
        method: a layout that is read here.
        fields: as they stand there.
        where: they stand, for messages.
        are_beside: in a file of their own, which a tool may have left beside a float model.
    """

    method: str
    fields: Mapping[str, Any]
    where: str
    are_beside: bool

    def describe(self, store: WeightStore) -> bool:
        """Whether they speak of these tensors."""
        return not self.are_beside or any(name.endswith(_CODED) for name in store.names())


def find_settings(directory: Path, config: Mapping[str, Any]) -> Settings | None:
    """What a directory says of its quantization; None where it says nothing.

    Args:
        directory: of the checkpoint.
        config: its ``config.json``.

    Raises:
        InputError: if what is there is no object.
        UnsupportedModelError: for a method that is not read here.
    """
    found = declared(config, *_FIELDS)
    where, are_beside = f"{directory / 'config.json'}: quantization_config", found is None
    if found is not None and not isinstance(found, Mapping):
        raise InputError("quantization_config is not an object", where=where, got=found, remedy=CHECK_SETTINGS)
    gptq_file, modelopt_file = directory / _GPTQ_FILE, directory / _MODELOPT_FILE
    if modelopt_file.is_file() or (found is not None and _is_modelopt(found)):
        beside = _read_file(modelopt_file) if modelopt_file.is_file() else None
        if found is not None and not _is_modelopt(found):
            raise InputError(
                "two descriptions of one quantization contradict each other",
                where=modelopt_file,
                got="modelopt",
                expected=f"{found.get('quant_method')}, as config.json says",
                remedy="use the files as they were published together",
            )
        merged = modelopt.merged_settings(found, beside, where, str(modelopt_file))
        return Settings("modelopt", merged, str(modelopt_file) if are_beside else where, are_beside)
    if found is None and gptq_file.is_file():
        where, found = str(gptq_file), {"quant_method": "gptq", **_read_file(gptq_file)}
    if found is None:
        return None
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise _unknown(where, method)
    return Settings(method, found, where, are_beside)


def _is_modelopt(fields: Mapping[str, Any]) -> bool:
    """Whether settings of ``config.json`` are those of ModelOpt, also in a spelling without ``quant_method``."""
    method = fields.get("quant_method") or fields.get("quant_library")
    return isinstance(method, str) and (method == "modelopt" or method.startswith("modelopt_"))


def _read_file(path: Path) -> dict[str, Any]:
    """The object that a file of settings holds."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "the quantization settings cannot be read", where=path, got=error, remedy=CHECK_SETTINGS
        ) from error
    if not isinstance(found, dict):
        raise InputError("the quantization settings are not an object", where=path, got=found, remedy=CHECK_SETTINGS)
    return found


def _unknown(where: object, method: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this checkpoint is quantized already, in a format that is not read",
        where=where,
        got=method,
        expected=f"a float checkpoint, or {', '.join(_READERS)}",
        remedy=USE_ORIGINAL,
    )


def read_checkpoint(store: WeightStore, settings: Settings) -> Checkpoint:
    """The layers and float tensors of a quantized checkpoint. Codes and scales are left on disk.

    Args:
        store: the tensors of its files.
        settings: that speak of them.

    Raises:
        InputError: for settings that contradict themselves.
        UnsupportedModelError: for a layout, version or number of bits that is not read.
        WeightError: for tensors that the settings do not describe.
    """
    checkpoint = Checkpoint(store, settings.method)
    _READERS[settings.method](checkpoint, settings.fields, settings.where)
    if not checkpoint.layers and not checkpoint.floats.names() and not checkpoint.cache_scales:
        raise UnsupportedModelError(
            "this checkpoint is said to be quantized already, but no layer holds codes",
            where=settings.where,
            got=settings.method,
            expected=f"layers in the layout of {settings.method}",
            remedy="use the original model, or take the settings away",
        )
    checkpoint.finish()
    return checkpoint
