"""Whether what something is compared with is the model that it was compiled from."""

from typing import Any

from qcompiler.artifacts.hf import HFArtifact
from qcompiler.errors import InputError, QCompilerError
from qcompiler.frontend import declared, read_config
from qcompiler.protocol import Artifact

__all__ = ["check_original"]

_OF_THE_FORM = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Fields of a configuration in which two copies of one model may differ."""


def check_original(artifact: Artifact, against: Artifact) -> tuple[str, ...]:
    """Refuses to compare what was compiled with something that it was not compiled from.

    The manifest of what was compiled holds a fingerprint of names, dtypes, shapes and contents of the original's
    tensors (`WeightStore.fingerprint`): moving a directory or dividing its files anew leaves it as it is. A copy in
    another dtype has another one, as has a model that was captured from memory. Whether it is the same model cannot be
    told then, which is noted; nothing is said of models that nothing here compiled.

    Returns:
        Notes.

    Raises:
        InputError: if it is another model.
    """
    expected = None if isinstance(artifact, HFArtifact) else artifact.provenance.get("fingerprint")
    found = None if expected is None else _fingerprint(against)
    if found == expected:
        return ()
    if found is None:
        reason = "it is quantized, or written by another program"
    elif any(side.provenance.get("checkpoint") for side in (artifact, against)):
        reason = "it was quantized by another program"
    elif any(side.provenance.get("in_memory") for side in (artifact, against)):
        reason = "a model that was compiled from memory has another fingerprint than its directory"
    else:
        ours, theirs = _configuration(artifact), _configuration(against)
        if _without_form(ours) != _without_form(theirs) or _dtype(ours) == _dtype(theirs):
            raise InputError(
                "this is not the model that the artifact was compiled from",
                where=against.path,
                got=f"fingerprint {str(found)[:12]}",
                expected=f"fingerprint {str(expected)[:12]}, that of {artifact.provenance.get('source')}",
                remedy="compare with the original: the distance from another model says nothing of what compiling did",
            )
        reason = f"it is stored in {_dtype(theirs)}, the original in {_dtype(ours)}"
    return (f"whether {against.path} is what this was compiled from cannot be told: {reason}",)


def _fingerprint(artifact: Artifact) -> object:
    if not isinstance(artifact, HFArtifact):
        return artifact.provenance.get("fingerprint")
    try:
        return artifact.fingerprint()
    except QCompilerError:  # nothing can be compiled from it: a quantized checkpoint
        return None


def _configuration(artifact: Artifact) -> dict[str, Any]:
    """``config.json`` of a model; an ONNX file does not hold it, but lies beside it."""
    config = artifact.provenance.get("config")
    if isinstance(config, dict):
        return config
    return read_config(artifact.path) if artifact.path and (artifact.path / "config.json").is_file() else {}


def _without_form(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_form(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _OF_THE_FORM
    }


def _dtype(config: dict[str, Any]) -> str | None:
    found = declared(config, "dtype", "torch_dtype")
    return None if found is None else str(found)
