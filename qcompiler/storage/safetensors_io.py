"""The safetensors file format: checked headers, reads into buffers we own, streamed writes.

A file is eight bytes with the header's length (little-endian), the header (JSON: tensor name → dtype tag, shape, byte
range; ``__metadata__`` holds strings), then the data. Reads use ``preadv`` rather than a memory map: a map keeps every
page it touched resident, and a model must not stay in memory because it was once looked at.

Source: https://github.com/huggingface/safetensors, section "Format". Hosts are little-endian, as the data is.
"""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import WeightError

__all__ = [
    "TORCH_DTYPES",
    "Entry",
    "SafetensorsFile",
    "byte_chunks",
    "contiguous_chunks",
    "dtype_name",
    "identity_of",
    "parse_json_object",
    "read_exactly",
    "write_safetensors",
]

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtype tags of the format and what they are in torch."""

_TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
_CHUNK_BYTES = 1 << 20
_DOWNLOAD_AGAIN = "copy or download the file again"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as stored.

    Attributes:
        dtype: its torch dtype.
        shape: its shape.
        offset: where its first byte lies in the file.
        nbytes: its size in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def parse_json_object(text: str | bytes, where: object) -> dict[str, Any]:
    """Parses a JSON object in which no key occurs twice.

    Raises:
        WeightError: if it is not one.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise WeightError("the JSON cannot be read", where=where, got=error, remedy=_DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise WeightError("the JSON is not an object", where=where, got=type(value).__name__, remedy=_DOWNLOAD_AGAIN)
    return value


def read_exactly(fd: int, buffer: memoryview, offset: int, where: object) -> None:
    """Fills ``buffer`` from the file at ``offset``.

    Raises:
        WeightError: if the file ends before, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise WeightError("the file cannot be read", where=where, got=error) from error
        if count == 0:
            raise WeightError(
                "the file ends too early",
                where=where,
                got=f"{done} bytes at offset {offset}",
                expected=f"{len(buffer)} bytes",
                remedy=_DOWNLOAD_AGAIN,
            )
        done += count


class SafetensorsFile:
    """A safetensors file whose header was read and checked. No descriptor stays open between reads.

    Attributes:
        path: the file.
        entries: its tensors by name, in header order.
        metadata: its ``__metadata__``.

    Args:
        path: the file.

    Raises:
        WeightError: if the file is missing, truncated or its header is damaged; no tensor data was read by then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, ...] | None = None
        with self._open() as (fd, status):
            self._identity = identity_of(status)
            header, data_start = self._read_header(fd, status.st_size)
        self.metadata = self._check_metadata(header.pop(_METADATA, {}))
        self.entries = {name: self._check_entry(name, value, data_start) for name, value in header.items()}
        self._check_layout(data_start, status.st_size)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Reads one tensor into a new buffer.

        Args:
            name: the tensor.
            index: read only this slice along the first axis.

        Raises:
            WeightError: if the file changed since it was opened, or cannot be read.
        """
        entry = self.entries[name]
        offset, size, shape = entry.offset, entry.nbytes, entry.shape
        if index is not None:
            size, shape = size // shape[0], shape[1:]
            offset += index * size
        buffer = torch.empty(size, dtype=torch.uint8)
        with self._open() as (fd, _):
            read_exactly(fd, buffer.numpy().data, offset, f"{self.path}: {name}")
        if entry.dtype is torch.bool and size and int(buffer.max()) > 1:
            raise WeightError(
                "a boolean tensor holds other bytes than 0 and 1",
                where=f"{self.path}: {name}",
                got=int(buffer.max()),
                remedy=_DOWNLOAD_AGAIN,
            )
        return buffer.view(entry.dtype).reshape(shape)

    def read_blocks(self, name: str, blocks: Sequence[tuple[int, int]]) -> list[bytes]:
        """Reads the byte ranges ``(begin, end)``, counted from the tensor's first byte."""
        entry = self.entries[name]
        result = []
        with self._open() as (fd, _):
            for begin, end in blocks:
                buffer = bytearray(end - begin)
                read_exactly(fd, memoryview(buffer), entry.offset + begin, f"{self.path}: {name}")
                result.append(bytes(buffer))
        return result

    @contextmanager
    def _open(self) -> Iterator[tuple[int, os.stat_result]]:
        try:  # O_NONBLOCK: opening a pipe by mistake must not hang
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            what = "a weight file is missing" if error.errno == errno.ENOENT else "a weight file cannot be opened"
            raise WeightError(what, where=self.path, got=error.strerror) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise WeightError("not a regular file", where=self.path, expected="a safetensors file")
            if self._identity is not None and self._identity != identity_of(status):
                raise WeightError(
                    "a weight file changed while it was in use",
                    where=self.path,
                    remedy="leave the model's files alone while it is compiled, and start again",
                )
            yield fd, status
        finally:
            os.close(fd)

    def _read_header(self, fd: int, size: int) -> tuple[dict[str, Any], int]:
        def damaged(what: str, got: object, expected: object) -> WeightError:
            return WeightError(what, where=self.path, got=got, expected=expected, remedy=_DOWNLOAD_AGAIN)

        if size < 8:
            raise damaged("the file is too short to be safetensors", f"{size} bytes", "a header of at least 10 bytes")
        prefix = bytearray(8)
        read_exactly(fd, memoryview(prefix), 0, self.path)
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise damaged("absurd header length", f"{length} bytes", f"2 to {_MAX_HEADER_BYTES} bytes")
        if 8 + length > size:
            raise damaged("truncated in the header", f"{size} bytes", f"at least {8 + length} bytes")
        text = bytearray(length)
        read_exactly(fd, memoryview(text), 8, self.path)
        return parse_json_object(bytes(text), f"{self.path}: header"), 8 + length

    def _check_metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise WeightError("__metadata__ must map strings to strings", where=f"{self.path}: header")
        return value

    def _check_entry(self, name: str, value: Any, data_start: int) -> Entry:
        def damaged(what: str, got: object, expected: object) -> WeightError:
            return WeightError(what, where=f"{self.path}: {name}", got=got, expected=expected, remedy=_DOWNLOAD_AGAIN)

        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise damaged("damaged header entry", value, "an object with dtype, shape and data_offsets")
        tag, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(tag, str) or tag not in TORCH_DTYPES:
            raise damaged("unknown dtype", tag, ", ".join(TORCH_DTYPES))
        if not _is_sizes(shape):
            raise damaged("damaged shape", shape, "a list of sizes")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise damaged("damaged data_offsets", offsets, "[begin, end]")
        dtype = TORCH_DTYPES[tag]
        nbytes = extent = dtype.itemsize
        for length in shape:
            nbytes *= length
            extent *= max(length, 1)
        if extent >= 1 << 63:  # an empty tensor may still have strides that no machine can count
            raise damaged("damaged shape", shape, "sizes whose product fits 63 bits")
        if offsets[1] - offsets[0] != nbytes:
            raise damaged("size and shape disagree", f"{offsets[1] - offsets[0]} bytes", f"{nbytes} bytes")
        return Entry(dtype, tuple(shape), data_start + offsets[0], nbytes)

    def _check_layout(self, data_start: int, size: int) -> None:
        """Tensors must tile the data: a gap could hide content, an overlap is two tensors read from one place."""
        position = data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            where = f"{self.path}: {name}"
            if entry.offset + entry.nbytes > size:
                raise WeightError(
                    "truncated: the tensor lies beyond the end of the file",
                    where=where,
                    got=f"{size} bytes",
                    expected=f"at least {entry.offset + entry.nbytes} bytes",
                    remedy=_DOWNLOAD_AGAIN,
                )
            if entry.offset != position:
                raise WeightError(
                    "the tensor overlaps its neighbour" if entry.offset < position else "a gap before the tensor",
                    where=where,
                    got=f"offset {entry.offset - data_start}",
                    expected=f"offset {position - data_start}",
                    remedy=_DOWNLOAD_AGAIN,
                )
            position += entry.nbytes
        if position != size:
            raise WeightError(
                "bytes follow the last tensor",
                where=self.path,
                got=f"{size} bytes",
                expected=f"{position} bytes",
                remedy=_DOWNLOAD_AGAIN,
            )


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another, and from what it was before."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def contiguous_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in row-major order, 1-D; a strided one is copied a MiB at a time, never whole."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    row_bytes = tensor[0].numel() * tensor.itemsize
    for rows in tensor.split(max(1, _CHUNK_BYTES // row_bytes)):
        yield rows.contiguous().view(-1)


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a CPU tensor, as `contiguous_chunks`."""
    for chunk in contiguous_chunks(tensor):
        yield chunk.view(torch.uint8).numpy().data


def write_safetensors(
    write: Callable[[bytes | memoryview], object],
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Streams one safetensors file: the header from ``entries``, then each tensor as ``read`` gives it.

    Tensors lie by falling item size, then by name, so that each is aligned and equal content gives equal bytes.

    Args:
        write: takes the next bytes of the file.
        entries: dtype and shape by name.
        metadata: the ``__metadata__``.
        read: gives the tensor of a name; it must have the promised dtype and shape.
    """
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = entries[name]
        end = position + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _TAGS[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)

    def stream(name: str) -> None:  # a frame of its own: the tensor is freed before the next is read
        tensor = read(name)
        if (tensor.dtype, tuple(tensor.shape)) != entries[name]:
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not the {entries[name]} promised")
        for chunk in byte_chunks(tensor):
            write(chunk)

    for name in order:
        stream(name)
