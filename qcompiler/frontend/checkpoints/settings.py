"""What a directory says of its quantization, and who reads it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.checkpoints import awq, compressed_tensors, gptq
from qcompiler.frontend.checkpoints.contents import Checkpoint
from qcompiler.frontend.model_config import declared
from qcompiler.storage import WeightStore

__all__ = ["Settings", "find_settings", "read_checkpoint"]

_READERS: Mapping[str, Callable[[Checkpoint, Mapping[str, Any], str], None]] = {
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
_FIELDS = ("quantization_config", "compression_config")
_GPTQ_FILE = "quantize_config.json"
_OTHERS_FILE = "hf_quant_config.json"


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
        return not self.are_beside or any(name.endswith(".qweight") for name in store.names())


def find_settings(directory: Path, config: Mapping[str, Any]) -> Settings | None:
    """What a directory says of its quantization; None where it says nothing.

    Args:
        directory: of the checkpoint.
        config: its ``config.json``.

    Raises:
        InputError: if what is there is no object.
        UnsupportedModelError: for a method that is not read here.
    """
    found, are_beside = declared(config, *_FIELDS), False
    where = f"{directory / 'config.json'}: quantization_config"
    if found is None and (directory / _OTHERS_FILE).is_file():
        raise _unknown(directory / _OTHERS_FILE, "modelopt")
    if found is None and (directory / _GPTQ_FILE).is_file():
        where, are_beside = str(directory / _GPTQ_FILE), True
        try:
            found = json.loads((directory / _GPTQ_FILE).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError("the quantization settings cannot be read", where=where, got=error) from error
        if isinstance(found, dict):
            found = {"quant_method": "gptq", **found}
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise InputError("quantization_config is not an object", where=where, got=found)
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise _unknown(where, method)
    return Settings(method, found, where, are_beside)


def _unknown(where: object, method: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this checkpoint is quantized already, in a format that is not read",
        where=where,
        got=method,
        expected=f"a float checkpoint, or {', '.join(_READERS)}",
        remedy="use the original model",
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
    if not checkpoint.layers and not checkpoint.floats.names():
        raise UnsupportedModelError(
            "this checkpoint is said to be quantized already, but no layer holds codes",
            where=settings.where,
            got=settings.method,
            expected=f"layers in the layout of {settings.method}",
            remedy="use the original model, or take the settings away",
        )
    checkpoint.finish()
    return checkpoint
