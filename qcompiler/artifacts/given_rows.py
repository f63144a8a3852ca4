"""Token ids that a user made: a stream, rows, batches, or mappings with masks."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import CalibrationError

__all__ = ["given_tokens"]

_WHERE = "Calibration.from_tokens"


def given_tokens(tokens: Any, samples: int | None) -> Tensor | tuple[Tensor, ...]:
    """What was given, as int64 on the CPU.

    Args:
        tokens: see `qcompiler.artifacts.calibration.Calibration.from_tokens`.
        samples: after how many rows to stop reading, where reading may take long: of an iterator or a data set.

    Returns:
        ``[n]`` for a stream; else rows, each ``[length]`` without its padding.

    Raises:
        CalibrationError: for no tokens, tokens that are no integers, or a mask that does not fit or has holes.
    """
    if isinstance(tokens, Mapping):
        return _checked(tuple(_rows(tokens)))
    if isinstance(tokens, Tensor):
        given = _integers(tokens)
        return _checked(given if given.dim() == 1 else tuple(_rows(given)))
    items = _iterator(tokens)
    first = next(items, None)
    if isinstance(first, int) or getattr(first, "shape", None) == ():
        return _checked(_integers([first, *items]))
    rows: list[Tensor] = []
    for item in itertools.chain([] if first is None else [first], items):
        rows.extend(_rows(item))
        if samples is not None and len(rows) >= samples and not isinstance(tokens, (list, tuple)):
            break
    return _checked(tuple(rows))


def _iterator(tokens: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(tokens)
    except TypeError as error:
        raise CalibrationError(
            "calibration tokens are not integers", where=_WHERE, got=type(tokens).__name__, expected="rows of token ids"
        ) from error


def _rows(item: Any) -> list[Tensor]:
    """The rows of one sequence, one batch or one mapping."""
    mask = None
    if isinstance(item, Mapping):
        if item.get("input_ids") is None:
            raise CalibrationError(
                "a mapping without token ids", where=_WHERE, got=", ".join(map(str, item)), expected="input_ids"
            )
        mask, item = item.get("attention_mask"), item["input_ids"]
        if mask is None and isinstance(item, (list, tuple)) and item and isinstance(item[0], (list, tuple)):
            return [row for sequence in item for row in _rows(sequence)]  # not padded: of several lengths
    values = _integers(item)
    if values.dim() not in (1, 2):
        raise CalibrationError(
            "no calibration tokens", where=_WHERE, got=f"shape {list(values.shape)}", expected="[n] or [rows, length]"
        )
    rows = list(values) if values.dim() == 2 else [values]
    if mask is None:
        return rows
    seen = _as_tensor(mask)
    if seen.shape != values.shape:
        raise CalibrationError(
            "an attention mask of another shape than its tokens",
            where=_WHERE,
            got=list(seen.shape),
            expected=list(values.shape),
        )
    masks = list(seen) if seen.dim() == 2 else [seen]
    return [_without_padding(row, visible != 0) for row, visible in zip(rows, masks, strict=True)]


def _without_padding(row: Tensor, visible: Tensor) -> Tensor:
    places = visible.nonzero()[:, 0]
    if len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places):
        raise CalibrationError(
            "an attention mask hides more than padding",
            where=_WHERE,
            got="no token that is visible" if len(places) == 0 else "hidden tokens between visible ones",
            expected="padding in front or behind",
            remedy="leave out such rows, or give the tokens without a mask",
        )
    return row[int(places[0]) : int(places[-1]) + 1]


def _checked(given: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    sizes = [len(given)] if isinstance(given, Tensor) else [len(row) for row in given]
    if not sizes or 0 in sizes:
        raise CalibrationError(
            "no calibration tokens",
            where=_WHERE,
            got="an empty row" if sizes else "no rows",
            expected="[n] or [rows, length], none of them zero",
        )
    return given


def _as_tensor(values: Any) -> Tensor:
    try:
        return values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError("calibration tokens are not integers", where=_WHERE, got=error) from error


def _integers(values: Any) -> Tensor:
    tensor = _as_tensor(values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise CalibrationError("calibration tokens are not integers", where=_WHERE, got=tensor.dtype)
    return tensor.to("cpu", torch.int64)
