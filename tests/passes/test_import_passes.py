"""Passes named by where they lie."""

from pathlib import Path

import pytest

from qcompiler.errors import RecipeError
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.passes._import_passes import import_passes
from qcompiler.protocol.importing import import_object

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.protocol.pass_base import Effect, Pass, PassResult
from qcompiler.passes import RTN, Assign

@dataclass(frozen=True)
class Nothing(Pass):
    amount: int = 1
    effect: ClassVar[Effect] = Effect.ANALYSIS
    def run(self, graph, context):
        return PassResult(modified=False)

@dataclass(frozen=True)
class Needy(Nothing):
    need: int = None
    def __init__(self, need):
        object.__setattr__(self, "need", need)

from qcompiler.extend import WeightQuantizer
INSTANCE = Nothing(2)
RECIPE = (Assign("w4a16"), RTN)
MIXED = [RTN(), 3]
class Room:
    Inside = Nothing
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


def test_a_class_an_instance_and_several(module: Path) -> None:
    (made,) = import_passes(f"{module}:Nothing")
    assert (made.name, made.options()) == ("nothing", {"amount": 1})
    (given,) = import_passes(f"{module}:INSTANCE")
    assert given.options() == {"amount": 2}
    assert import_passes(f"{module}:RECIPE") == (Assign("w4a16"), RTN())
    assert import_object(f"{module}:Room.Inside") is import_object(f"{module}:Nothing")
    assert import_passes("qcompiler.passes:GPTQ") == import_passes("qcompiler.passes.gptq:GPTQ") == (GPTQ(),)


def test_a_file_runs_once(tmp_path: Path) -> None:
    path = tmp_path / "counting.py"
    path.write_text(f"with open({str(tmp_path / 'runs')!r}, 'a') as file:\n    file.write('x')\n" + MODULE)
    assert import_object("counting.py:Nothing", tmp_path) is import_object(f"{path}:Nothing")
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "mentioned"),
    [
        ("Nowhere", "Nothing, Needy, INSTANCE, RECIPE"),
        ("Room.Outside", "Inside"),
        ("MIXED", "3"),
        ("Room", "Room"),
        ("dataclass", "dataclass"),
        ("Needy", "need"),
    ],
)
def test_what_is_no_pass(module: Path, name: str, mentioned: str) -> None:
    with pytest.raises(RecipeError) as caught:
        import_passes(f"{module}:{name}")
    assert mentioned in f"{caught.value.got} {caught.value.expected}"
    assert str(module) in str(caught.value.where)


@pytest.mark.parametrize(
    "place", ["mine.py", ":NAME", "mine.py:", "no_such_package:GPTQ", "no/such/file.py:GPTQ", ".a:B"]
)
def test_wrong_places(place: str) -> None:
    with pytest.raises(RecipeError):
        import_passes(place)


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("import sys; sys.exit(3)", "SystemExit"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise BaseException", "BaseException"),
    ],
)
def test_a_file_that_fails(tmp_path: Path, code: str, got: str) -> None:
    path = tmp_path / "broken.py"
    for _ in range(2):  # nothing half-run is left behind for the second time
        path.write_text(code)
        with pytest.raises(RecipeError) as caught:
            import_passes(f"{path}:X")
        assert (caught.value.where, str(caught.value.got).split(":")[0]) == (str(path), got)
    path.write_text(MODULE + "#" * 100)
    assert len(import_passes(f"{path}:RECIPE")) == 2


def test_an_interrupt_stays_one_and_leaves_nothing_half_run(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_passes(f"{path}:X")
    path.write_text(MODULE + "#" * 100)
    assert len(import_passes(f"{path}:RECIPE")) == 2


@pytest.mark.parametrize("error", ["ValueError", "BaseException", "SystemExit"])
def test_a_module_that_fails_when_asked_for_a_name(tmp_path: Path, error: str) -> None:
    path = tmp_path / "lazy.py"
    path.write_text(f"def __getattr__(name):\n    raise {error}(name)")
    with pytest.raises(RecipeError) as caught:
        import_passes(f"{path}:X")
    assert str(caught.value.got).startswith(error)


def test_a_class_that_fails_when_made(tmp_path: Path) -> None:
    path = tmp_path / "made.py"
    path.write_text(MODULE + "class Broken(Nothing):\n    def __post_init__(self):\n        1 / 0\n")
    with pytest.raises(RecipeError) as caught:
        import_passes(f"{path}:Broken")
    assert str(caught.value.got).startswith("ZeroDivisionError")
