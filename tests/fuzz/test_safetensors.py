"""Weight files and indexes of any content."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.odd_values import bounded, damaged_texts, few_or_many, odd_texts, odd_values
from tests.fuzz.surroundings import Surroundings, surroundings
from tests.tiny_checkpoint import Outcome

_DTYPES = ["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "f32", "C64"]
_SHAPES = [[], [0], [1], [0, 1 << 62], [1 << 40], [1 << 32, 1 << 32], [-1], [-1, -1], [32], [32, 32], [1] * 100, [1.5]]
_OFFSETS = [[0, 0], [0, 2], [2, 0], [-2, 0], [0, 1 << 62], [1 << 63, 1 << 64], [0], [0, 1, 2], [0.0, 2.0], "0"]


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _use(place: Surroundings, purpose: str) -> Outcome:
    if purpose == "compile":
        return place.compile()
    if purpose == "inspect":
        return place.run("inspect", place.model, "--json")
    return place.run("evaluate", place.model, "--text", place.text, "--max-tokens", 40, "--json")


_purposes = st.sampled_from(["compile", "inspect", "evaluate"])


@st.composite
def _headers(draw: st.DrawFn, header: dict[str, Any]) -> dict[str, Any]:
    """A header in which one or two things are wrong, or merely unusual."""
    result = copy.deepcopy(header)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(result)))
        other = draw(st.sampled_from(sorted(header)))
        entry = result[name] if isinstance(result[name], dict) else {}
        match draw(st.sampled_from(["dtype", "shape", "offsets", "swap", "entry", "gone", "renamed", "more", "field"])):
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(_DTYPES) | odd_values)
            case "shape":
                entry["shape"] = draw(st.sampled_from(_SHAPES) | odd_values)
            case "offsets":
                entry["data_offsets"] = draw(st.sampled_from(_OFFSETS) | odd_values)
            case "swap":
                result[name] = copy.deepcopy(header[other])
            case "entry":
                result[name] = draw(odd_values)
            case "gone":
                del result[name]
            case "renamed":
                result[draw(odd_texts)] = result.pop(name)
            case "more":
                result[draw(odd_texts)] = draw(
                    st.just({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}) | odd_values
                )
            case "field":
                entry[draw(odd_texts)] = draw(odd_values)
        result = result or {"x": {}}
    return result


@few_or_many(80, 800)
def test_headers(original: Path, examples: int) -> None:
    header, data = _parts(original / "model" / "model.safetensors")

    @bounded(examples)
    @given(_headers(header), _purposes)
    def check(changed: dict[str, Any], purpose: str) -> None:
        with surroundings(original) as place:
            (place.model / "model.safetensors").write_bytes(_joined(json.dumps(changed).encode(), data))
            _use(place, purpose)

    check()


@few_or_many(60, 800)
def test_bytes(original: Path, examples: int) -> None:
    header, data = _parts(original / "model" / "model.safetensors")
    content = (original / "model" / "model.safetensors").read_bytes()
    lengths = st.sampled_from([0, 1, 2, 7, 8, 100, 10**8, 10**8 + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    files = st.one_of(
        lengths.map(lambda length: _joined(content[8:], b"", length)),
        st.integers(0, 5000).map(lambda end: content[:end]),
        st.integers(1, 5000).map(lambda end: content[:-end]),
        st.binary(max_size=40).map(lambda more: content + more),
        st.binary(max_size=40),
        damaged_texts(header).map(lambda text: _joined(text, data)),
        st.tuples(st.integers(8, 2000), st.integers(0, 255)).map(
            lambda edit: content[: edit[0]] + bytes([edit[1]]) + content[edit[0] + 1 :]
        ),
    )

    @bounded(examples)
    @given(files, _purposes)
    def check(file: bytes, purpose: str) -> None:
        with surroundings(original) as place:
            (place.model / "model.safetensors").write_bytes(file)
            _use(place, purpose)

    check()


@few_or_many(60, 800)
def test_indexes(original: Path, examples: int) -> None:
    header, _ = _parts(original / "model" / "model.safetensors")
    whole = {name: "a.safetensors" for name in header if name != "__metadata__"}
    shards = [
        "a.safetensors",
        "b.safetensors",
        "../a",
        "/etc/passwd",
        "",
        ".",
        "config.json",
        "pipe",
        "loop",
        "x" * 300,
    ]
    maps = st.dictionaries(st.sampled_from(sorted(whole)), st.sampled_from(shards) | odd_values, max_size=3)
    fields = maps.map(lambda some: {"metadata": {"total_size": 1}, "weight_map": {**whole, **some}})
    texts = st.one_of(
        fields.map(lambda value: json.dumps(value).encode()),
        odd_values.map(lambda value: json.dumps({"weight_map": value}).encode()),
        damaged_texts({"weight_map": whole}),
    )

    @bounded(examples)
    @given(texts, _purposes)
    def check(text: bytes, purpose: str) -> None:
        with surroundings(original) as place:
            (place.model / "model.safetensors").rename(place.model / "a.safetensors")
            (place.model / "model.safetensors.index.json").write_bytes(text)
            os.mkfifo(place.model / "pipe")
            (place.model / "loop").symlink_to("loop")
            _use(place, purpose)

    check()


@pytest.mark.parametrize("purpose", ["compile", "evaluate"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "directory", "device", "dangling"])
def test_no_regular_file(original: Path, purpose: str, kind: str) -> None:
    with surroundings(original) as place:
        file = place.model / "model.safetensors"
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
        else:
            file.symlink_to({"loop": file.name, "device": "/dev/zero", "dangling": "no-such"}[kind])
        assert _use(place, purpose).status == 2
