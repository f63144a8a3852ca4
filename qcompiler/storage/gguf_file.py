"""The GGUF file format: a checked header, and tensors read when they are wanted.

A file is ``GGUF``, a version, the numbers of tensors and of key-value pairs, the pairs, a description of each tensor
(name, sizes with the innermost first, type, place), and the data. Numbers are little-endian. Source: the specification
of GGUF in the repository of ggml; types and the bytes of their blocks, ``gguf.constants`` 0.19.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError, UnsupportedModelError, WeightError

__all__ = ["GGUFFile", "GGUFTensor"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}
"""By number: the name, elements of a block, bytes of a block."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: in the file.
        kind: its type, such as ``Q8_0``.
        shape: as torch has it, rows first.
        start, nbytes: of its data, in the file.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, its header read.

    Attributes:
        path: of the file.
        settings: the key-value pairs.
        tensors: by name.

    Raises:
        InputError: if it cannot be read, or is no GGUF file.
        UnsupportedModelError: for a version, or a type of tensors, that is not read.
        WeightError: for a damaged or truncated one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts: dict[str, GGUFFile] = {}
        try:
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError("a file cannot be read", where=path, got=error, expected="a GGUF file") from error
        self._offset = 0
        if self._take(4) != _MAGIC:
            raise InputError("this is no GGUF file", where=path, expected="a file that begins with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                "a version of GGUF that is not read",
                where=path,
                got=version,
                expected=" or ".join(map(str, _VERSIONS)),
                remedy="convert the model anew",
            )
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self.settings: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.settings[key] = self._value(self._number("<I"))
        described = [self._described() for _ in range(tensors)]
        alignment = self.settings.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged(f"general.alignment {alignment}")
        begin = -(-self._offset // alignment) * alignment
        self.tensors = {tensor.name: tensor for tensor in (self._placed(begin, *entry) for entry in described)}

    def add(self, part: "GGUFFile") -> None:
        """Takes over the tensors of a further part of a divided file.

        Raises:
            WeightError: if one is there already.
        """
        twice = next((name for name in part.tensors if name in self.tensors), None)
        if twice is not None:
            raise WeightError("two parts of a GGUF file have one tensor", where=part.path, got=twice)
        self.tensors |= part.tensors
        self._parts |= dict.fromkeys(part.tensors, part)

    def read(self, name: str) -> Tensor:
        """A tensor: of floats in its shape, of other types as uint8 ``[..., bytes of a row]``."""
        if name in self._parts:
            return self._parts[name].read(name)
        tensor = self.tensors[name]
        data = torch.from_numpy(np.array(self._bytes[tensor.start : tensor.start + tensor.nbytes]))
        if tensor.kind in _FLOATS:
            return data.view(_FLOATS[tensor.kind]).reshape(tensor.shape)
        return data.reshape(*tensor.shape[:-1], -1)

    def reader(self, name: str) -> Callable[[], Tensor]:
        """`read` of a tensor, for later."""
        return lambda: self.read(name)

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._offset:
            raise self._damaged(f"{len(self._bytes)} bytes, {self._offset + count} wanted")
        found = self._bytes[self._offset : self._offset + count].tobytes()
        self._offset += count
        return found

    def _damaged(self, got: object) -> WeightError:
        return WeightError(
            "a GGUF file is damaged or truncated", where=self.path, got=got, remedy="download or copy it again"
        )

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"a setting of type {kind}")
        of, count = self._number("<I"), self._number("<Q")
        if count > len(self._bytes):  # an element takes a byte at least
            raise self._damaged(f"a setting of {count} elements")
        return [self._value(of) for _ in range(count)]

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise self._damaged(f"{name}: {dimensions} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(dimensions))
        return name, sizes[::-1], self._number("<I"), self._number("<Q")

    def _placed(self, begin: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GGUFTensor:
        if number not in _TYPES:
            raise UnsupportedModelError(
                "a type of GGUF tensors that is not read",
                where=f"{self.path}: {name}",
                got=f"type {number}",
                expected=", ".join(kind for kind, *_ in _TYPES.values()),
                remedy="use a file with other types, or the original model",
            )
        kind, block, size = _TYPES[number]
        elements = 1
        for length in shape:
            elements *= length
        if not shape or shape[-1] % block:
            raise self._damaged(f"{name}: {kind} of shape {shape}")
        tensor = GGUFTensor(name, kind, shape, begin + offset, elements // block * size)
        if tensor.start + tensor.nbytes > len(self._bytes):
            raise self._damaged(f"{len(self._bytes)} bytes, {name} ends at {tensor.start + tensor.nbytes}")
        return tensor
