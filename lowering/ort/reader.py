"""`OrtArtifact`: a folder of ONNX Runtime's own operators, its caches written to in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.onnx.reader import OnnxArtifact, as_tensor, session_options, token_input
from qcompiler.lowering.ort.levels import set_level
from qcompiler.lowering.ort.sharing import shares_caches_of_file

__all__ = ["OrtArtifact"]

_ROOM = 4096
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


@dataclass
class _InPlace:
    """Keys and values in buffers that have room for more, bound to inputs and outputs alike.

    Attributes:
        buffers: by the input that takes them.
        room: tokens that fit.
        length: tokens that are there.
        batch: sequences.
        binding: of the session, which keeps what is bound.
    """

    buffers: Mapping[str, np.ndarray[Any, Any]]
    room: int
    length: int
    batch: int
    binding: Any


class OrtArtifact(OnnxArtifact):
    """As `OnnxArtifact`; where attention keeps the caches itself, they grow in place, without a copy per token.

    Args:
        path: the folder, or its ``model.onnx``.
        accuracy_level: of weight products, instead of that in the file.
        threads: for one operator; by default as many as torch uses.

    Raises:
        InputError, ArtifactError, MissingDependencyError: as `OnnxArtifact`.
    """

    def __init__(self, path: str | Path, *, accuracy_level: int | None = None, threads: int | None = None) -> None:
        file = self._find(path)
        self._options = session_options(4 if accuracy_level is None else accuracy_level, threads)
        model = onnx.load(file, load_external_data=False)
        self._is_shared = shares_caches_of_file(model)
        if accuracy_level is None:
            self._session = self._open(str(file))
        else:
            set_level(model, accuracy_level)
            key = "session.model_external_initializers_file_folder_path"
            self._options.add_session_config_entry(key, str(file.parent.resolve()))
            self._session = self._open(model.SerializeToString())
        facts = self._session.get_modelmeta().custom_metadata_map
        self._describe(self._session.get_inputs(), self._session.get_outputs(), facts)

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """As `OnnxArtifact.prefill`."""
        if not self._is_shared:
            return super().prefill(ids)
        self._check(ids, 0)
        batch, length = ids.shape
        return self.step(ids, self._new(batch, length))

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """As `OnnxArtifact.step`; the cache is changed in place."""
        if not isinstance(cache, _InPlace):
            return super().step(ids, cache)
        self._check(ids, cache.length)
        batch, length = ids.shape
        if batch != cache.batch:
            raise InputError("another batch than the cache's", got=batch, expected=cache.batch)
        if batch > 1 and length > 1 and cache.length:  # the operator takes one token of several sequences at once
            parts = [self._append(ids[:, place : place + 1], cache) for place in range(length)]
            return torch.cat(parts, dim=1), cache
        return self._append(ids, cache), cache

    def _append(self, ids: Tensor, cache: _InPlace) -> Tensor:
        length = ids.shape[1]
        if cache.length + length > cache.room:
            self._make_room(cache, cache.length + length)
        binding = cache.binding
        for name, port in self._inputs.items():
            if name not in cache.buffers:
                given = token_input(name, ids, cache.length, cache.length + length)
                binding.bind_cpu_input(name, np.ascontiguousarray(given, _DTYPES[port.type]))
        binding.bind_output(self._result, "cpu")
        self._session.run_with_iobinding(binding)
        cache.length += length
        return as_tensor(binding.get_outputs()[-1])  # what was bound last

    def _new(self, batch: int, length: int) -> _InPlace:
        room = self._room(length)
        cache = _InPlace({}, 0, 0, batch, None)
        self._bind(cache, self._buffers(batch, room), room)
        return cache

    def _buffers(self, batch: int, room: int) -> dict[str, np.ndarray[Any, Any]]:
        """Zeros, which take no memory until they are written to."""
        ports = {name: self._inputs[name] for name in self._past}
        return {name: np.zeros((batch, p.shape[1], room, p.shape[3]), _DTYPES[p.type]) for name, p in ports.items()}

    def _room(self, length: int) -> int:
        """Tokens to have room for: the model's positions, up to some thousands; beyond, twice what is needed."""
        room = _ROOM if length <= _ROOM else 2 * length
        return room if self.max_positions is None else min(room, self.max_positions)

    def _make_room(self, cache: _InPlace, length: int) -> None:
        room = self._room(length)
        larger = self._buffers(cache.batch, room)
        for name, buffer in larger.items():
            buffer[:, :, : cache.length] = cache.buffers[name][:, :, : cache.length]
        self._bind(cache, larger, room)

    def _bind(self, cache: _InPlace, buffers: dict[str, np.ndarray[Any, Any]], room: int) -> None:
        cache.buffers, cache.room = buffers, room
        cache.binding = self._session.io_binding()
        for past, present in zip(self._past, self._present, strict=True):
            shared = self._value(buffers[past])
            cache.binding.bind_ortvalue_input(past, shared)
            cache.binding.bind_ortvalue_output(present, shared)
