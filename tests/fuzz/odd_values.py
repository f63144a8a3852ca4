"""Strategies that several kinds of input share, and how many examples there are."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["bounded", "damaged_texts", "edited", "few_or_many", "odd_texts", "odd_values"]


def few_or_many(few: int, many: int = 300) -> pytest.MarkDecorator:
    """Runs a test with so many ``examples``: few each time, many among the slow tests."""
    slow = (pytest.mark.slow, pytest.mark.timeout(1800))
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=slow)])


def bounded(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many examples, the same ones on every run and every machine."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


odd_texts = st.one_of(
    st.sampled_from(["", " ", "x", "none", "None", "0", "-1", "../x", "a\nb", "é\u2028", "x" * 5000, "%s{}", "\ufeff"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
"""Texts that UTF-8 can write."""

_numbers = [-1, 0, 1, 2, 3, 7, 1 << 20, 1 << 40, 10**30, -(10**30), 0.5, -1.5, 1e308, float("nan"), float("inf")]
_plain = st.one_of(st.none(), st.booleans(), st.sampled_from(_numbers), odd_texts)

odd_values: st.SearchStrategy[Any] = st.recursive(
    _plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=3),
    max_leaves=4,
)
"""What Python's JSON can say, of any type and size."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested values: the keys that lead to it."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(min(len(value), 3))) if isinstance(value, list) else []
    )
    return [found for key in keys for found in [(*path, key), *_places(value[key], (*path, key))]]


@st.composite
def edited(draw: st.DrawFn, fields: dict[str, Any], others: dict[str, list[Any]]) -> dict[str, Any]:
    """Nested fields of which one to three are replaced, removed, or added.

    Args:
        fields: as they should be.
        others: values, sensible or not, for fields that are known to matter.
    """
    result = copy.deepcopy(fields)
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            key = draw(st.sampled_from(sorted(others)))
            result[key] = copy.deepcopy(draw(st.sampled_from(others[key]) | odd_values))
            continue
        *path, last = draw(st.sampled_from(_places(result) or [("x",)]))
        holder: Any = result
        for key in path:
            holder = holder[key]
        if draw(st.integers(0, 3)) and isinstance(holder, (dict, list)):
            holder[last] = draw(odd_values)
        elif isinstance(holder, dict):
            holder.pop(last, None)
    return result


@st.composite
def damaged_texts(draw: st.DrawFn, fields: dict[str, Any]) -> bytes:
    """The bytes of a JSON file that something happened to."""
    whole = json.dumps(fields).encode()
    cut = draw(st.integers(0, len(whole)))
    return draw(
        st.sampled_from(
            [
                whole[:cut],
                whole[:cut] + b"\xff\xfe" + whole[cut:],
                whole[:cut] + b"\0" * 40,
                b"\xef\xbb\xbf" + whole,
                whole + whole,
                b"[" * 100_000,
                b'{"a":' * 100_000,
                b"[" + whole + b"]",
                b'"' + whole.replace(b'"', b"") + b'"',
                b"null",
                b"",
            ]
        )
        | st.binary(max_size=20)
    )
