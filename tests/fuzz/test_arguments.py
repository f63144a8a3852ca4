"""Command lines of any content, over paths of any kind."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.odd_values import bounded, few_or_many
from tests.fuzz.surroundings import Surroundings, surroundings

_PATHS = ["model", "text.txt", "sibling", "no-such", "no-such/deeper", "link", "loop", "pipe", "dangling", "empty"]
_PATHS += [".", "", " ", "text.txt/below", "x" * 300, "d/" * 3000, "\u00e9\u2028", "\udcff", "-", "/dev/null"]
_OUTPUTS = ["out"] * 8 + ["out/deeper", "text.txt", "model", "model/inner", "sibling", ".", "link", "loop", "pipe"]
_OUTPUTS += ["", "x" * 300, "text.txt/below", "dangling", "empty", "/dev/null", "/dev/null/x", "/proc/x", "\udcff"]
_NUMBERS = ["0", "-1", "1", "2", "8", "1e3", "0.5", "nan", "inf", "-inf", "x", "", " 2", "2_0", "\u0662"]
_NUMBERS += ["9" * 30, "9" * 5000]
_TEXTS = ["the sea", "", " ", "\n", "<|eos|>", "\udcff", "\u00e9", "x" * 3000, "--", "-h"]
_SCHEMES = ["*=w8a16", "lm_head=none", "lm_head=", "=w8a16", "[=w8a16", "*=no-such", "*", "a=b=c", "*=w4a16_g7"]
_SCHEMES += ["\udcff=w8a16"]
_TARGETS = ["onnx", "kernels", "onnx:opset=3", "onnx:opset=21,float=float16", "onnx:", ":", "onnx:opset=\u0662"]
_TARGETS += ["no-such", ""]
_RECIPES = ["w8a16"] * 6 + ["w4a16-gptq", "no-such", "", "model", "text.txt", "pipe", "pipe.toml", "a:b", "\udcff"]
_RECIPES += ["x" * 9000]
_SIZES = ["4GB", "-1GB", "1e400", "nan", "", "B", "0", "9e99TB", "GB", "1 GB"]

_OPTIONS: dict[str, dict[str, list[str] | None]] = {
    "compile": {
        "--calib": _PATHS,
        "--samples": _NUMBERS,
        "--length": _NUMBERS,
        "--set": _SCHEMES,
        "--to": _TARGETS,
        "--overwrite": None,
        "--memory-budget": _SIZES,
        "--device": ["cpu", "cuda", "mps", "auto", "", "cpu:7", "no-such"],
        "--seed": _NUMBERS,
        "--strict": None,
        "--work-dir": [*_PATHS, "out", "out/native"],
    },
    "evaluate": {
        "--text": _PATHS,
        "--against": _PATHS,
        "--cached": None,
        "--no-cached": None,
        "--max-tokens": _NUMBERS,
        "--engine": ["kernels", "no-such", ""],
        "--device": ["cpu", "cuda", ""],
    },
    "generate": {
        "--max-new-tokens": _NUMBERS,
        "--temperature": _NUMBERS,
        "--top-k": _NUMBERS,
        "--top-p": _NUMBERS,
        "--seed": _NUMBERS,
        "--engine": ["kernels", ""],
    },
    "convert": {"--to": _TARGETS, "--overwrite": None},
    "inspect": {},
    "recipes": {},
}
_EVERYWHERE: dict[str, list[str] | None] = {
    "--json": None,
    "--verbose": None,
    "--trust-remote-code": None,
    "--no-such": None,
    "--": None,
    "--help": None,
    "-h": None,
    "--version": None,
}


@st.composite
def _lines(draw: st.DrawFn) -> list[str]:
    """A command line: what the command needs, right or wrong, and some of its options, each once or twice."""
    command = draw(st.sampled_from([*_OPTIONS, *["compile", "evaluate", "generate"] * 3]))
    line = [command]
    mostly = [*["model"] * 12, *_PATHS]
    if command == "recipes":
        line += draw(st.lists(st.sampled_from(_RECIPES), max_size=2))
    elif draw(st.integers(0, 19)):
        line.append(draw(st.sampled_from(mostly)))
    if command in ("compile", "convert") and draw(st.integers(0, 19)):
        line += ["-o", draw(st.sampled_from(_OUTPUTS))]
    if command == "compile" and draw(st.integers(0, 19)):
        line += ["-r", draw(st.sampled_from(_RECIPES))]
    if command == "generate" and draw(st.integers(0, 19)):
        line += ["--prompt", draw(st.sampled_from(_TEXTS)), "--max-new-tokens", "2"]
    known = _OPTIONS[command]
    for option in draw(st.lists(st.sampled_from(sorted(known)), max_size=3)) if known else []:
        values = known[option]
        line += [option] if values is None else [option, draw(st.sampled_from(values))]
    for option in draw(st.lists(st.sampled_from(sorted(_EVERYWHERE)), max_size=1)):
        line.insert(draw(st.integers(0, len(line))), option)
    if not draw(st.integers(0, 9)):
        del line[draw(st.integers(0, len(line) - 1))]
    return line + draw(st.sampled_from([["--json"], ["--json"], []]))


def _furnish(place: Surroundings) -> None:
    """Paths of every kind."""
    (place.root / "link").symlink_to("sibling")
    (place.root / "loop").symlink_to("loop")
    (place.root / "dangling").symlink_to("no-such-target")
    (place.root / "empty").mkdir()
    for pipe in ("pipe", "pipe.toml"):
        os.mkfifo(place.root / pipe)


def _output(line: list[str]) -> str:
    """The last output of a command line."""
    return next((after for before, after in reversed(list(itertools.pairwise(line))) if before == "-o"), "out")


@few_or_many(80, 600)
def test_command_lines(captured: Path, examples: int) -> None:
    @bounded(examples)
    @given(_lines())
    def check(line: list[str]) -> None:
        with surroundings(captured) as place:
            _furnish(place)
            place.run(*line, output=_output(line))

    check()


@few_or_many(40, 600)
def test_words(captured: Path, examples: int) -> None:
    """Words of command lines in any order."""
    words = st.sampled_from(
        [*_OPTIONS, *_EVERYWHERE, *_OPTIONS["compile"], "model", "-o", "out", "-r", "w8a16", "-v", "-"]
    )

    @bounded(examples)
    @given(st.lists(words, max_size=8))
    def check(line: list[str]) -> None:
        with surroundings(captured) as place:
            place.run(*line, output=_output(line))

    check()


@pytest.mark.parametrize("output", sorted(set(_OUTPUTS)))
def test_outputs(captured: Path, output: str) -> None:
    with surroundings(captured) as place:
        _furnish(place)
        place.run("compile", "model", "-r", "w8a16", "-o", output, "--overwrite", "--json", output=output)
