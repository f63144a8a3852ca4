"""Tensors that lie in a file of another format, as bytes at a known place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompiler.storage.safetensors_io import Entry, SafetensorsFile, dtype_name, identity_of
from qcompiler.storage.stored_tensor import InFile, StoredTensor
from qcompiler.storage.weights import WeightStore

__all__ = ["RawTensor", "open_raw"]


@dataclass(frozen=True)
class RawTensor:
    """The place of a tensor.

    Attributes:
        path: of the file.
        dtype, shape: as stored, little-endian and contiguous.
        offset: bytes ahead of it.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def entry(self) -> Entry:
        """Its place, as that of a tensor of a safetensors file."""
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return Entry(self.dtype, self.shape, self.offset, size)


class _RawFile(SafetensorsFile):
    """A file without a header of its own, read as safetensors files are: what changed meanwhile is noticed."""

    def __init__(self, path: Path, entries: dict[str, Entry]) -> None:
        self.path, self.entries, self.metadata = path, entries, {}
        self._identity = None
        with self._open() as (_, status):
            self._identity = identity_of(status)


def open_raw(tensors: Mapping[str, RawTensor | Tensor]) -> WeightStore:
    """A store of tensors by name, each read from its place when it is wanted, or held in memory.

    Raises:
        WeightError: if a file cannot be opened.
    """
    store = WeightStore()
    files: dict[Path, dict[str, Entry]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, RawTensor):
            files.setdefault(tensor.path, {})[name] = tensor.entry
    opened = {path: _RawFile(path, entries) for path, entries in files.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, RawTensor):
            source = InFile(opened[tensor.path], name)
            store._tensors[name] = StoredTensor(name, dtype_name(tensor.dtype), tensor.shape, source)
        else:
            store.set(name, tensor)
    return store
