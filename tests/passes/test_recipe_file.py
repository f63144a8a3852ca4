"""Recipes as files, as places of somebody else's passes, and overrides of the schemes of any of them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from qcompiler import passes
from qcompiler.errors import PipelineError, RecipeError
from qcompiler.ir.graph import Graph
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.passes.recipe_file import load_recipe, override_schemes, read_recipe
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
)
from qcompiler.protocol.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent.parent


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True)
class Options(Pass):
    """One option of every kind."""

    needed: int
    ratio: float = 0.5
    flag: bool = False
    text: str = ""
    maybe: float | None = 1.0
    kind: Literal["a", "b", 3] = "a"
    mode: Mode = Mode.FAST
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (0, "")
    names: Sequence[str] = ()
    table: Mapping[str, float | None] = field(default_factory=dict)
    thing: object = None

    effect: ClassVar[Effect] = Effect.ANALYSIS

    def __post_init__(self) -> None:
        if self.needed < 0:
            raise ValueError("needed is negative")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(modified=False)


def write(tmp_path: Path, text: str, name: str = "recipe.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_base_alone(tmp_path: Path) -> None:
    assert load_recipe(str(write(tmp_path, 'base = "w4a16-gptq"'))) == load_recipe("w4a16-gptq")


def test_a_base_with_schemes_and_other_options(tmp_path: Path) -> None:
    text = """
        base = "w4a16-gptq"
        [schemes]
        "*.down" = "w8a16"
        "0.q" = "none"
        [[passes]]
        use = "GPTQ"
        damping = 1
        act_order = false
    """
    expected = (Assign("w4a16", overrides={"*.down": "w8a16", "0.q": None}), GPTQ(damping=1.0, act_order=False))
    found = load_recipe(write(tmp_path, text))
    assert found == expected
    assert overrides_of(found) == [("*.down", "w8a16"), ("0.q", None)]


def test_passes_of_its_own(tmp_path: Path) -> None:
    text = """
        [[passes]]
        use = "Assign"
        scheme = "none"
        [passes.overrides]
        "*.down" = "w8a16"
        "0.*" = "none"
        [[passes]]
        use = "RTN"
        search = "mse"
    """
    expected = (Assign(None, overrides={"*.down": "w8a16", "0.*": None}), RTN(search="mse"))
    assert read_recipe(write(tmp_path, text)) == expected


def test_schemes_beside_a_shorthand(tmp_path: Path) -> None:
    text = '[schemes]\n"0.q" = "w8a16"\n[[passes]]\nuse = "GPTQ"\nbits = 4\ngroup_size = 32'
    found = read_recipe(write(tmp_path, text))
    assert found == (
        Assign("w4a16", group_size=32, overrides={"0.q": "w8a16"}),
        GPTQ(bits=4, group_size=32),
    )
    assert Pipeline(found).passes == found


def test_every_kind_of_option(tmp_path: Path) -> None:
    text = f"""
        [[passes]]
        use = "{Path(__file__).resolve()}:Options"
        needed = 3
        ratio = 2
        flag = true
        text = "none"
        maybe = "none"
        kind = 3
        mode = "slow"
        sizes = [1, 2]
        pair = [1, "x"]
        names = ["p", "q"]
        table = {{ x = 1, y = "none" }}
    """
    (found,) = read_recipe(write(tmp_path, text))
    assert type(found).__name__ == "Options"
    assert found.options() == {
        **{"needed": 3, "ratio": 2.0, "flag": True, "text": "none", "maybe": None, "kind": 3, "mode": "Mode.SLOW"},
        **{"sizes": [1, 2], "pair": [1, "x"], "names": ["p", "q"], "table": {"x": 1.0, "y": None}, "thing": None},
    }
    assert isinstance(vars(found)["ratio"], float)
    assert vars(found)["sizes"] == (1, 2)


SHIPPED = [cls for name in passes.__all__ if isinstance(cls := getattr(passes, name), type) and issubclass(cls, Pass)]


def as_toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value)


@pytest.mark.parametrize("cls", SHIPPED, ids=lambda cls: cls.__name__)
def test_every_option_of_every_shipped_pass_can_be_written_down(cls: type[Pass], tmp_path: Path) -> None:
    item = cls()
    lines = [f"{option.name} = {as_toml(getattr(item, option.name))}" for option in dataclasses.fields(cls)]
    path = write(tmp_path, "\n".join(["[[passes]]", f'use = "{cls.__name__}"', *lines]))
    assert read_recipe(path) == (item,)


WRONG_OPTIONS = [
    ("needed = 1.5", "needed", "int"),
    ("needed = true", "needed", "int"),
    ('needed = "none"', "needed", "int"),
    ('ratio = "x"', "ratio", "float"),
    ("ratio = nan", "ratio", "float"),
    ("ratio = inf", "ratio", "float"),
    ("ratio = true", "ratio", "float"),
    ("flag = 1", "flag", "bool"),
    ("text = 1", "text", "str"),
    ('maybe = "x"', "maybe", 'float or "none"'),
    ('kind = "c"', "kind", "a or b or 3"),
    ("kind = 3.0", "kind", "a or b or 3"),
    ('mode = "medium"', "mode", "Mode"),
    ("sizes = [1, 2.5]", "sizes", "int"),
    ("sizes = 1", "sizes", "tuple[int, ...]"),
    ("pair = [1]", "pair", "tuple[int, str]"),
    ("table = { x = true }", "table", "float"),
    ("thing = 1", "thing", "object"),
    ("colour = 1", "colour", "needed, ratio"),
]


@pytest.mark.parametrize(("line", "key", "expected"), WRONG_OPTIONS, ids=[line for line, _, _ in WRONG_OPTIONS])
def test_wrong_options(tmp_path: Path, line: str, key: str, expected: str) -> None:
    needed = "" if line.startswith("needed") else "needed = 1"
    path = write(tmp_path, f'[[passes]]\nuse = "{Path(__file__).resolve()}:Options"\n{needed}\n{line}')
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value.where)
    assert "passes[0] (Options)" in str(caught.value.where)
    assert key in str(caught.value.where)
    assert expected in str(caught.value.expected)


HERE = f"{Path(__file__).resolve()}:Options"
WRONG_FILES = [
    ("base = ", "not TOML", ""),
    ("base = " + "[" * 100_000, "not TOML", ""),
    ("", "needs a base or passes", "nothing"),
    ('[schemes]\n"*" = "w8a16"', "needs a base or passes", "schemes"),
    ('base = "w4a16-gptq"\nbits = 4', "bits", ""),
    ("base = 4", "base", "4"),
    ('base = "w5a16"', "base", "w5a16"),
    ('base = "w8a16"\nschemes = "w8a16"', "schemes", "w8a16"),
    ('base = "w8a16"\npasses = "GPTQ"', "passes", "GPTQ"),
    ('base = "w8a16"\npasses = ["GPTQ"]', "passes[0].use", "GPTQ"),
    ('base = "w8a16"\n[schemes]\n"*.a" = "w9a16"', "schemes: '*.a'", "w9a16"),
    ('base = "w8a16"\n[schemes]\n"*.a" = 8', "schemes.'*.a'", "8"),
    ('base = "w8a16"\n[[passes]]\nsearch = "mse"', "passes[0].use", "search"),
    ('base = "w8a16"\n[[passes]]\nuse = "GPTQ"', "passes[0] (GPTQ)", "GPTQ"),
    ('base = "w8a16"\n[[passes]]\nuse = "RTN"\n[[passes]]\nuse = "RTN"', "passes[1] (RTN)", "once more"),
    ('base = "w8a16"\n[[passes]]\nuse = "Assign"\nscheme = "w9a16"', "passes[0] (Assign)", "w9a16"),
    ('[[passes]]\nuse = "Magic"', "passes[0].use", "Magic"),
    ('[[passes]]\nuse = "RECIPES"', "passes[0].use", "RECIPES"),
    ('[[passes]]\nuse = "nowhere.py:Magic"', "passes[0].use", ""),
    ('[[passes]]\nuse = "no_such_package.deep:Magic"', "passes[0].use", "ModuleNotFoundError"),
    (f'[[passes]]\nuse = "{HERE[:-7]}Mode"', "passes[0].use", "Mode"),
    (f'[[passes]]\nuse = "{HERE[:-7]}Magic"', "passes[0].use", "Magic"),
    (f'[[passes]]\nuse = "{HERE}"', "passes[0] (Options)", ""),
    (f'[[passes]]\nuse = "{HERE}"\nneeded = -1', "passes[0] (Options)", "needed is negative"),
    (
        '[schemes]\n"0.*" = "w8a16"\n[[passes]]\nuse = "Assign"\noverrides = { "0.*" = "none" }',
        "schemes.'0.*'",
        "none in Assign",
    ),
    ('[[passes]]\nuse = "Assign"\n[[passes]]\nuse = "Assign"', "schemes", "Assign"),
    ('[schemes]\n"0.*" = "w8a16"\n[[passes]]\nuse = "RTN"', "schemes", "rtn"),
]


@pytest.mark.parametrize(("text", "where", "got"), WRONG_FILES, ids=[text for text, _, _ in WRONG_FILES])
def test_wrong_files(tmp_path: Path, text: str, where: str, got: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert where in f"{caught.value.what} {caught.value.where}"
    assert got in str(caught.value.got)
    assert str(path) in str(caught.value.where)


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("no.toml", str(tmp_path / "no.toml")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert caught.value.where == name


@pytest.mark.parametrize("recipe", ["custom.py", Path("recipe.txt"), GPTQ(bits=4), 5, None, "w5a16"])
def test_what_is_no_recipe(recipe: Any) -> None:
    with pytest.raises(RecipeError):
        load_recipe(recipe)


def test_a_file_of_passes_is_found_beside_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", Path(__file__).read_text(encoding="utf-8"), "mine.py")
    found = read_recipe(write(tmp_path / "deep", '[[passes]]\nuse = "mine.py:Options"\nneeded = 1'))
    assert [item.name for item in found] == ["options"]


# --- overrides -------------------------------------------------------------------------------------------------------


def overrides_of(passes: Sequence[Pass]) -> list[tuple[str, str | None]]:
    (assign,) = (item for item in passes if isinstance(item, Assign))
    return list(assign.overrides.items())


def test_overrides_stand_last_and_so_win() -> None:
    recipe = (Assign("w4a16", overrides={"0.*": "w8a16", "*": "w3a16"}), RTN())
    found = override_schemes(recipe, {"0.*": None, "1.q": "w2a16"})
    assert overrides_of(found) == [("*", "w3a16"), ("0.*", None), ("1.q", "w2a16")]
    assert found[1] is recipe[1]
    assert override_schemes(recipe, None) == override_schemes(recipe, {}) == recipe


@pytest.mark.parametrize("word", ["none", "None", "float"])
def test_words_for_no_scheme(word: str) -> None:
    assert overrides_of(override_schemes([RTN(bits=4)], {"0.q": word})) == [("0.q", None)]


def test_an_unknown_scheme_is_named_with_its_pattern() -> None:
    with pytest.raises(RecipeError) as caught:
        override_schemes([RTN(bits=4)], {"a": "w8a16", "*.b": "w9a16"})
    assert caught.value.where == "overrides: '*.b'"
    assert caught.value.got == "w9a16"


def test_schemes_that_contradict_each_other() -> None:
    with pytest.raises(RecipeError, match="assigns schemes twice"):
        override_schemes([Assign("w4a16"), Assign("w8a16"), RTN()], None)
    with pytest.raises(PipelineError, match="disagree"):
        Pipeline(override_schemes([Assign("w4a16"), GPTQ(bits=3)], None))
    with pytest.raises(RecipeError, match="assigns schemes"):
        override_schemes([RTN()][:0], {"*": "w8a16"})
