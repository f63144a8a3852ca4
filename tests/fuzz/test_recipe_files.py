"""A recipe of any content: TOML files, Python files, and what is no file at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompiler.passes as shipped
from qcompiler.protocol.pass_base import Pass
from tests.fuzz.odd_values import bounded, few_or_many, odd_texts
from tests.fuzz.surroundings import surroundings

_PASSES = {
    name: [item.name for item in dataclasses.fields(cls) if item.init]
    for name in shipped.__all__
    if isinstance(cls := getattr(shipped, name), type) and issubclass(cls, Pass) and dataclasses.is_dataclass(cls)
}
_NAMES = ["w8a16", "w4a16-rtn", "w4a16-gptq", "w8a8", "w4a16", "w4a16_g32", "int3-g16", "nf4", "float", "no-such"]
_PATTERNS = ["*", "lm_head", "*.0.*", "*down*", "[", "]", "**", "[!a-", "?" * 300, ""]


def _quoted(text: str) -> str:
    """A basic string of TOML, which escapes as JSON does, but for DEL."""
    return json.dumps(text).replace("\x7f", "\\u007f")


_strings = st.one_of(st.sampled_from([*_NAMES, *_PATTERNS, "w8a16:sym", "cpu", "mse", "none"]), odd_texts).map(_quoted)
_values = st.recursive(
    st.one_of(
        _strings,
        st.sampled_from(["true", "false", "0", "-1", "1", "4", "32", "0.01", "-0.5", "nan", "inf", "1e308", "9" * 40]),
        st.sampled_from(
            ["1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "'''a\nb'''", "0xff", "+0", "", "none", "?"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(_strings, inner, max_size=2).map(
            lambda items: "{" + ", ".join(f"{key} = {value}" for key, value in items.items()) + "}"
        ),
    ),
    max_leaves=4,
)


@st.composite
def _tables(draw: st.DrawFn) -> str:
    """One entry of ``passes``."""
    name = draw(st.sampled_from(sorted(_PASSES)))
    known = [item for item in _PASSES[name] if draw(st.integers(0, 3)) == 0]
    options = known if draw(st.integers(0, 9)) else [*known, "no_such"]
    use = draw(st.sampled_from([f'use = "{name}"'] * 20 + ["", "use = 3", 'use = "x:Y"', 'use = "json:loads"']))
    return "\n".join(["[[passes]]", use, *(f"{option} = {draw(_values)}" for option in options)])


@st.composite
def _recipes(draw: st.DrawFn) -> str:
    """The text of a recipe file, in pieces that may be right."""
    base = draw(st.sampled_from(["", 'base = "w8a16"', 'base = "w4a16-gptq"']))
    if not draw(st.integers(0, 4)):
        base = f"base = {draw(_values)}"
    wrong = ["schemes = 3", "passes = {}", "passes = [1]", "unknown = 1", "[[schemes]]"]
    keys = draw(st.sampled_from([*[""] * 15, *wrong]))
    schemes = draw(st.dictionaries(_strings, st.sampled_from(_NAMES).map(_quoted) | _values, max_size=2))
    heading = ["[schemes]", *(f"{pattern} = {scheme}" for pattern, scheme in schemes.items())] if schemes else []
    return "\n".join([base, keys, *heading, *draw(st.lists(_tables(), max_size=3))])


@few_or_many(120, 1500)
def test_read(original: Path, examples: int) -> None:
    @bounded(examples)
    @given(_recipes())
    def check(text: str) -> None:
        with surroundings(original) as place:
            (place.root / "recipe.toml").write_text(text, encoding="utf-8")
            place.run("recipes", "recipe.toml", "--json")

    check()


@few_or_many(5, 80)
def test_compiled(original: Path, examples: int) -> None:
    @bounded(examples)
    @given(_recipes())
    def check(text: str) -> None:
        with surroundings(original) as place:
            (place.root / "recipe.toml").write_text(text, encoding="utf-8")
            place.compile("--samples", 2, "--length", 8, recipe="recipe.toml")

    check()


@few_or_many(25, 300)
def test_bytes(original: Path, examples: int) -> None:
    @bounded(examples)
    @given(
        st.binary(max_size=200) | st.sampled_from([b"[" * 100_000, b"a=" + b"[" * 100_000, b"a.b." * 1_000 + b"c=1"])
    )
    def check(content: bytes) -> None:
        with surroundings(original) as place:
            (place.root / "recipe.toml").write_bytes(content)
            place.run("recipes", "recipe.toml", "--json")

    check()


_CODE: list[Any] = [
    "",
    "NAME = 3",
    "NAME = []",
    "NAME = (1, 2)",
    "def NAME(): pass",
    "class NAME: pass",
    "1 / 0",
    "import no_such_module_anywhere",
    "raise SystemExit(7)",
    "raise SystemExit('out')",
    "raise KeyboardInterrupt",
    "raise BaseException('odd')",
    "raise GeneratorExit",
    "print('on stdout'); NAME = 3",
    "def (",
    "\0",
    "\ufeffNAME = 3",
    "def __getattr__(name): raise ValueError(name)",
    "from qcompiler.passes import RTN as NAME",
    "from qcompiler.passes import RTN; NAME = (RTN, RTN())",
    "from qcompiler.passes import RTN; NAME = lambda: (RTN(),)",
]


@pytest.mark.parametrize("code", _CODE)
@pytest.mark.parametrize("name", ["recipe.py:NAME", "recipe.py:no_such", "recipe.py:", "recipe.py", "recipe:NAME"])
def test_code(original: Path, code: str, name: str) -> None:
    with surroundings(original) as place:
        (place.root / "recipe.py").write_text(code, encoding="utf-8")
        place.run("recipes", name, "--json")


_ELSEWHERE = [
    ":",
    "a:",
    ":b",
    "json:loads",
    "json:no_such",
    "no.such:X",
    "no..such:X",
    ".:X",
    "..:X",
    "/:X",
    "sys:exit",
    "os:abort",
    "qcompiler.passes:RTN",
    "qcompiler.passes:",
    "sibling",
    "sibling/kept.txt",
    "none.toml",
    "sibling.toml",
    ".toml",
    "/dev/null",
    "W8A16",
    "pipe.toml",
    "pipe.py:X",
]


@pytest.mark.parametrize(
    "name", [*_ELSEWHERE, "", "a\nb:c", "x" * 5000, "w8a16 ", "\udcff", "\udcff.toml", "\udcff.py:X"]
)
def test_no_recipe(original: Path, name: str) -> None:
    with surroundings(original) as place:
        (place.root / "sibling.toml").mkdir()
        for pipe in ("pipe.toml", "pipe.py"):
            os.mkfifo(place.root / pipe)
        place.run("recipes", name, "--json")
