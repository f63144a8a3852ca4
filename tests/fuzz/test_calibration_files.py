"""Texts of any content, to calibrate and to measure with."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.odd_values import bounded, few_or_many, odd_texts, odd_values
from tests.fuzz.surroundings import Surroundings, surroundings
from tests.tiny_checkpoint import Outcome

_WORDS = b"the sea under the cold stone " * 40
_NAMES = ["t.txt", "t", "t.json", "t.jsonl", "t.NDJSON", "t.csv", "t.parquet", "t.md", "\u00e9 \u2028.txt"]


def _use(place: Surroundings, name: str, purpose: str) -> Outcome:
    """Runs the command that reads a text for some purpose."""
    if purpose == "evaluate":
        return place.run("evaluate", place.model, "--text", name, "--max-tokens", 60, "--json")
    recipe = {"calibrate": "w4a16-gptq", "measure": "w8a16"}[purpose]
    return place.compile("--calib", name, "--samples", 2, "--length", 8, recipe=recipe)


_purposes = st.sampled_from(["evaluate", "evaluate", "measure", "calibrate"])


@few_or_many(40, 300)
def test_bytes(captured: Path, examples: int) -> None:
    special = st.lists(st.sampled_from(["<|eos|>", "<|bos|>", "<|pad|>", " ", "<|eos", "a"]), max_size=200).map(
        lambda parts: "".join(parts).encode()
    )
    contents = st.one_of(
        st.binary(max_size=100),
        st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"", b" " * 5000, b"\n" * 5000, b"\xef\xbb\xbf", b"\xff\xfe" + b"a\0" * 900, b"\0" * 5000]),
        st.sampled_from(["a\u0300" * 900, "\u200d" * 900, "\U0001f600" * 300, "\r" * 999, "\x1b[31m" * 200]).map(
            str.encode
        ),
        st.tuples(st.integers(0, len(_WORDS)), st.binary(max_size=8)).map(
            lambda edit: _WORDS[: edit[0]] + edit[1] + _WORDS[edit[0] :]
        ),
        special,
    )

    @bounded(examples)
    @given(contents, st.sampled_from(_NAMES), _purposes)
    def check(content: bytes, name: str, purpose: str) -> None:
        with surroundings(captured) as place:
            (place.root / name).write_bytes(content)
            _use(place, name, purpose)

    check()


_messages = st.fixed_dictionaries({"role": odd_values | st.just("user"), "content": odd_values | odd_texts})
_records: st.SearchStrategy[Any] = st.one_of(
    odd_values,
    st.fixed_dictionaries({"text": odd_values | st.just("the sea " * 60)}),
    st.fixed_dictionaries({"messages": st.lists(_messages | odd_values, max_size=3)}),
    st.fixed_dictionaries({"prompt": odd_values, "completion": odd_values}),
    st.fixed_dictionaries({"conversations": st.lists(odd_values, max_size=2)}),
    st.sampled_from(["\ud800", "\udfff" * 99, {"text": "\ud83d" * 99}, {"\udc00": "x"}, {"text": "the sea " * 60}]),
)


@few_or_many(30, 300)
def test_records(captured: Path, examples: int) -> None:
    """JSON of any structure; what is no text, such as half of a surrogate pair, can be written in it, too."""

    @bounded(examples)
    @given(st.lists(_records, max_size=3), st.booleans(), st.sampled_from(["t.json", "t.jsonl", "t.txt"]), _purposes)
    def check(records: list[Any], as_list: bool, name: str, purpose: str) -> None:
        with surroundings(captured) as place:
            settings = json.loads((place.model / "tokenizer_config.json").read_text())
            settings["chat_template"] = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
            (place.model / "tokenizer_config.json").write_text(json.dumps(settings))
            text = json.dumps(records) if as_list else "\n".join(map(json.dumps, records))
            (place.root / name).write_text(text)
            _use(place, name, purpose)

    check()


@pytest.mark.parametrize(
    "purpose", ["evaluate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("measure", "calibrate"))]
)
@pytest.mark.parametrize(
    "content",
    [
        b"a" * 1_000_000,
        b"the sea " * 125_000,
        b"[" * 1_000_000,
        b'{"text": "' + b"x " * 500_000 + b'"}',
        b" " * 999_999 + b"a",
    ],
    ids=["one word", "one line", "brackets", "one record", "spaces"],
)
def test_a_line_of_a_megabyte(captured: Path, content: bytes, purpose: str) -> None:
    with surroundings(captured) as place:
        (place.root / "t.txt").write_bytes(content)
        _use(place, "t.txt", purpose)


@pytest.mark.parametrize("purpose", ["evaluate", "measure"])
@pytest.mark.parametrize(
    "name", ["pipe", "loop", "sibling", "dangling", "/dev/null", "", ".", "x" * 300, "x/" * 3000, "\udcff"]
)
def test_no_regular_file(captured: Path, name: str, purpose: str) -> None:
    with surroundings(captured) as place:
        os.mkfifo(place.root / "pipe")
        (place.root / "loop").symlink_to("loop")
        (place.root / "dangling").symlink_to("no-such")
        assert _use(place, name, purpose).status == 2
