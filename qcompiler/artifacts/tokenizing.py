"""Text becomes token ids: as the model's own texts begin, nothing that a text spells out taken for a special token."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError

__all__ = ["TokenStream", "encode", "encode_prompt", "opening_tokens"]

_PIECE = 1 << 18  # characters tokenized at once: a tokenizer holds some 200 bytes for each character it is given
_OVERLAP = 1 << 10  # characters on either side of a seam that both pieces are given
_AGREED = 8  # tokens on either side of a seam that both pieces find alike


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens that windows are cut from.

    Attributes:
        ids: int64 ``[n]``: one text, or several behind one another, each with its opening.
        opening: the tokens that every window begins with.
    """

    ids: Tensor
    opening: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, length: int, start: int = 0) -> Tensor:
        """Adjacent windows that each begin with the opening.

        A window is the opening and the next ``length - len(opening)`` tokens of the stream; where these begin with the
        opening themselves, as a text does, it is the next ``length`` tokens. What is left at the end is dropped.

        Args:
            length: tokens per window, the opening included.
            start: tokens of the stream to leave out.

        Returns:
            int64 ``[windows, length]``.
        """
        opening = torch.tensor(self.opening, dtype=torch.int64)
        rows = [
            torch.cat((opening[: length - (end - begin)], self.ids[begin:end]))
            for begin, end in self._cuts(length, start)
        ]
        return torch.stack(rows) if rows else self.ids.new_empty(0, length)

    def left_over(self, length: int) -> int:
        """How many tokens behind the last window of so many tokens belong to none."""
        return len(self.ids) - max((end for _, end in self._cuts(length, 0)), default=0)

    def _cuts(self, length: int, start: int) -> Iterator[tuple[int, int]]:
        """Where the tokens of each window begin and end."""
        size = len(self.opening)
        while length > size:
            is_opened = tuple(self.ids[start : start + size].tolist()) == self.opening
            end = start + length - (0 if is_opened else size)
            if end > len(self.ids):
                return
            yield start, end
            start = end


def opening_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer itself puts in front of every text, such as BOS; nothing for one that puts nothing there."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(text) + 1):
        if whole[at : at + len(text)] == text:
            return tuple(whole[:at])
    return ()


def encode(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text, int64 ``[n]``, behind the opening of the tokenizer; nothing is put at its end.

    Special tokens that the text spells out stay text: ``<|endoftext|>`` becomes the tokens of its characters. Where the
    vocabulary has the word as a piece of text all the same, it is tokenized in two parts.

    A text of more than 2^18 characters is tokenized in pieces, so that memory does not grow with it. The pieces
    overlap, and are joined where eight tokens on either side are the same in both, place in the text included: what
    comes out is what the whole gives, as long as a token depends on nothing farther away than that. Where two pieces
    never agree (a word longer than the overlap) the text is cut at the end of a token, and for tokenizers that do not
    tell places (those written in Python) at a space: decoded, it is the same text.

    Raises:
        InputError: half of a surrogate pair, which JSON and arguments can spell and no text has.
    """
    _refuse_halves(text)
    pieces = [torch.tensor(opening_tokens(tokenizer), dtype=torch.int64), *_text_tokens(tokenizer, text)]
    special = _special_tokens(tokenizer)
    if torch.isin(torch.cat(pieces[1:]), torch.tensor(list(special), dtype=torch.int64)).any():
        inside = "|".join(
            f"(?<={re.escape(word[0])})(?={re.escape(word[1:])})" for word in special.values() if word[1:]
        )
        parts = re.split(inside, text)
        pieces[1:] = [piece for part in parts for piece in _text_tokens(tokenizer, part)]
    return torch.cat(pieces)


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that no text has, by id; what is unknown may stand anywhere."""
    ids = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}
    return {i: tokenizer.convert_ids_to_tokens(i) for i in sorted(ids)}


def encode_prompt(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a prompt, int64 ``[n]``, as transformers gives them, but for what it puts at the end.

    Special tokens that the prompt spells out are special tokens, because people write chat prompts that way. The
    opening of the tokenizer stands in front, once.

    Raises:
        InputError: half of a surrogate pair, which JSON and arguments can spell and no text has.
    """
    _refuse_halves(text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_tokens(tokenizer)
    if tuple(ids[: len(opening)]) != opening:
        ids = [*opening, *ids]
    return torch.tensor(ids, dtype=torch.int64)


def _refuse_halves(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the text holds half of a surrogate pair, which is no character",
            got=f"{text[error.start]!a} at character {error.start}",
            expected="what UTF-8 can write",
            remedy="write the pair, or leave it out",
        ) from error


def _text_tokens(tokenizer: Any, text: str) -> Iterator[Tensor]:
    for ids in _in_pieces(tokenizer, text):
        yield torch.tensor(ids, dtype=torch.int64)


def _in_pieces(tokenizer: Any, text: str) -> Iterator[Sequence[int]]:
    if len(text) <= _PIECE:
        yield tokenizer(text, **_AS_TEXT)["input_ids"]
    elif getattr(tokenizer, "is_fast", False):
        yield from _overlapping(tokenizer, text)
    else:
        start = 0
        while start < len(text):
            stop = start + _PIECE
            if stop < len(text):
                space = max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop))
                stop = space if space > 0 else stop
            yield tokenizer(text[start:stop], **_AS_TEXT)["input_ids"]
            start = stop


_AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}

_Token = tuple[int, int, int]
"""An id, and where in the text its characters begin and end."""


def _overlapping(tokenizer: Any, text: str) -> Iterator[list[int]]:
    piece = _placed(tokenizer, text, 0, _PIECE + _OVERLAP)
    begin = 0
    for middle in range(_PIECE, len(text), _PIECE):
        following = _placed(tokenizer, text, middle - _OVERLAP, middle + _PIECE + _OVERLAP)
        seam = _seam(piece, following, middle)
        if seam is None:
            end = next((i for i in range(begin, len(piece)) if piece[i][2] > middle), len(piece))
            cut = piece[end - 1][2] if end > begin else middle
            following = _placed(tokenizer, text, cut, middle + _PIECE + _OVERLAP)
            seam = end, 0
        yield [token[0] for token in piece[begin : seam[0]]]
        piece, begin = following, seam[1]
    yield [token[0] for token in piece[begin:]]


def _placed(tokenizer: Any, text: str, start: int, stop: int) -> list[_Token]:
    found = tokenizer(text[start:stop], return_offsets_mapping=True, **_AS_TEXT)
    places = found["offset_mapping"]
    return [(i, start + a, start + b) for i, (a, b) in zip(found["input_ids"], places, strict=True)]


def _seam(piece: list[_Token], following: list[_Token], middle: int) -> tuple[int, int] | None:
    """Where to leave one piece and enter the next: the place nearest to the middle of what both were given."""
    place = {token: index for index, token in enumerate(following) if token[1] <= middle + _OVERLAP}
    shared = [index for index, token in enumerate(piece) if token in place]
    for here in sorted(shared, key=lambda index: abs(piece[index][1] - middle)):
        there = place[piece[here]]
        around = piece[max(0, here - _AGREED) : here + _AGREED]
        if len(around) == 2 * _AGREED and around == following[max(0, there - _AGREED) : there + _AGREED]:
            return here, there
    return None
