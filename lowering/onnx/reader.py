"""`OnnxArtifact`: an ONNX folder run by ONNX Runtime on the CPU."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import ArtifactError, InputError, MissingDependencyError

__all__ = ["OnnxArtifact", "OnnxModule", "as_tensor", "open_session", "session_options", "token_input"]

_METADATA = "qcompiler."
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
_CODES = {"tensor(float8e4m3fn)": 17, "tensor(float8e5m2)": 19, "tensor(int4)": 22}
"""Their numbers in ONNX; NumPy has no such dtypes."""


@dataclass(frozen=True)
class _Cache:
    """Keys and values so far, as ONNX Runtime gave them, by the input that takes them."""

    values: Mapping[str, Any]
    length: int
    batch: int


class OnnxArtifact:
    """A decoder or encoder in ONNX, with the ports that `qcompiler.ir.signature` names.

    Attention mask and positions are made here; caches go from ``present`` to ``past`` without a copy on this side.

    Args:
        path: the folder, or its ``model.onnx``.
        accuracy_level: of fused quantized products: 1 computes in float32, as written; 4 rounds activations to int8 on
            the fly (0.5 to 1.3 % off, faster on most processors).
        threads: for one operator; by default as many as torch uses. With ``OMP_WAIT_POLICY=passive`` they sleep while
            they wait.

    Attributes:
        path: the folder.
        has_cache: whether `prefill` and `step` work.
        has_quantized_cache: whether keys or values are kept as codes.
        cache_bytes_per_token: of all caches and their scales, for one sequence; None without a cache.
        vocab_size: width of the logits.
        max_positions: the longest sequence, if the file tells.
        provenance: what the file tells of its origin.

    Raises:
        InputError: no such file.
        ArtifactError: ONNX Runtime cannot load it, or its inputs are not those of a language model.
        MissingDependencyError: without onnxruntime.
    """

    def __init__(self, path: str | Path, *, accuracy_level: Literal[0, 1, 4] = 1, threads: int | None = None) -> None:
        file = self._find(path)
        self._options = session_options(accuracy_level, threads)
        self._session = self._open(str(file))
        facts = self._session.get_modelmeta().custom_metadata_map
        self._describe(self._session.get_inputs(), self._session.get_outputs(), facts)

    def _find(self, path: str | Path) -> Path:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError(
                "running ONNX needs ONNX Runtime", got=error, remedy="pip install onnxruntime"
            ) from error
        given = Path(path)
        file = given / "model.onnx" if given.is_dir() else given
        if not file.is_file():
            raise InputError("no ONNX model", where=given, expected="a folder with model.onnx")
        self.path: Path | None = file.parent
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._new_value = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        return file

    def _open(self, model: str | bytes) -> Any:
        return open_session(model, self._options, self.path)

    def _describe(self, inputs: Sequence[Any], outputs: Sequence[Any], metadata: Mapping[str, str]) -> None:
        """Takes facts from ports as ONNX Runtime describes them (``name``, ``type``, ``shape``), and metadata."""
        facts = {
            key.removeprefix(_METADATA): json.loads(value)
            for key, value in metadata.items()
            if key.startswith(_METADATA)
        }
        self._inputs = {port.name: port for port in inputs}
        self._outputs = [port.name for port in outputs]
        self._usual: dict[str, str] = facts.get("ports") or {}
        by_usual = {self._usual.get(name, name): name for name in self._outputs}
        self._past = [name for name in self._inputs if self._usual_name(name).startswith("past_key_values.")]
        presents = [self._usual_name(name).replace("past_key_values.", "present.", 1) for name in self._past]
        self._present = [by_usual.get(name, name) for name in presents]
        known = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
        unknown = {name for name in self._inputs if self._usual_name(name) not in known} - set(self._past)
        lost = set(self._present) - set(self._outputs)
        if unknown or lost or "input_ids" not in map(self._usual_name, self._inputs):
            raise ArtifactError(
                "these are not the ports of a language model",
                where=self.path,
                got=", ".join(sorted(unknown) or sorted(self._inputs)),
                expected="input_ids, attention_mask, position_ids, token_type_ids, past_key_values.N.* and present.N.*",
            )
        self.has_cache = bool(self._past)
        kept = [self._inputs[name] for name in self._past]
        self.has_quantized_cache = any(_item_bits(port.type) <= 8 for port in kept)
        self.cache_bytes_per_token = (
            sum(_item_bits(port.type) * port.shape[1] * port.shape[3] for port in kept) // 8 if kept else None
        )
        self._result = by_usual.get("logits", self._outputs[0])
        self.vocab_size = int(next(port.shape[-1] for port in outputs if port.name == self._result))
        self.max_positions: int | None = facts.get("max_positions")
        self.provenance: Mapping[str, object] = facts

    def _usual_name(self, name: str) -> str:
        """What a port is called in models of ours, where the file keeps the names of another model."""
        return self._usual.get(name, name)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ``[B, S]`` → float32 ``[B, S, V]``, every position."""
        self._check(ids, 0)
        return self._run(ids, self._empty(ids.shape[0]), [self._result])[0]

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """int64 ``[B, S]`` → float32 logits ``[B, S, V]`` and the cache.

        Raises:
            ArtifactError: if the model has no cache.
        """
        if not self.has_cache:
            raise ArtifactError("this model was exported without a cache", where=self.path, remedy="use forward")
        return self.step(ids, self._empty(ids.shape[0]))

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Appends int64 ``[B, s]`` to what the cache holds: float32 logits ``[B, s, V]`` and the longer cache."""
        assert isinstance(cache, _Cache)
        self._check(ids, cache.length)
        logits, present = self._run(ids, cache, [self._result, *self._present])
        values = dict(zip(self._past, present, strict=True))
        return logits, _Cache(values, cache.length + ids.shape[1], cache.batch)

    def stored_bytes(self) -> int:
        """Bytes of all weight tensors as stored; of a file by another writer, bytes of the model's files."""
        known = self.provenance.get("weight_bytes")
        if isinstance(known, int):
            return known
        assert self.path is not None
        return sum(file.stat().st_size for file in self.path.iterdir() if ".onnx" in file.name)

    def bits_per_weight(self) -> float:
        """Stored bits of all weight tensors for each parameter of the original model.

        Raises:
            ArtifactError: if the file does not tell how many parameters that had.
        """
        parameters = self.provenance.get("parameters")
        if not isinstance(parameters, int) or parameters < 1:
            raise ArtifactError("the file does not tell how many parameters its model had", where=self.path)
        return self.stored_bytes() * 8 / parameters

    # --- running -----------------------------------------------------------------------------------------------------

    def _check(self, ids: Tensor, past: int) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
            raise InputError("token ids are int64 [batch, sequence]", got=f"{ids.dtype} {tuple(ids.shape)}")
        if self.max_positions is not None and past + ids.shape[1] > self.max_positions:
            raise InputError(
                "the sequence is longer than the model's positions",
                got=past + ids.shape[1],
                expected=self.max_positions,
            )

    def _empty(self, batch: int, length: int = 0, names: Iterable[str] | None = None) -> _Cache:
        """A cache of a length, with nothing in it that means anything; of some inputs alone, or all."""
        values = {}
        for name in self._past if names is None else names:
            port = self._inputs[name]
            _, heads, _, width = port.shape
            dtype = _CODES.get(port.type) or _NUMPY[port.type]
            values[name] = self._new_value((batch, heads, length, width), dtype)
        return _Cache(values, length, batch)

    def _run(self, ids: Tensor, cache: _Cache, outputs: list[str]) -> tuple[Tensor, list[Any]]:
        """The first of ``outputs`` as a float32 tensor, the rest as ONNX Runtime holds them."""
        first, *rest = self._session.run_with_ort_values(outputs, self._feed(ids, cache))
        return as_tensor(first), rest

    def _feed(self, ids: Tensor, cache: _Cache) -> dict[str, Any]:
        """A value for each input."""
        batch, length = ids.shape
        if batch != cache.batch:
            raise InputError("another batch than the cache's", got=batch, expected=cache.batch)
        feed = dict(cache.values)
        for name, port in self._inputs.items():
            if name not in self._past:
                given = token_input(self._usual_name(name), ids, cache.length, cache.length + length)
                feed[name] = self._value(np.ascontiguousarray(given, _NUMPY[port.type]))
        return feed


class OnnxModule:
    """A folder whose model takes no token ids, run by ONNX Runtime on the CPU.

    Args:
        directory: the folder.
        model: its file, serialized, if that is not to be read from there.
        accuracy_level: as for `OnnxArtifact`.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """

    def __init__(self, directory: Path, model: bytes | None = None, *, accuracy_level: int = 1) -> None:
        options = session_options(accuracy_level, None)
        key = "session.model_external_initializers_file_folder_path"
        if model is not None:
            options.add_session_config_entry(key, str(directory.resolve()))
        self._session = open_session(str(directory / "model.onnx") if model is None else model, options, directory)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `qcompiler.protocol.RunsInputs`."""
        ports = self._session.get_inputs()
        feed = {}
        for port, tensor in zip(ports, inputs, strict=True):
            plain = tensor.float() if tensor.is_floating_point() else tensor
            feed[port.name] = np.ascontiguousarray(plain.numpy().astype(_NUMPY.get(port.type, np.bool_)))
        found = [torch.from_numpy(np.array(value)) for value in self._session.run(None, feed)]
        return [value.float() if value.is_floating_point() else value for value in found]


def open_session(model: str | bytes, options: Any, where: Path | None) -> Any:
    """A session of a file or of its bytes, on the CPU.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base but Exception
        raise ArtifactError(
            "ONNX Runtime cannot load this model",
            where=where if isinstance(model, bytes) else model,
            got=str(error).strip().splitlines()[0],
        ) from error


def session_options(accuracy_level: int, threads: int | None) -> Any:
    """See `OnnxArtifact`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":  # for these threads too
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return options


def as_tensor(value: Any) -> Tensor:
    """float32, of what ONNX Runtime holds."""
    shared = torch.utils.dlpack.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.from_numpy(value.numpy())
    return shared.float()


def _item_bits(kind: str) -> int:
    """Bits of one element of an ONNX Runtime type."""
    if kind in _CODES:
        return 4 if kind == "tensor(int4)" else 8
    if kind == "tensor(bfloat16)":  # NumPy has none, and ONNX Runtime hardly a kernel on a CPU
        return 16
    return 8 * np.dtype(_NUMPY[kind]).itemsize


def token_input(name: str, ids: Tensor, past: int, total: int) -> np.ndarray[Any, Any]:
    """What an input that is no cache is given: int64, for ``total`` tokens of which ``past`` lie in the cache."""
    batch, length = ids.shape
    if name == "input_ids":
        return np.asarray(ids.numpy())
    if name == "attention_mask":
        return np.ones((batch, total), dtype=np.int64)
    if name == "position_ids":
        return np.broadcast_to(np.arange(past, total), (batch, length))
    return np.zeros((batch, length), dtype=np.int64)  # token_type_ids: one segment
