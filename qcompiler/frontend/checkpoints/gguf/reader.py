"""Files of GGUF: blocks of 32 weights become codes and scales, other types floats; settings become a ``config.json``.

| type | a weight is | becomes |
|---|---|---|
| ``Q8_0`` | ``code * d`` | int8, symmetric |
| ``Q4_0`` | ``(nibble - 8) * d`` | int4, symmetric |
| ``Q4_1`` | ``nibble * d + m`` | int4 with zero points where all minima are ``-zero_point * d``, else floats |
| ``MXFP4`` | a 4-bit float times a power of two | the same |
| others | see ``gguf.quants`` | floats, as that computes them |

Layers and embedding tables have codes. Rows of q and k are put back in transformers' order.
"""

import importlib.util
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.errors import InputError, MissingDependencyError, WeightError
from qcompiler.frontend.checkpoints.contents import Checkpoint, Layer
from qcompiler.frontend.checkpoints.gguf.config import config_of
from qcompiler.frontend.checkpoints.gguf.models import LLAMA3_FACTORS, GGUFPlace, gguf_places, undo_interleave
from qcompiler.frontend.checkpoints.gguf.tokenizer import save_tokenizer
from qcompiler.frontend.skeleton import build_on_meta
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.storage import GGUFFile, GGUFTensor, WeightStore

__all__ = ["OpenedGGUF", "find_gguf", "open_gguf"]

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_BLOCK = 32
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADS = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4, "MXFP4": 1}
"""Bytes of a block ahead of its codes."""


@dataclass(frozen=True)
class OpenedGGUF:
    """A GGUF file, read as a checkpoint.

    Attributes:
        checkpoint: its layers and float tensors, under the names of the model.
        config: that of ``config.json``.
        companions: a directory with ``config.json`` and the tokenizer. Where it is made for the purpose, it lives as
            long as the tensors of the checkpoint.
        model: on meta.
        computed: the values of its buffers.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    companions: Path
    model: nn.Module
    computed: dict[str, Tensor]


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one of a directory without other weights; None where none is.

    Raises:
        InputError: if a directory holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if not files or any(next(path.glob(pattern), None) for pattern in ("*.safetensors", "*.bin")):
        return None
    if len(files) > 1 and files != _parts_of(files[0]):
        raise InputError(
            "a directory holds several GGUF files",
            where=path,
            got=", ".join(file.name for file in files[:4]),
            expected="one, or all parts of one",
            remedy="name one of them",
        )
    return files[0]


def open_gguf(path: Path) -> OpenedGGUF:
    """Reads a file (or the one of a directory, with its ``config.json`` and tokenizer where they lie there).

    Raises:
        InputError: for what is no GGUF file.
        UnsupportedModelError: for an architecture, version or type that is not read.
        WeightError: for a damaged file.
        MissingDependencyError: without ``gguf``.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "reading GGUF needs a package that is not installed",
            where=path,
            got="no module gguf",
            remedy="pip install gguf",
        )
    found = find_gguf(path)
    assert found is not None
    file = _open_parts(found)
    notes: list[str] = []
    own: Path | None = None
    if path.is_dir() and (path / "config.json").is_file():
        companions = path
        config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
    else:
        config = config_of(file)
        companions = own = Path(tempfile.mkdtemp(prefix="qcompiler-gguf-"))
        (companions / "config.json").write_text(json.dumps(config, indent=2))
        if (note := save_tokenizer(file, companions)) is not None:
            notes.append(note)
    model, computed = build_on_meta(companions, config, trust_remote_code=False)
    checkpoint = _Reading(file, model, own).checkpoint()
    checkpoint.notes.update({note: [] for note in notes})
    return OpenedGGUF(checkpoint, config, companions, model, computed)


def _parts_of(path: Path) -> list[Path]:
    """Where the parts of a divided file lie, by the name of one of them; the file itself where it is whole."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[2])
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _open_parts(path: Path) -> GGUFFile:
    """A file, with the tensors of its further parts.

    Raises:
        InputError: if a part is missing.
        WeightError: if the parts do not belong together.
    """
    named = _parts_of(path)
    missing = next((part for part in named if not part.is_file()), None)
    if missing is not None:
        raise InputError(
            "a part of a divided GGUF file is missing",
            where=missing,
            got="no file",
            expected=f"{len(named)} files",
            remedy="put all parts in one directory",
        )
    parts = [GGUFFile(part) for part in named]
    for number, part in enumerate(parts):
        said = tuple(part.settings.get(key, default) for key, default in (("split.no", 0), ("split.count", 0)))
        if said not in ((number, len(parts)), (0, 0) if len(parts) == 1 else ()):
            raise WeightError(
                "a part of a divided GGUF file says otherwise than its name",
                where=part.path,
                got=f"part {said[0]} of {said[1]}",
                expected=f"part {number} of {len(parts)}",
                remedy="give the parts the names that they were published under",
            )
    first, *others = parts
    for part in others:
        first.add(part)
    total = first.settings.get("split.tensors.count", len(first.tensors))
    if total != len(first.tensors):
        raise WeightError(
            "the parts of a GGUF file do not hold all tensors",
            where=path,
            got=len(first.tensors),
            expected=total,
            remedy="use the parts as they were published together",
        )
    return first


class _Reading:
    """A file on its way to a checkpoint.

    Args:
        file: as opened.
        model: on meta.
        own: a directory that goes when the last tensor of the checkpoint does; None where there is none.
    """

    def __init__(self, file: GGUFFile, model: nn.Module, own: Path | None) -> None:
        self._file, self._model = file, model
        if own is not None:
            weakref.finalize(self, shutil.rmtree, own, ignore_errors=True)
        self._checkpoint = Checkpoint(WeightStore(), "gguf")

    def checkpoint(self) -> Checkpoint:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        placed = set()
        for name, place in gguf_places(parameters, self._model.config).items():
            if place is None or place.name not in self._file.tensors:
                continue
            placed.add(place.name)
            tensor = self._file.tensors[place.name]
            path, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(path)
            if isinstance(module, (nn.Linear, nn.Embedding)) and attribute == "weight" and tensor.kind in _HEADS:
                self._add_layer(path, tensor, place)
            else:
                self._add_float(name, tensor, place)
        for name, tensor in self._file.tensors.items():
            if name not in placed and name != LLAMA3_FACTORS:
                self._add_float(name, tensor, GGUFPlace(name, None))
        self._checkpoint.finish()
        return self._checkpoint

    def _read(self, name: str, heads: int | None) -> Tensor:
        """A tensor as it lies in the file, its rows in transformers' order."""
        tensor = self._file.read(name)
        return tensor if heads is None else undo_interleave(tensor, heads)

    def _store(self, name: str, place: GGUFPlace, dtype: str, shape: tuple[int, ...]) -> None:
        self._checkpoint.stored.derive(name, (), partial(self._read, place.name, place.heads), dtype=dtype, shape=shape)

    def _add_float(self, name: str, tensor: GGUFTensor, place: GGUFPlace) -> None:
        if tensor.kind in _FLOATS:
            self._store(name, place, _FLOATS[tensor.kind], tensor.shape)
            return

        def weight() -> Tensor:
            return _dequantized(self._read(place.name, place.heads), tensor.kind)

        self._checkpoint.stored.derive(name, (), weight, dtype="float32", shape=tensor.shape)
        note = f"{tensor.kind} is read as float weights, which no format here has the codes of"
        self._checkpoint.notes.setdefault(note, []).append(name.removesuffix(".weight"))

    def _add_layer(self, path: str, tensor: GGUFTensor, place: GGUFPlace) -> None:
        if tensor.kind == "Q4_1" and not _has_zero_points(self._file.read(tensor.name)):
            self._add_float(f"{path}.weight", tensor, place)
            return
        checkpoint, kind = self._checkpoint, tensor.kind
        rows, columns = tensor.shape
        part = f"weight.{kind}"
        self._store(f"{path}.{part}", place, "uint8", (rows, tensor.nbytes // rows))
        blocks = checkpoint.take(path, part, ("uint8",))
        spec = _spec(kind)
        groups = (rows, columns // _BLOCK)
        numbers: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
            ("scale", _exponents, "uint8") if kind == "MXFP4" else ("scale", partial(_halves, kind, 0), "float16")
        ]
        if kind == "Q4_1":
            numbers.append(("zero_point", _zero_points, spec.stored_dtype))
        checkpoint.part(path, "codes", [blocks], partial(_codes, kind), spec.stored_dtype, tensor.shape)
        for name, function, dtype in numbers:
            checkpoint.part(path, name, [blocks], function, dtype, groups)
        checkpoint.add(Layer(path, rows, columns, Scheme(spec)))


def _spec(kind: str) -> QuantSpec:
    if kind == "MXFP4":
        return QuantSpec("float4_e2m1", "per_group", _BLOCK, scale_dtype="float8_e8m0fnu")
    dtype = "int8" if kind == "Q8_0" else "int4"
    return QuantSpec(dtype, "per_group", _BLOCK, symmetric=kind != "Q4_1")


def _blocks(stored: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What stands ahead of the codes of each block, and the codes as they lie: uint8 ``[rows, blocks, bytes]``."""
    head = _HEADS[kind]
    size = head + (_BLOCK if kind == "Q8_0" else _BLOCK // 2)
    blocks = stored.reshape(len(stored), -1, size)
    return blocks[..., :head], blocks[..., head:]


def _codes(kind: str, stored: Tensor) -> Tensor:
    """int8 (Q8_0, Q4_0) or uint8 ``[rows, columns]``."""
    _, codes = _blocks(stored, kind)
    if kind == "Q8_0":
        return codes.contiguous().view(torch.int8).flatten(1)
    nibbles = torch.cat([codes & 15, codes >> 4], dim=-1).flatten(1)
    return nibbles.to(torch.int8) - 8 if kind == "Q4_0" else nibbles


def _halves(kind: str, place: int, stored: Tensor) -> Tensor:
    """float16 ``[rows, blocks]``: the number at that place ahead of the codes."""
    head, _ = _blocks(stored, kind)
    return head[..., 2 * place : 2 * place + 2].contiguous().view(torch.float16)[..., 0]


def _exponents(stored: Tensor) -> Tensor:
    return _blocks(stored, "MXFP4")[0][..., 0].contiguous()


def _zero_points(stored: Tensor) -> Tensor:
    """uint8 ``[rows, blocks]``: of Q4_1, the minimum in scales, negated."""
    scale, minimum = _halves("Q4_1", 0, stored).float(), _halves("Q4_1", 1, stored).float()
    steps = torch.where(scale == 0, 0.0, -minimum / scale)
    return steps.round().clamp(0, 15).to(torch.uint8)


def _has_zero_points(stored: Tensor) -> bool:
    """Whether every minimum of Q4_1 is a multiple of its scale, as far as float16 tells."""
    scale = _halves("Q4_1", 0, stored)
    minimum = -_zero_points(stored).float() * scale.float()
    return torch.equal(minimum.to(torch.float16), _halves("Q4_1", 1, stored))


def _dequantized(stored: Tensor, kind: str) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind]))
