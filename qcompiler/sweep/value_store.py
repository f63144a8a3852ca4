"""Where values of the graph wait between two steps of a sweep: in memory up to a budget, spilled to files beyond it."""

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import ResourceError

__all__ = ["ValueHandle", "ValueStore"]


@dataclass(frozen=True)
class _InFile:
    path: Path
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


@dataclass(frozen=True)
class ValueHandle:
    """What `ValueStore.put` gives for some values, to get or drop them by.

    Attributes:
        entries: by node, the value itself, or where it lies in a file.
        bytes_in_memory: of the tensors among them that are not in files.
    """

    entries: Mapping[fx.Node, Any]
    bytes_in_memory: int


class ValueStore:
    """Keeps values of graph nodes, such as the activations of one batch at a cut, by handle.

    Args:
        budget: bytes of tensors held in memory; further ones go to files.
        directory: where the files lie; a temporary directory by default.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        self._budget = budget
        self._held = 0
        self._numbers = itertools.count()
        self._temporary = tempfile.TemporaryDirectory(prefix="qcompiler-", dir=directory)
        self.bytes_spilled = 0
        """Bytes written to files so far."""

    def put(self, values: Mapping[fx.Node, Any]) -> ValueHandle:
        """Puts values away and returns their handle. Tensors must not be written to while they are kept.

        Raises:
            ResourceError: if a file cannot be written.
        """
        entries: dict[fx.Node, Any] = {}
        in_memory = 0
        for node, value in values.items():
            size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
            if size == 0 or self._held + size <= self._budget:
                entries[node] = value
                self._held += size
                in_memory += size
            else:
                entries[node] = self._write(value)
                self.bytes_spilled += size
        return ValueHandle(entries, in_memory)

    def get(self, handle: ValueHandle) -> dict[fx.Node, Any]:
        """The values of a handle; the handle stays valid."""
        return {node: _read(v) if isinstance(v, _InFile) else v for node, v in handle.entries.items()}

    def drop(self, handle: ValueHandle) -> None:
        """Forgets a handle, once, and frees what it held."""
        self._held -= handle.bytes_in_memory
        for value in handle.entries.values():
            if isinstance(value, _InFile):
                value.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes every file."""
        self._temporary.cleanup()

    def _write(self, value: Tensor) -> _InFile:
        path = Path(self._temporary.name) / str(next(self._numbers))
        try:
            _bytes_of(value.detach().cpu().contiguous()).tofile(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ResourceError(
                "calibration values do not fit on the disk",
                where=path,
                got=error,
                remedy="free space, give a --work-dir on another disk, or raise the memory budget",
            ) from error
        return _InFile(path, value.dtype, value.shape, value.device)


def _bytes_of(contiguous: Tensor) -> Any:
    """The memory of a tensor as a NumPy array."""
    return contiguous.reshape(-1).view(torch.uint8).numpy()


def _read(stored: _InFile) -> Tensor:
    value = torch.empty(stored.shape, dtype=stored.dtype)
    with open(stored.path, "rb", buffering=0) as file:
        view = memoryview(_bytes_of(value))
        while len(view):
            count = file.readinto(view)
            if not count:
                raise ResourceError("a file of calibration values was cut short", where=stored.path)
            view = view[count:]
    return value.to(stored.device)
