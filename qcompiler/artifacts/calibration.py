"""Where calibration tokens come from: text, tokens, or the model itself.

A `Calibration` is a recipe; it meets the model's tokenizer and limits in `Calibration.bind`, which gives the tokens.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qcompiler.artifacts.corpus import Corpus, read_corpus
from qcompiler.artifacts.generation import Sampler, decode_stepwise
from qcompiler.artifacts.given_rows import given_tokens
from qcompiler.artifacts.hf import HFArtifact, load_tokenizer, read_limits
from qcompiler.artifacts.inputs import GivenInputs
from qcompiler.artifacts.tokenizing import TokenStream, opening_tokens
from qcompiler.errors import CalibrationError, InputError
from qcompiler.frontend import declared
from qcompiler.protocol import Artifact

__all__ = ["Calibration", "CalibrationTokens"]

_log = logging.getLogger(__name__)

_SAMPLES, _LENGTH = 64, 512
_LEAST_TEXT = 128
"""Tokens. Fewer say nothing of a model: the range of one channel, taken from so many values, is that of their outliers,
and a Gram matrix of any model in use has more channels than that."""
_LEAST_TO_SHARE = 8  # windows of a short text from which on one is kept apart to measure with
_ROWS_AT_ONCE = 32  # sequences generated together: fixed, so that a seed gives the same tokens on any machine
_SELF_GENERATED_NOTE = (
    "calibrated on text that the model generated itself; real text of the kind it will meet usually serves better"
)


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Calibration tokens of one model.

    Attributes:
        groups: int64 ``[rows, length]`` each, rows of one length together.
        source: ``text``, ``tokens`` or ``self-generated``.
        notes: what the user should know about them.
        held_out: int64 ``[n, length]`` of the same kind that calibration does not see, where some were asked for and
            there were enough.
    """

    groups: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()
    held_out: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """int64 ``[samples, length]``, where all rows are equally long.

        Raises:
            CalibrationError: if they are not.
        """
        if len(self.groups) != 1:
            lengths = ", ".join(str(group.shape[1]) for group in self.groups[:4])
            raise CalibrationError(
                "calibration sequences are not equally long", got=f"lengths {lengths}", remedy="read groups"
            )
        return self.groups[0]

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return sum(group.numel() for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields for a report; the tokens themselves as a SHA-256 of their little-endian bytes."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(group.numpy().astype("<i8").tobytes())
        return {
            "source": self.source,
            "samples": sum(len(group) for group in self.groups),
            "length": max(group.shape[1] for group in self.groups),
            "sha256": digest.hexdigest(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Calibration:
    """A recipe for calibration data; made by `from_text`, `from_tokens`, `self_generated` or `from_inputs`.

    Attributes:
        source: where the tokens come from.
        samples: how many sequences; None for all the given rows.
        length: tokens per sequence; None for the lengths of the given rows.
        seed: of the choice of windows or of the sampling.
        corpus: the texts, for source ``text``.
        stream: int64 ``[n]``, for source ``tokens``.
        rows: int64 ``[length]`` each, for source ``tokens``.
        inputs: for source ``inputs``.
    """

    source: Literal["text", "tokens", "self-generated", "inputs"]
    samples: int | None = _SAMPLES
    length: int | None = _LENGTH
    seed: int = 0
    corpus: Corpus | None = field(default=None, repr=False)
    stream: Tensor | None = field(default=None, repr=False)
    rows: tuple[Tensor, ...] | None = field(default=None, repr=False)
    inputs: GivenInputs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _require_positive(self.samples, self.length)
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise CalibrationError("the seed is too large", where="Calibration", got=self.seed, expected="64 bits")

    @classmethod
    def from_text(
        cls, text: str | Path | Iterable[str], samples: int = _SAMPLES, length: int = _LENGTH, seed: int = 0
    ) -> "Calibration":
        """Windows of a text.

        The text is tokenized as one stream and holds no special token, even where it spells one out. Windows are drawn
        from it at random and do not overlap. Each begins as the model's own texts do: with what the tokenizer itself
        puts in front of a text, such as BOS, where it does; a window of 512 is then BOS and 511 tokens of the text.

        Args:
            text: the path of a UTF-8 file, plain or of JSON lines; the text itself; or several texts, each of which
                begins as a text of its own (`qcompiler.artifacts.corpus.read_corpus`).
            samples: windows.
            length: tokens per window.
            seed: of the choice.

        Raises:
            InputError: if the file cannot be read, or is no text.
            CalibrationError: for zero samples or length.
        """
        return cls("text", samples, length, seed, corpus=read_corpus(text))

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor | Iterable[Any],
        samples: int | None = None,
        length: int | None = None,
        seed: int = 0,
    ) -> "Calibration":
        """Tokens made elsewhere, taken as they are: nothing is put in front of them.

        Args:
            tokens: integers. A tensor ``[rows, length]`` or a list of sequences gives rows; a tensor or list ``[n]`` is
                one stream that windows are drawn from as in `from_text`; an iterator gives sequences, batches
                ``[rows, length]``, or mappings with ``input_ids``, and is read no further than needed. Where a mapping
                has an ``attention_mask``, what it hides in front of a row or behind it is padding and is cut off: no
                statistic sees it. Rows may have different lengths; those of one length run together.
            samples: rows; default all of them (64 windows of a stream).
            length: tokens per window of a stream, by default 512; of rows, checked only.
            seed: of the choice of windows.

        Raises:
            CalibrationError: for no tokens, tokens that are no integers, rows of another length than asked for, or a
                mask that hides tokens between visible ones.
        """
        _require_positive(samples, length)
        given = given_tokens(tokens, samples)
        if isinstance(given, Tensor):
            samples = _SAMPLES if samples is None else samples
            return cls("tokens", samples, _LENGTH if length is None else length, seed, stream=given)
        other = next((len(row) for row in given if length is not None and len(row) != length), None)
        if other is not None:
            raise CalibrationError(
                "the given rows do not have the length asked for",
                where="Calibration.from_tokens",
                got=f"a row of {other} tokens",
                expected=f"length={length}",
                remedy="leave length out, or give one long stream to draw windows from",
            )
        return cls("tokens", samples, length, seed, rows=given)

    @classmethod
    def self_generated(cls, samples: int = _SAMPLES, length: int = _LENGTH, seed: int = 0) -> "Calibration":
        """Sequences sampled from the original model at temperature 1, each after what its texts begin with, else a BOS
        token (arXiv 2305.17888, section 3.1).

        Real text is better, and binding says so in a warning and a note.
        """
        return cls("self-generated", samples, length, seed)

    @classmethod
    def from_inputs(cls, inputs: str | Path | Iterable[Any]) -> "Calibration":
        """Inputs of a model without token ids.

        Args:
            inputs: batches, each a tuple of tensors or a mapping from the model's input names to tensors; or an
                ``.npz`` file with an array for each input, named after it, whose leading axis counts samples.

        Raises:
            CalibrationError: for a file that cannot be read.
        """
        return cls("inputs", None, None, inputs=GivenInputs.of(inputs))

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
            CalibrationError: a text shorter than one window or than 128 tokens, a window longer than the model takes,
                or tokens outside the vocabulary.
            InputError: no tokenizer or model where one is needed.
        """
        if self.inputs is not None:
            raise CalibrationError(
                "a language model is calibrated with tokens", got="inputs", remedy="give text or tokens"
            )
        if model is not None and vocab_size is None:
            vocab_size, positions = read_limits(model, trust_remote_code=trust_remote_code)
            max_positions = positions if max_positions is None else max_positions
        if model is not None and tokenizer is None and self.source == "text":
            tokenizer = load_tokenizer(model, vocab_size=vocab_size, trust_remote_code=trust_remote_code)
        length = self.length if self.rows is None else max(map(len, self.rows))
        if length is not None and max_positions is not None and length > max_positions:
            raise CalibrationError(
                "calibration windows are longer than the model takes",
                where="Calibration",
                got=f"length={length}",
                expected=f"at most {max_positions} tokens",
                remedy=f"use length={max_positions}",
            )
        chosen: Sequence[Tensor] | Tensor
        rest: Sequence[Tensor] | Tensor
        if self.corpus is not None:
            if tokenizer is None:
                raise InputError("calibration text needs a tokenizer", where="Calibration", remedy="give the tokenizer")
            stream = self.corpus.stream(tokenizer)
            chosen, rest, notes = self._windows(stream, hold_out)
            if len(stream) < _LEAST_TEXT:
                raise CalibrationError(
                    "the calibration text is too short to tell anything",
                    where="Calibration",
                    got=f"{len(stream)} tokens",
                    expected=f"at least {_LEAST_TEXT}, better tens of thousands",
                    remedy="give more text",
                )
        elif self.stream is not None:
            chosen, rest, notes = self._windows(TokenStream(self.stream), hold_out)
        elif self.rows is not None:
            count = len(self.rows) if self.samples is None else self.samples
            chosen, rest, notes = self.rows[:count], self.rows[count:][:hold_out], ()
        else:
            if artifact is None and model is not None:
                artifact = HFArtifact(model, trust_remote_code=trust_remote_code)
            ids, notes = self._generate(artifact, tokenizer, model, hold_out)
            chosen, rest = ids[: self.samples], ids[self.samples :]
        groups = _by_length(chosen)
        low, high = min(int(group.min()) for group in groups), max(int(group.max()) for group in groups)
        if vocab_size is not None and (low < 0 or high >= vocab_size):
            raise CalibrationError(
                "calibration tokens outside the model's vocabulary",
                where="Calibration",
                got=f"ids from {low} to {high}",
                expected=f"0 to {vocab_size - 1}",
                remedy="use the model's own tokenizer",
            )
        for note in notes:
            _log.warning("%s", note)
        longest = max(_by_length(rest), key=lambda group: group.shape[1], default=None)
        return CalibrationTokens(groups, self.source, notes, longest)

    def _windows(self, stream: TokenStream, hold_out: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Windows that do not overlap, at random, and others: slots of one grid, whose offset is random too."""
        assert self.samples is not None and self.length is not None  # noqa: PT018
        if self.length <= len(stream.opening):
            raise CalibrationError(
                "calibration windows hold nothing but what opens a text",
                where="Calibration",
                got=f"length={self.length}",
                expected=f"more than {len(stream.opening)}",
            )
        generator = torch.Generator().manual_seed(self.seed)
        offset = int(torch.randint(stream.left_over(self.length) + 1, (), generator=generator))
        grid = stream.windows(self.length, offset)
        slots = len(grid)
        if slots == 0:
            raise CalibrationError(
                "the calibration text is shorter than one window",
                where="Calibration",
                got=f"{len(stream)} tokens",
                expected=f"at least {self.length}",
                remedy="give more text, or a smaller length",
            )
        grid = grid[torch.randperm(slots, generator=generator)]
        count = min(self.samples, slots)
        notes: tuple[str, ...] = ()
        kept_apart = ""
        if hold_out and count == slots >= _LEAST_TO_SHARE:
            count -= 1
            kept_apart = "; one of them is kept apart to measure the result with"
        if slots < self.samples or kept_apart:
            notes = (
                f"the calibration text holds {slots} windows of {self.length} tokens"
                + (f", not {self.samples}" if slots < self.samples else "")
                + kept_apart,
            )
        return grid[:count], grid[count:][:hold_out], notes

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
        opening, special = _special_tokens(tokenizer, model, artifact)
        notes: tuple[str, ...] = (_SELF_GENERATED_NOTE,)
        generator = torch.Generator().manual_seed(self.seed)
        if not opening:
            notes += ("the model has no BOS token: each generated sequence starts from a random token",)
            starts = torch.randint(artifact.vocab_size, (count, 1), generator=generator)
        else:
            starts = torch.tensor(opening[: self.length]).expand(count, -1)
        sampler = Sampler(temperature=1.0, suppress=special)
        rows: list[Tensor] = []
        for index, start in enumerate(starts.split(_ROWS_AT_ONCE)):
            _log.info("generating calibration text: %d of %d sequences", index * _ROWS_AT_ONCE, count)
            seed = int(torch.randint(1 << 62, (), generator=generator))
            new = decode_stepwise(artifact, start, self.length - start.shape[1], sampler, seed)
            rows.append(torch.cat([start, *(chosen[:, None] for chosen in new)], dim=1))
        return torch.cat(rows), notes


def _require_positive(samples: int | None, length: int | None) -> None:
    for name, value in (("samples", samples), ("length", length)):
        if value is not None and value < 1:
            raise CalibrationError(f"{name} must be positive", where="Calibration", got=value, expected="1 or more")


def _by_length(rows: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """int64 ``[rows, length]`` for each length, in the order of the first row of each."""
    if isinstance(rows, Tensor):
        return (rows.contiguous(),) if len(rows) else ()
    found: dict[int, list[Tensor]] = {}
    for row in rows:
        found.setdefault(len(row), []).append(row)
    return tuple(torch.stack(group) for group in found.values())


def _special_tokens(
    tokenizer: Any, model: str | Path | None, artifact: Artifact
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a text begins with, and tokens that are never sampled.

    A text begins with what the tokenizer puts there, else with the BOS token, else with the end token, which models
    without one start after in training.
    """
    if tokenizer is None and (model is not None or artifact.path is not None):
        try:
            tokenizer = load_tokenizer(model or artifact.path or "", vocab_size=artifact.vocab_size)
        except InputError:  # generating needs no tokenizer; the configuration knows the ids as well
            tokenizer = None
    if tokenizer is not None:
        ids = [_several(tokenizer.bos_token_id), _several(tokenizer.eos_token_id), list(tokenizer.all_special_ids)]
        opening = opening_tokens(tokenizer)
    else:
        config = artifact.provenance.get("config")
        fields = config if isinstance(config, Mapping) else {}
        ids = [_several(declared(fields, name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
        opening = ()
    start = next(((i,) for group in ids[:2] for i in group), ())
    return opening or start, tuple(sorted({i for group in ids for i in group if i < artifact.vocab_size}))


def _several(value: Any) -> list[int]:
    """Ids of a field that holds one or a list of them."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
