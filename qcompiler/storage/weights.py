"""The tensors of a model by name: read lazily from safetensors, under an overlay of rewritten and deferred ones.

Nothing is held in memory but what was `WeightStore.set` and not yet spilled. `WeightStore.save` streams.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from qcompiler.errors import InputError, WeightError
from qcompiler.storage.checkpoint import open_checkpoint, weight_files
from qcompiler.storage.safetensors_io import SafetensorsFile, dtype_name
from qcompiler.storage.shards import DEFAULT_SHARD_BYTES, partition
from qcompiler.storage.staging import StagedFiles
from qcompiler.storage.stored_tensor import (
    METADATA_KEY,
    Deferred,
    InFile,
    Rearranged,
    SliceOf,
    StoredTensor,
    are_equal,
    check_storable,
    copy_tensors,
    decode,
    encode,
    reachable,
    sample,
    stack,
    stored_form,
    write_tensors,
)

__all__ = ["TensorInfo", "WeightStore"]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        name: its name in the store.
        dtype: ``float32``, ``bfloat16``, ``int64``, ``bool``, ... or a packed integer: ``int1`` to ``int7``, ``uint1``
            to ``uint7``.
        shape: its logical shape; of a packed integer, in codes.
        nbytes: bytes as stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class WeightStore:
    """Named tensors, each on disk, in memory, or computed when read.

    Tensors given to the store and read from it are not copied where that can be avoided: do not write into them.

    `fingerprint`, `names` and `info` see the overlay: a name always stands for what `read` returns.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, StoredTensor] = {}

    @classmethod
    def from_directory(cls, path: str | Path, *, stem: str = "model") -> Self:
        """Opens ``<stem>.safetensors``, or the shards of ``<stem>.safetensors.index.json`` where there is no such file.

        Only headers are read. Symbolic links may lead nowhere but inside the directory or, in a Hugging Face hub cache
        (``.../snapshots/<revision>``), to that cache's ``blobs``.

        Raises:
            InputError: if the path is not a directory.
            WeightError: if weights are missing, damaged, pickled, or lie outside the directory.
        """
        store = cls()
        store._tensors = open_checkpoint(Path(path), stem)
        return store

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Holds tensors in memory. Names that share one memory (the same address, shape and strides) are tied."""
        store = cls()
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            check_storable(tensor, name)
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and key in seen:
                store.alias(name, seen[key])
            else:
                store.set(name, tensor)
                seen[key] = name
        return store

    def names(self) -> list[str]:
        """All names: those of the files in header order, then those added."""
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and stored size of a tensor; nothing is read.

        Raises:
            WeightError: if there is no such tensor.
        """
        entry = self._find(name)
        return TensorInfo(name, entry.dtype, entry.shape, entry.nbytes)

    def read(self, name: str, *, check_finite: bool = True) -> Tensor:
        """Reads a tensor in its stored dtype; packed integers come back as int8 or uint8, one code per element.

        Args:
            name: the tensor.
            check_finite: refuse NaN and infinity in it and in what it is derived from.

        Returns:
            The tensor, on the CPU.

        Raises:
            WeightError: if there is no such tensor, it cannot be read, or it is not finite.
        """
        entry = self._find(name)
        return decode(entry.load(check_finite=check_finite), entry)

    def set(self, name: str, tensor: Tensor, dtype: str | None = None) -> None:
        """Puts a tensor in memory under ``name``, new or not.

        A tied name is thereby untied; derived tensors keep their source.

        Args:
            name: the name.
            tensor: the value, on any device.
            dtype: its dtype, for codes of a packed integer given as int8 (``int4``) or uint8 (``uint4``), one per
                element.

        Raises:
            WeightError: if the tensor cannot be stored as ``dtype``.
        """
        _check_name(name)
        check_storable(tensor, name)
        dtype = dtype_name(tensor.dtype) if dtype is None else dtype
        stored = encode(tensor.detach().cpu(), dtype, name)
        self._tensors[name] = StoredTensor(name, dtype, tuple(tensor.shape), stored)

    def derive(
        self,
        name: str,
        sources: tuple[str, ...],
        function: Callable[..., Tensor],
        *,
        dtype: str,
        shape: Sequence[int],
        rearranges: bool = False,
        store: "WeightStore | None" = None,
    ) -> None:
        """Defines a tensor as a function of others, computed at every read.

        The sources are what their names stand for *now*: ``name`` may be among them (a transform in place), and later
        changes of a source's name or value do not reach the derived tensor.

        Args:
            name: the name, new or not.
            sources: names of the arguments.
            function: called with the sources as `read` gives them; must not write into them.
            dtype: dtype of the result; for a packed integer the function returns int8 or uint8 codes.
            shape: shape of the result.
            rearranges: the function moves the numbers of its sources to other places and leaves them as they are.
            store: whose names the sources are; by default this one's.

        Raises:
            WeightError: if a source is missing or the dtype unknown; on read, if the function breaks its promise.
        """
        _check_name(name)
        stored_form(dtype, tuple(shape))  # refuses unknown dtypes
        tensors = tuple((self if store is None else store)._find(source) for source in sources)
        kind = Rearranged if rearranges else Deferred
        self._tensors[name] = StoredTensor(name, dtype, tuple(shape), kind(tensors, function))

    def slice(self, name: str, source: str, index: int) -> None:
        """Defines a tensor as one slice of another along its first axis; the other slices are not read where possible.

        Raises:
            WeightError: if there is no tensor ``source``, or no such slice of it.
        """
        _check_name(name)
        whole = self._find(source)
        if not whole.shape or not 0 <= index < whole.shape[0]:
            raise WeightError("no such slice of a tensor", where=source, got=index, expected=f"shape {whole.shape}")
        if isinstance(whole.source, Deferred) and whole.source.function is stack:
            self._tensors[name] = whole.source.sources[index]
            return
        part = SliceOf((whole,), operator.itemgetter(index), index)
        self._tensors[name] = StoredTensor(name, whole.dtype, whole.shape[1:], part)

    def alias(self, name: str, of: str, store: "WeightStore | None" = None) -> None:
        """Ties ``name``, new or not, to the tensor ``of`` (of another store): stored once, until one is set anew.

        Raises:
            WeightError: if there is no tensor ``of``.
        """
        _check_name(name)
        self._tensors[name] = (self if store is None else store)._find(of)

    def copy(self) -> "WeightStore":
        """A store of the same tensors, values shared: what is set, derived or spilled in one leaves the other alone."""
        store = WeightStore()
        store._tensors = copy_tensors(self._tensors)
        return store

    def is_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have one shape and equal values, in float32 where their dtypes differ.

        Of two that lie in files in one dtype, a few MiB at a time are read.

        Raises:
            WeightError: if one is missing or cannot be read.
        """
        return are_equal(self._find(first), self._find(second))

    def tied(self, name: str) -> tuple[str, ...]:
        """The other names of the same tensor."""
        entry = self._find(name)
        return tuple(other for other, candidate in self._tensors.items() if candidate is entry and other != name)

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name; what is derived from it or tied to it stays so.

        Raises:
            WeightError: if there is no tensor ``old``, or one called ``new``.
        """
        entry = self._find(old)
        _check_name(new)
        if old == new:
            return
        if new in self._tensors:
            raise WeightError("the new name is taken", where=new, got=f"rename of {old}", remedy="remove it first")
        self._tensors[new] = entry
        del self._tensors[old]

    def remove(self, name: str) -> None:
        """Forgets a name; tied names and derived tensors keep the data.

        Raises:
            WeightError: if there is no such tensor.
        """
        self._find(name)
        del self._tensors[name]

    def version(self, name: str) -> object:
        """Something that stays equal as long as the tensor's value does: wherever it is moved, not when it is set anew.

        Raises:
            WeightError: if there is no such tensor.
        """
        return self._find(name)

    def stored_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of the named (or all) tensors as stored, tied ones counted once."""
        return sum(entry.nbytes for entry in {self._find(name) for name in (self._tensors if names is None else names)})

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and samples of the contents, whatever files they lie in.

        Of each tensor 16 blocks of 4096 bytes are hashed, evenly spaced from its first byte to its last, or all of it
        where that is less: 20 MB of reading for 300 large tensors. It tells models apart and notices retraining; it is
        no proof against changes of single values. Derived tensors are computed for it, but those that only rearrange.
        """
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            entry = self._tensors[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            for block in sample(entry):
                digest.update(block)
        return digest.hexdigest()

    def spill(self, directory: str | Path, stem: str) -> Path:
        """Moves every tensor held in memory to ``<directory>/<stem>.safetensors`` and reads it from there from now on.

        That includes tensors that only derived ones still use. The file appears whole or not at all, synced to disk;
        the store is unchanged if writing fails.

        Returns:
            The file.

        Raises:
            InputError: if the file cannot be written or this store already reads from it.
            ResourceError: if the disk is full.
        """
        path = Path(directory) / f"{stem}.safetensors"
        if path.parent != Path(directory) or stem.startswith("."):
            raise InputError("not a file name", where=stem, expected="a name without directories")
        tensors = list(reachable(self._tensors.values()))
        if path.exists() and any(isinstance(t.source, InFile) and t.source.file.path.samefile(path) for t in tensors):
            raise InputError("a spill file of this store would be overwritten", where=path, remedy="use another stem")
        by_name: dict[str, StoredTensor] = {}
        for entry in tensors:
            if isinstance(entry.source, Tensor):
                name, copies = entry.label, 0
                while name in by_name:
                    copies += 1
                    name = f"{entry.label}~{copies}"
                by_name[name] = entry
        with StagedFiles(path.parent) as staged, staged.file(path.name) as write:
            write_tensors(write, by_name, {}, {}, check_finite=False)
        file = SafetensorsFile(path)
        for name, entry in by_name.items():
            entry.source = InFile(file, name)
        return path

    def save(
        self,
        directory: str | Path,
        *,
        stem: str = "model",
        names: Sequence[str] | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        check_finite: bool = True,
    ) -> tuple[Path, ...]:
        """Writes tensors to ``<stem>.safetensors``, or to shards and an index where that would be too large.

        Of tied names, the first in ``names`` owns the data; the others are noted in its file's metadata, from which
        `from_directory` ties them again. Otherwise the order of ``names`` does not matter: equal content gives equal
        bytes. One tensor at a time is in memory, with the sources it is derived from. All files appear, or none.

        Args:
            directory: made if missing; must not hold safetensors weights of that stem yet.
            stem: what the names of the files begin with.
            names: the tensors to save; all by default.
            max_shard_bytes: limit on the tensor data of one file; a larger tensor gets a file of its own.
            metadata: strings for the ``__metadata__`` of every file.
            check_finite: refuse NaN and infinity.

        Returns:
            The files, the index last.

        Raises:
            WeightError: if a tensor is missing, cannot be read, or is not finite.
            InputError: if the directory cannot be written or holds weights.
            ResourceError: if the disk is full.
        """
        root = Path(directory)
        metadata = {"format": "pt"} | dict(metadata or {})
        if METADATA_KEY in metadata:
            raise InputError("reserved metadata key", where=METADATA_KEY, remedy="use another key")
        if max_shard_bytes < 1:
            raise InputError("max_shard_bytes must be positive", got=max_shard_bytes)
        single, index_file = weight_files(stem)
        taken = [path for pattern in (single, index_file, f"{stem}-*-of-*.safetensors") for path in root.glob(pattern)]
        if taken:
            raise InputError("the directory already holds weights", where=taken[0], remedy="choose another directory")

        owners: dict[StoredTensor, str] = {}
        aliases: dict[str, str] = {}
        for name in dict.fromkeys(self._tensors if names is None else names):
            owner = owners.setdefault(self._find(name), name)
            if owner != name:
                aliases[name] = owner
        shards = partition({name: entry for entry, name in owners.items()}, max_shard_bytes)
        files = {
            single if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard
            for i, shard in enumerate(shards, 1)
        }
        with StagedFiles(root) as staged:
            for file, shard in files.items():
                tied = {name: owner for name, owner in aliases.items() if owner in shard}
                with staged.file(file) as write:
                    write_tensors(write, shard, tied, metadata, check_finite=check_finite)
            if len(shards) > 1:
                weight_map = {name: file for file, shard in files.items() for name in shard}
                total = sum(entry.nbytes for entry in owners)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                with staged.file(index_file) as write:
                    write((json.dumps(index, indent=2) + "\n").encode())
        return tuple(root / file for file in (*files, *([index_file] if len(shards) > 1 else [])))

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise WeightError("no such tensor", where=name, expected=f"one of {len(self._tensors)} names") from None


def _check_name(name: str) -> None:
    if not name or name == "__metadata__":
        raise WeightError("not a name for a tensor", where=repr(name))
