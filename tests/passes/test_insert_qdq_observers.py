"""Ranges of activations chosen by a statistic of somebody else's."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.passes import RTN, Assign, InsertQDQ
from qcompiler.passes.recipe_file import read_recipe
from qcompiler.protocol.statistics import RangeStatistic
from tests.passes.test_insert_qdq import compiled, rounded_model
from tests.tiny_graphs import Maker, input_batches, other


class Largest:
    """The largest magnitude, to both sides."""

    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self.largest = 0.0

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        self.largest = max(self.largest, float(batch.abs().max()))

    def merge(self, other: "Largest") -> None:
        self.largest = max(self.largest, other.largest)

    def range(self, spec: Any) -> Any:
        return -self.largest, self.largest


def test_it_is_a_range_statistic() -> None:
    kind: type[RangeStatistic] = Largest
    assert InsertQDQ(observer=kind).is_calibrated
    assert InsertQDQ(observer=kind).options()["observer"] == "Largest"


@pytest.mark.parametrize("scheme", ["fp8", "w8a8-actsym"])
def test_symmetric_ranges_of_all_that_was_seen_are_those_of_minmax(scheme: str, tmp_path: Path) -> None:
    own, reports = rounded_model(scheme, tmp_path / "a", RTN(), InsertQDQ(Largest))
    named, _ = rounded_model(scheme, tmp_path / "b", RTN(), InsertQDQ("minmax"))
    names = [name for name in named.weights.names() if "input" in name]
    assert names
    assert all(torch.equal(own.weights.read(name), named.weights.read(name)) for name in names)
    assert {r.details["observer"] for r in reports if r.method == "insert-qdq"} == {"Largest"}


def test_inputs_that_share_a_range_are_merged(tmp_path: Path) -> None:
    make = Maker()
    x = make.fx.placeholder("x")
    y = make.call(torch.ops.aten.mul.Tensor, x, 3.0)
    parts = [make.linear(value, site, 8, 8) for value, site in ((x, "a"), (y, "b"), (y, "a"))]
    total = make.call(torch.ops.aten.add.Tensor, *parts[:2])
    total = make.call(torch.ops.aten.add.Tensor, total, parts[2])
    graph = make.graph([other("x", "batch", 8)], {other("y", "batch", 8): total})
    batches = input_batches(graph)
    reports = compiled(graph, [Assign("w8a8"), RTN(), InsertQDQ(Largest)], batches, tmp_path)
    largest = 3 * max(float(batch[graph.inputs[0]].abs().max()) for batch in batches)
    found = [report.details["range"] for report in reports if report.method == "insert-qdq"]
    assert found == [[pytest.approx(-largest), pytest.approx(largest)]] * 2


@pytest.mark.parametrize("scheme", ["nvfp4", "w8a8-dynamic"])
def test_formats_whose_ranges_are_not_chosen_do_not_ask_it(scheme: str, tmp_path: Path) -> None:
    class Never(Largest):
        def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
            raise AssertionError("asked")

    own, reports = rounded_model(scheme, tmp_path / "a", RTN(), InsertQDQ(Never, least_sqnr_db=-math.inf))
    named, _ = rounded_model(scheme, tmp_path / "b", RTN(), InsertQDQ("mse", least_sqnr_db=-math.inf))
    names = [name for name in named.weights.names() if "input" in name]
    assert bool(names) is (scheme == "nvfp4")
    assert all(torch.equal(own.weights.read(name), named.weights.read(name)) for name in names)
    assert not any("observer" in report.details for report in reports)


@pytest.mark.parametrize(
    "answer", [(1.0, -1.0), (math.nan, 1.0), (-1.0, math.inf), 3.0, None, (1.0,), (0.0, 1.0, 2.0), ("low", "high")]
)
def test_what_is_no_range_names_the_site(answer: Any, tmp_path: Path) -> None:
    class Wrong(Largest):
        def range(self, spec: Any) -> Any:
            return answer

    with pytest.raises(CalibrationError, match="no range") as caught:
        rounded_model("w8a8", tmp_path, RTN(), InsertQDQ(Wrong))
    assert caught.value.where == "0.q"
    assert "Wrong.range" in str(caught.value)


def test_a_range_is_widened_to_hold_zero(tmp_path: Path) -> None:
    class Above(Largest):
        def range(self, spec: Any) -> Any:
            return torch.tensor(0.5), torch.tensor(9.0)

    _, reports = rounded_model("w8a8", tmp_path, RTN(), InsertQDQ(Above, least_sqnr_db=-math.inf))
    assert {tuple(r.details["range"]) for r in reports if r.method == "insert-qdq"} == {(0.0, 9.0)}


class NoRange:
    def update(self, batch: Tensor, reference: Tensor | None = None) -> None: ...

    def merge(self, other: object) -> None: ...


class Needy(Largest):
    def __init__(self, share: float) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (NoRange, "NoRange without range, needs_reference"),
        (int, "int without update, merge, range"),
        (Needy, "constructor"),
    ],
)
def test_what_is_missing_is_named(kind: Any, missing: str) -> None:
    with pytest.raises(RecipeError, match="no statistic") as caught:
        InsertQDQ(observer=kind)
    assert caught.value.where == "InsertQDQ.observer"
    assert missing in str(caught.value.got)


@pytest.mark.parametrize("observer", ["mes", 3, Largest()])
def test_neither_a_name_nor_a_class(observer: Any) -> None:
    with pytest.raises(RecipeError, match="wrong kind") as caught:
        InsertQDQ(observer=observer)
    assert str(caught.value.expected).endswith("or a class of RangeStatistic or none")


def written(path: Path, observer: str) -> Path:
    (path / "mine.py").write_text("from tests.passes.test_insert_qdq_observers import Largest, NoRange\nnumber = 3\n")
    passes = ('use = "Assign"\nscheme = "w8a8"', 'use = "RTN"', f'use = "InsertQDQ"\nobserver = "{observer}"')
    (path / "recipe.toml").write_text("".join(f"[[passes]]\n{text}\n" for text in passes))
    return path / "recipe.toml"


def test_a_recipe_file_names_its_place(tmp_path: Path) -> None:
    (*_, item) = read_recipe(written(tmp_path, "mine.py:Largest"))
    assert item == InsertQDQ(observer=Largest)
    (*_, item) = read_recipe(written(tmp_path, "kl"))
    assert item == InsertQDQ(observer="kl")


@pytest.mark.parametrize(
    ("observer", "what"),
    [
        ("mine.py:Smallest", "no such name"),
        ("yours.py:Largest", "no such Python file"),
        ("mine.py:number", "wrong type"),
        ("mine.py:NoRange", "no statistic"),
        ("mean", "wrong type"),
    ],
)
def test_places_that_lead_nowhere(observer: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        read_recipe(written(tmp_path, observer))
    assert "passes[2] (InsertQDQ)" in str(caught.value.where)
    assert "observer" in str(caught.value.where)
