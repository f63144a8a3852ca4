"""Where calibration tokens come from: text, tokens, or the model itself.

A `Calibration` is a recipe; it meets the model's tokenizer and limits in `Calibration.bind`, which gives the tokens.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qcompiler.artifact import Artifact
from qcompiler.errors import CalibrationError, InputError
from qcompiler.generate import Sampler, decode_stepwise
from qcompiler.hf import HFArtifact, encode, load_tokenizer, read_limits

__all__ = ["Calibration", "CalibrationTokens", "read_text"]

_log = logging.getLogger(__name__)

_SAMPLES, _LENGTH = 64, 512
_ROWS_AT_ONCE = 32  # sequences generated together: fixed, so that a seed gives the same tokens on any machine
_SELF_GENERATED_NOTE = (
    "calibrated on text that the model generated itself; real text of the kind it will meet usually serves better"
)


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Calibration tokens of one model.

    Attributes:
        ids: int64 ``[samples, length]``.
        source: ``text``, ``tokens`` or ``self-generated``.
        notes: what the user should know about them.
        held_out: int64 ``[n, length]`` of the same kind that calibration does not see, where some were asked for and
            there were enough.
    """

    ids: Tensor
    source: str
    notes: tuple[str, ...] = ()
    held_out: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields for a report; the tokens themselves as a SHA-256 of their little-endian bytes."""
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes()).hexdigest()
        samples, length = self.ids.shape
        return {
            "source": self.source,
            "samples": samples,
            "length": length,
            "sha256": digest,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Calibration:
    """A recipe for calibration tokens; made by `from_text`, `from_tokens` or `self_generated`.

    Attributes:
        source: where the tokens come from.
        samples: how many sequences; None for all the given rows.
        length: tokens per sequence; None for the length of the given rows.
        seed: of the choice of windows or of the sampling.
        text: the text, for source ``text``.
        given: int64 ``[n]`` (a stream) or ``[rows, length]``, for source ``tokens``.
    """

    source: Literal["text", "tokens", "self-generated"]
    samples: int | None = _SAMPLES
    length: int | None = _LENGTH
    seed: int = 0
    text: str | None = field(default=None, repr=False)
    given: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _require_positive(self.samples, self.length)
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise CalibrationError("the seed is too large", where="Calibration", got=self.seed, expected="64 bits")

    @classmethod
    def from_text(
        cls, text: str | Path, samples: int = _SAMPLES, length: int = _LENGTH, seed: int = 0
    ) -> "Calibration":
        """Windows of a text.

        The text is tokenized as one stream, opened by the BOS token where the tokenizer itself puts one and holding no
        other special token; windows are drawn from it at random and do not overlap.

        Args:
            text: the path of a UTF-8 file, or the text itself.
            samples: windows.
            length: tokens per window.
            seed: of the choice.

        Raises:
            InputError: if the file cannot be read.
            CalibrationError: for zero samples or length.
        """
        return cls("text", samples, length, seed, text=read_text(text))

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor | Iterable[Any],
        samples: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> "Calibration":
        """Tokens made elsewhere.

        Args:
            tokens: integers. A tensor ``[rows, length]`` or a list of equally long sequences is used as it is; a tensor
                or list ``[n]`` is one stream that windows are drawn from as in `from_text`; an iterator gives
                sequences, batches ``[rows, length]``, or mappings with ``input_ids``, and is read no further than
                needed.
            samples: rows; default all of them (64 windows of a stream).
            length: tokens per window of a stream, by default 512; of rows, checked only.
            seed: of the choice of windows.

        Raises:
            CalibrationError: for no tokens, tokens that are no integers, or rows of different lengths.
        """
        _require_positive(samples, length)
        given = _as_tensor(tokens, samples)
        if given.dim() == 1:
            samples = _SAMPLES if samples is None else samples
            length = _LENGTH if length is None else length
        elif length is not None and given.shape[1] != length:
            raise CalibrationError(
                "the given rows do not have the length asked for",
                where="Calibration.from_tokens",
                got=f"rows of {given.shape[1]} tokens",
                expected=f"length={length}",
                remedy="leave length out, or give one long stream to draw windows from",
            )
        return cls("tokens", samples, length, seed, given=given)

    @classmethod
    def self_generated(cls, samples: int = _SAMPLES, length: int = _LENGTH, seed: int = 0) -> "Calibration":
        """Sequences sampled from the original model at temperature 1, each after a BOS token (arXiv 2305.17888, section
        3.1).

        Real text is better, and binding says so in a warning and a note.
        """
        return cls("self-generated", samples, length, seed)

    def bind(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: Any = None,
        artifact: Artifact | None = None,
        vocab_size: int | None = None,
        max_positions: int | None = None,
        hold_out: int = 0,
        trust_remote_code: bool = False,
    ) -> CalibrationTokens:
        """The tokens for one model.

        Args:
            model: its Hugging Face directory; gives whatever is missing of the following.
            tokenizer: for text, and for the BOS token of generated sequences.
            artifact: the original model, to generate with.
            vocab_size: token ids must be below it.
            max_positions: a window must not be longer.
            hold_out: how many further windows to set apart for measuring.
            trust_remote_code: run code the directory brings along.

        Raises:
            CalibrationError: a text shorter than one window, a window longer than the model takes, or tokens outside
                the vocabulary.
            InputError: no tokenizer or model where one is needed.
        """
        if model is not None and vocab_size is None:
            vocab_size, declared = read_limits(model, trust_remote_code=trust_remote_code)
            max_positions = declared if max_positions is None else max_positions
        if model is not None and tokenizer is None and self.source == "text":
            tokenizer = load_tokenizer(model, vocab_size=vocab_size, trust_remote_code=trust_remote_code)
        length = self.length if self.given is None or self.given.dim() == 1 else self.given.shape[1]
        if length is not None and max_positions is not None and length > max_positions:
            raise CalibrationError(
                "calibration windows are longer than the model takes",
                where="Calibration",
                got=f"length={length}",
                expected=f"at most {max_positions} tokens",
                remedy=f"use length={max_positions}",
            )
        if self.source == "text":
            assert self.text is not None
            if tokenizer is None:
                raise InputError("calibration text needs a tokenizer", where="Calibration", remedy="give the tokenizer")
            ids, notes = self._windows(encode(tokenizer, self.text), hold_out)
        elif self.source == "tokens":
            assert self.given is not None
            ids, notes = (self.given, ()) if self.given.dim() == 2 else self._windows(self.given, hold_out)
        else:
            if artifact is None and model is not None:
                artifact = HFArtifact(model, trust_remote_code=trust_remote_code)
            ids, notes = self._generate(artifact, tokenizer, model, hold_out)
        if vocab_size is not None and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            raise CalibrationError(
                "calibration tokens outside the model's vocabulary",
                where="Calibration",
                got=f"ids from {int(ids.min())} to {int(ids.max())}",
                expected=f"0 to {vocab_size - 1}",
                remedy="use the model's own tokenizer",
            )
        for note in notes:
            _log.warning("%s", note)
        rest = ids[self.samples :][:hold_out] if self.samples is not None else ids[:0]
        return CalibrationTokens(
            ids[: self.samples].contiguous(), self.source, notes, rest.contiguous() if len(rest) else None
        )

    def _windows(self, stream: Tensor, hold_out: int) -> tuple[Tensor, tuple[str, ...]]:
        """Windows of ``[n]`` that do not overlap, at random: slots of one grid, whose offset is random too."""
        assert self.samples is not None and self.length is not None  # noqa: PT018
        slots = len(stream) // self.length
        if slots == 0:
            raise CalibrationError(
                "the calibration text is shorter than one window",
                where="Calibration",
                got=f"{len(stream)} tokens",
                expected=f"at least {self.length}",
                remedy="give more text, or a smaller length",
            )
        notes: tuple[str, ...] = ()
        if slots < self.samples:
            notes = (f"the calibration text holds {slots} windows of {self.length} tokens, not {self.samples}",)
        generator = torch.Generator().manual_seed(self.seed)
        offset = int(torch.randint(len(stream) - slots * self.length + 1, (), generator=generator))
        grid = stream[offset : offset + slots * self.length].view(slots, self.length)
        return grid[torch.randperm(slots, generator=generator)[: self.samples + hold_out]], notes

    def _generate(
        self, artifact: Artifact | None, tokenizer: Any, model: str | Path | None, hold_out: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        if artifact is None:
            raise InputError(
                "self-generated calibration needs the model to generate with",
                where="Calibration.self_generated",
                remedy="capture the model from a directory, or calibrate on text",
            )
        assert self.samples is not None and self.length is not None  # noqa: PT018
        count = self.samples + hold_out
        bos, special = _special_tokens(tokenizer, model, artifact)
        notes: tuple[str, ...] = (_SELF_GENERATED_NOTE,)
        generator = torch.Generator().manual_seed(self.seed)
        if bos is None:
            notes += ("the model has no BOS token: each generated sequence starts from a random token",)
            starts = torch.randint(artifact.vocab_size, (count, 1), generator=generator)
        else:
            starts = torch.full((count, 1), bos, dtype=torch.int64)
        sampler = Sampler(temperature=1.0, suppress=special)
        rows: list[Tensor] = []
        for index, start in enumerate(starts.split(_ROWS_AT_ONCE)):
            _log.info("generating calibration text: %d of %d sequences", index * _ROWS_AT_ONCE, count)
            seed = int(torch.randint(1 << 62, (), generator=generator))
            new = decode_stepwise(artifact, start, self.length - 1, sampler, seed)
            rows.append(torch.cat([start, *(chosen[:, None] for chosen in new)], dim=1))
        return torch.cat(rows), notes


def read_text(text: str | Path) -> str:
    """A text, given as itself or as the path of a UTF-8 file.

    A string is a path if a file of that name exists, or if it looks like one: a single word with a file suffix or a
    ``/``.

    Raises:
        InputError: if the file cannot be read or is not UTF-8.
    """
    if isinstance(text, str) and not _looks_like_path(text):
        return text
    path = Path(text)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("no such text file", where=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("the text file is not UTF-8", where=path, got=error) from error
    except OSError as error:
        raise InputError("the text file cannot be read", where=path, got=error) from error


def _looks_like_path(text: str) -> bool:
    if not text or len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    try:
        is_there = Path(text).exists()
    except OSError:  # a text longer than a file name can be
        return False
    is_one_word = len(text.split()) == 1
    return is_there or (is_one_word and ("/" in text or Path(text).suffix not in ("", ".")))


def _require_positive(samples: int | None, length: int | None) -> None:
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and value < 1:
            raise CalibrationError(f"{name} must be positive", where="Calibration", got=value, expected="1 or more")


def _as_tensor(tokens: Any, samples: int | None) -> Tensor:
    """int64 ``[n]`` or ``[rows, length]``, at most ``samples`` rows."""
    if isinstance(tokens, Tensor):
        given = _integers(tokens)
    else:
        items = itertools.chain(tokens)
        first = next(items, None)
        if isinstance(first, int):
            given = _integers([first, *items])
        else:
            rows: list[Tensor] = []
            for item in itertools.chain([] if first is None else [first], items):
                value = _integers(item["input_ids"] if isinstance(item, Mapping) else item)
                rows.extend(value if value.dim() == 2 else [value])
                if samples is not None and len(rows) >= samples:
                    break
            lengths = {len(row) if row.dim() == 1 else -1 for row in rows}
            if len(lengths) > 1 or -1 in lengths:
                raise CalibrationError(
                    "calibration sequences are not equally long",
                    where="Calibration.from_tokens",
                    got=f"lengths {sorted(lengths)[:4]}",
                    remedy="cut them to one length, or join them to one stream",
                )
            given = torch.stack(rows[:samples]) if rows else torch.empty(0, dtype=torch.int64)
    if given.numel() == 0 or given.dim() not in (1, 2):
        raise CalibrationError(
            "no calibration tokens",
            where="Calibration.from_tokens",
            got=f"shape {list(given.shape)}",
            expected="[n] or [rows, length], none of them zero",
        )
    return given


def _integers(values: Any) -> Tensor:
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            "calibration tokens are not integers", where="Calibration.from_tokens", got=error
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise CalibrationError("calibration tokens are not integers", where="Calibration.from_tokens", got=tensor.dtype)
    return tensor.detach().to("cpu", torch.int64)


def _special_tokens(tokenizer: Any, model: str | Path | None, artifact: Artifact) -> tuple[int | None, tuple[int, ...]]:
    """The BOS token (else the end token, which such models start after in training), and those never sampled."""
    if tokenizer is None and (model is not None or artifact.path is not None):
        try:
            tokenizer = load_tokenizer(model or artifact.path or "", vocab_size=artifact.vocab_size)
        except InputError:  # generating needs no tokenizer; the configuration knows the ids as well
            tokenizer = None
    if tokenizer is not None:
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return bos, tuple(sorted(i for i in tokenizer.all_special_ids if i < artifact.vocab_size))
    config = artifact.provenance.get("config")
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    ids = [fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    known = [i for i in ids if isinstance(i, int)]
    return (known[0] if known and known[0] in ids[:2] else None), tuple(sorted(set(known)))
