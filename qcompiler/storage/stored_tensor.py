"""One tensor of a weight store: in a file, in memory, or computed when read; and the form it is stored in.

**Stored form.** Integers of fewer than eight bits (``int4``, ``uint3``, ...) are packed by `numerics.pack_bits` and
stored as U8. Their dtype and shape, and the names of tied tensors, stand as JSON in the file's ``__metadata__`` under
``qcompiler``::

    {"schema": 1, "packed": {"a.codes": {"dtype": "int4", "shape": [64, 256]}}, "aliases": {"head": "embedding"}}

Any safetensors reader opens such a file.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import WeightError
from qcompiler.storage.safetensors_io import (
    TORCH_DTYPES,
    SafetensorsFile,
    byte_chunks,
    contiguous_chunks,
    dtype_name,
    parse_json_object,
    write_safetensors,
)

__all__ = [
    "METADATA_KEY",
    "Deferred",
    "InFile",
    "Rearranged",
    "SliceOf",
    "StoredTensor",
    "are_equal",
    "check_storable",
    "copy_tensors",
    "decode",
    "encode",
    "reachable",
    "sample",
    "stack",
    "stored_form",
    "tensors_of",
    "write_tensors",
]

METADATA_KEY = "qcompiler"

_SCHEMA = 1
_PACKED = re.compile(r"(u?)int([1-7])")
_PLAIN = {dtype_name(dtype): dtype for dtype in TORCH_DTYPES.values()}
_UPCAST_ELEMENTS = 1 << 20
_SAMPLE_BLOCKS = 16
_SAMPLE_BYTES = 4096
_COMPARED_BYTES = 1 << 23


@dataclass(frozen=True)
class InFile:
    """A tensor that lies in a file, under a name of its own there."""

    file: SafetensorsFile
    name: str


@dataclass(frozen=True)
class Deferred:
    """A tensor computed from others whenever it is read."""

    sources: tuple["StoredTensor", ...]
    function: Callable[..., Tensor]


@dataclass(frozen=True)
class Rearranged(Deferred):
    """A tensor of the same numbers as its sources, in other places."""


@dataclass(frozen=True)
class SliceOf(Rearranged):
    """One slice along the first axis of another tensor."""

    index: int = 0

    def load(self, *, check_finite: bool) -> Tensor:
        """The slice; of a tensor in a file, nothing else is read."""
        (whole,) = self.sources
        if isinstance(whole.source, InFile) and whole.dtype in _PLAIN:
            return whole.source.file.read(whole.source.name, self.index)
        return decode(whole.load(check_finite=check_finite), whole)[self.index]


def stack(*parts: Tensor) -> Tensor:
    """Parts along a new first axis; `WeightStore.slice` recognises it and takes a part as it is."""
    return torch.stack(parts)


@dataclass(eq=False)
class StoredTensor:
    """One tensor. Tied names share it; where its data lies may change (`WeightStore.spill`), its value never does.

    Attributes:
        label: the name it was made under, for messages and spill files.
        dtype: its logical dtype (`TensorInfo.dtype`).
        shape: its logical shape.
        source: where its data comes from; a Tensor is in stored form.
    """

    label: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor | InFile | Deferred

    @property
    def stored(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """The torch dtype and shape it has in a file."""
        return stored_form(self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in stored form."""
        dtype, shape = self.stored
        return dtype.itemsize * torch.Size(shape).numel()

    @property
    def where(self) -> str:
        """The file, if any, and the tensor, for messages."""
        return f"{self.source.file.path}: {self.source.name}" if isinstance(self.source, InFile) else self.label

    def load(self, *, check_finite: bool) -> Tensor:
        """The tensor in stored form.

        Raises:
            WeightError: if it cannot be read, is not what a transform promised, or is not finite.
        """
        if isinstance(self.source, Deferred):
            if isinstance(self.source, SliceOf):
                tensor = self.source.load(check_finite=check_finite)
            else:
                sources = [decode(entry.load(check_finite=check_finite), entry) for entry in self.source.sources]
                tensor = self.source.function(*sources).detach().cpu()
            if tuple(tensor.shape) != self.shape:
                raise WeightError(
                    "a deferred transform gave another shape than declared",
                    where=self.where,
                    got=tuple(tensor.shape),
                    expected=self.shape,
                )
            tensor = encode(tensor, self.dtype, self.where)
        else:
            tensor = self.source.file.read(self.source.name) if isinstance(self.source, InFile) else self.source
        if check_finite:
            _check_finite(tensor, self.where)
        return tensor


def check_storable(tensor: Tensor, name: str) -> None:
    """Raises WeightError for a tensor without data (meta), not dense, or of a dtype the file format lacks."""
    if tensor.is_meta or tensor.layout is not torch.strided or dtype_name(tensor.dtype) not in _PLAIN:
        raise WeightError(
            "a tensor that cannot be stored",
            where=name,
            got=f"{tensor.dtype} {tensor.layout} on {tensor.device}",
            expected="a dense tensor with data, of a dtype among " + ", ".join(_PLAIN),
        )


def stored_form(dtype: str, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The torch dtype and shape that a tensor of a logical dtype and shape has in a file.

    Raises:
        WeightError: if the dtype is unknown.
    """
    packed = _PACKED.fullmatch(dtype)
    if packed:
        *rows, width = shape or (1,)
        return torch.uint8, (*rows, -(-width * int(packed[2]) // 8))
    if dtype not in _PLAIN:
        raise WeightError("unknown dtype", got=dtype, expected=", ".join(_PLAIN) + ", int1 to int7, uint1 to uint7")
    return _PLAIN[dtype], shape


def encode(tensor: Tensor, dtype: str, where: str) -> Tensor:
    """A tensor in stored form.

    Raises:
        WeightError: if the tensor is not of the dtype, or codes exceed its range (packing would wrap them silently).
    """
    stored_dtype, stored_shape = stored_form(dtype, tuple(tensor.shape))
    packed = _PACKED.fullmatch(dtype)
    expected = stored_dtype if packed is None else torch.uint8 if packed[1] else torch.int8
    if tensor.dtype != expected:
        raise WeightError(
            "the tensor is not of its declared dtype",
            where=where,
            got=dtype_name(tensor.dtype),
            expected=dtype if packed is None else f"{dtype_name(expected)} codes of {dtype}",
        )
    if packed is None:
        return tensor
    if tensor.numel() == 0:
        return torch.empty(stored_shape, dtype=torch.uint8)
    bits = int(packed[2])
    low, high = (int(value) for value in tensor.aminmax())
    least, most = (0, (1 << bits) - 1) if packed[1] else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    if low < least or high > most:
        raise WeightError(
            f"codes do not fit {dtype}", where=where, got=f"[{low}, {high}]", expected=f"[{least}, {most}]"
        )
    return numerics.pack_bits(tensor.reshape(tensor.shape or (1,)).contiguous(), bits)


def decode(stored: Tensor, entry: StoredTensor) -> Tensor:
    """The inverse of `encode`."""
    packed = _PACKED.fullmatch(entry.dtype)
    if packed is None:
        return stored
    if stored.numel() == 0:
        return torch.empty(entry.shape, dtype=torch.uint8 if packed[1] else torch.int8)
    width = entry.shape[-1] if entry.shape else 1
    return numerics.unpack_bits(stored, int(packed[2]), width, signed=not packed[1]).reshape(entry.shape)


def _check_finite(tensor: Tensor, where: str) -> None:
    """Refuses NaN and infinity.

    ``aminmax`` propagates both and, unlike ``isfinite``, makes no temporary: 25 times faster on float32, exact on all.
    """
    if not tensor.is_floating_point():
        return

    def finite(values: Tensor) -> bool:
        if values.itemsize == 1:  # float8 has no reductions
            return all(finite(part.float()) for part in values.split(_UPCAST_ELEMENTS))
        low, high = values.aminmax()
        return bool(low.isfinite() & high.isfinite())

    if not all(finite(chunk) for chunk in contiguous_chunks(tensor)):
        values = tensor.float()
        raise WeightError(
            "a weight is not finite",
            where=where,
            got=f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of {tensor.numel()} values",
            remedy="the checkpoint is damaged, or its values overflow its dtype: obtain it again, or in another dtype",
        )


def reachable(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """Every tensor once: those given and those they derive from."""
    seen: set[StoredTensor] = set()
    pending = list(tensors)[::-1]
    while pending:
        entry = pending.pop()
        if entry not in seen:
            seen.add(entry)
            yield entry
            if isinstance(entry.source, Deferred):
                pending.extend(entry.source.sources)


def sample(entry: StoredTensor) -> Iterator[bytes | memoryview]:
    """Evenly spaced blocks of a tensor's bytes, or all of them where it is small; see `WeightStore.fingerprint`."""
    size = entry.nbytes
    blocks = [(0, size)]
    if size > _SAMPLE_BLOCKS * _SAMPLE_BYTES:
        starts = [i * (size - _SAMPLE_BYTES) // (_SAMPLE_BLOCKS - 1) for i in range(_SAMPLE_BLOCKS)]
        blocks = [(start, start + _SAMPLE_BYTES) for start in starts]
    if isinstance(entry.source, InFile):
        yield from entry.source.file.read_blocks(entry.source.name, blocks)
        return
    if isinstance(entry.source, Rearranged) and not isinstance(entry.source, SliceOf):
        for source in entry.source.sources:
            yield from sample(source)
        return
    for chunk in byte_chunks(entry.load(check_finite=False).contiguous()):
        yield from (chunk[begin:end] for begin, end in blocks)


def copy_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors that may be moved to a file without the originals; values are shared, and what is tied stays tied."""
    copies: dict[StoredTensor, StoredTensor] = {}

    def copied(entry: StoredTensor) -> StoredTensor:
        if entry not in copies:
            source = entry.source
            if isinstance(source, Deferred):
                source = replace(source, sources=tuple(copied(item) for item in source.sources))
            copies[entry] = replace(entry, source=source)
        return copies[entry]

    return {name: copied(entry) for name, entry in tensors.items()}


def are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have one shape and equal values; see `WeightStore.is_equal`."""
    if first is second or first.shape != second.shape:
        return first is second
    if not (isinstance(first.source, InFile) and isinstance(second.source, InFile) and first.dtype == second.dtype):
        values = (decode(entry.load(check_finite=False), entry) for entry in (first, second))
        return torch.equal(*(value.float() for value in values))
    for begin in range(0, first.nbytes, _COMPARED_BYTES):
        block = [(begin, min(begin + _COMPARED_BYTES, first.nbytes))]
        parts = [entry.source.file.read_blocks(entry.source.name, block)[0] for entry in (first, second)]  # type: ignore[union-attr]
        if parts[0] != parts[1]:  # 0 and -0 are equal, too
            values = (torch.frombuffer(bytearray(part), dtype=first.stored[0]) for part in parts)
            if not torch.equal(*(value.float() for value in values)):
                return False
    return True


def write_tensors(
    write: Callable[[bytes | memoryview], object],
    tensors: Mapping[str, StoredTensor],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    *,
    check_finite: bool,
) -> None:
    """Streams one file of tensors, with the metadata that `tensors_of` restores them by.

    Args:
        write: takes the next bytes of the file.
        tensors: what to write, by name.
        aliases: further names, each with the name among ``tensors`` it is tied to.
        metadata: strings for ``__metadata__``.
        check_finite: refuse NaN and infinity.
    """
    packed = {n: {"dtype": t.dtype, "shape": t.shape} for n, t in tensors.items() if _PACKED.fullmatch(t.dtype)}
    if packed or aliases:
        ours = {"schema": _SCHEMA, "packed": packed, "aliases": dict(aliases)}
        metadata = {**metadata, METADATA_KEY: json.dumps(ours, sort_keys=True, separators=(",", ":"))}
    entries = {name: entry.stored for name, entry in tensors.items()}
    write_safetensors(write, entries, metadata, lambda name: tensors[name].load(check_finite=check_finite))


def tensors_of(file: SafetensorsFile) -> dict[str, StoredTensor]:
    """The tensors of a file: packed integers by their logical dtype and shape, tied names by one `StoredTensor`.

    Raises:
        WeightError: if the metadata contradicts the header.
    """
    tensors = {n: StoredTensor(n, dtype_name(e.dtype), e.shape, InFile(file, n)) for n, e in file.entries.items()}
    if METADATA_KEY not in file.metadata:
        return tensors
    where = f"{file.path}: __metadata__.{METADATA_KEY}"
    ours = parse_json_object(file.metadata[METADATA_KEY], where)
    if ours.get("schema") != _SCHEMA:
        raise WeightError("written by another version", where=where, got=ours.get("schema"), expected=_SCHEMA)
    packed, aliases = ours.get("packed"), ours.get("aliases")
    if not isinstance(packed, dict) or not isinstance(aliases, dict):
        raise WeightError("damaged metadata", where=where, expected="objects called packed and aliases")
    for name, value in packed.items():
        tensors[name] = _packed_tensor(file, name, value)
    for name, owner in aliases.items():
        if name in file.entries or not isinstance(owner, str) or owner not in file.entries:
            raise WeightError("damaged metadata: a tied name without its tensor", where=f"{where}: {name}", got=owner)
        tensors[name] = tensors[owner]
    return tensors


def _packed_tensor(file: SafetensorsFile, name: str, value: Any) -> StoredTensor:
    dtype, shape = (value.get("dtype"), value.get("shape")) if isinstance(value, dict) else (None, None)
    valid = isinstance(dtype, str) and _PACKED.fullmatch(dtype) and isinstance(shape, list)
    if not valid or not all(type(size) is int and size >= 0 for size in shape or ()):
        raise WeightError("damaged metadata of a packed integer", where=f"{file.path}: {name}", got=value)
    entry = StoredTensor(name, str(dtype), tuple(shape or ()), InFile(file, name))
    found = file.entries.get(name)
    if found is None or (found.dtype, found.shape) != entry.stored:
        raise WeightError(
            "a packed integer is not stored as its metadata says",
            where=f"{file.path}: {name}",
            got="no such tensor" if found is None else f"{dtype_name(found.dtype)} {found.shape}",
            expected=f"uint8 {entry.stored[1]} for {dtype} {entry.shape}",
        )
    return entry
