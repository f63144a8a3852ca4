"""Options are checked when a pass is made, by their annotations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from qcompiler import passes
from qcompiler.errors import RecipeError
from qcompiler.protocol.options import Within, check_options, describe_hint
from qcompiler.protocol.pass_base import Pass

BAD: list[tuple[type[Pass], dict[str, Any], str, str]] = [
    (passes.GPTQ, {"damping": -1}, "GPTQ.damping", "at least 0, at most 1"),
    (passes.GPTQ, {"damping": math.nan}, "GPTQ.damping", "at least 0, at most 1"),
    (passes.GPTQ, {"sweeps": 1.5}, "GPTQ.sweeps", "int at least 0"),
    (passes.GPTQ, {"sweeps": -1}, "GPTQ.sweeps", "at least 0"),
    (passes.GPTQ, {"correction": 2}, "GPTQ.correction", "at least 0, at most 1"),
    (passes.GPTQ, {"act_order": "yes"}, "GPTQ.act_order", "bool"),
    (passes.GPTQ, {"bits": "4"}, "GPTQ.bits", "int or none"),
    (passes.RTN, {"search": "mes"}, "RTN.search", "minmax or mse or gram"),
    (passes.AWQ, {"grid": 20.5}, "AWQ.grid", "int at least 2, at most 1000"),
    (passes.AWQ, {"grid": True}, "AWQ.grid", "int at least 2, at most 1000"),
    (passes.SmoothQuant, {"alpha": "0.5"}, "SmoothQuant.alpha", "float at least 0, at most 1 or none"),
    (passes.SqueezeLLM, {"sparse_fraction": 0.2}, "SqueezeLLM.sparse_fraction", "at least 0, at most 0.1"),
    (passes.SqueezeLLM, {"damping": 0}, "SqueezeLLM.damping", "above 0, at most 1"),
    (passes.Rotate, {"residual": 1}, "Rotate.residual", "bool"),
    (passes.InsertQDQ, {"percentile": 50}, "InsertQDQ.percentile", "above 50, at most 100"),
    (passes.InsertQDQ, {"least_sqnr_db": "20"}, "InsertQDQ.least_sqnr_db", "float or none"),
    (passes.QuantizeKVCache, {"group_size": 1.0}, "QuantizeKVCache.group_size", "int or none"),
    (passes.QuantizeEmbedding, {"group_size": 1.5}, "QuantizeEmbedding.group_size", "int or none"),
    (passes.Assign, {"scheme": 4}, "Assign.scheme", "str or none"),
    (passes.Assign, {"overrides": {"lm_head": 8}}, "Assign.overrides", "Mapping[str, str | None]"),
]


@pytest.mark.parametrize(("cls", "options", "where", "expected"), BAD, ids=lambda value: str(value)[:30])
def test_what_no_pass_takes(cls: type[Pass], options: dict[str, Any], where: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        cls(**options)
    assert (caught.value.where, caught.value.expected) == (where, expected)


def test_every_pass_with_a_number_is_listed() -> None:
    """A new pass with an option of a number or a choice has its row above."""
    covered = {cls for cls, *_ in BAD}
    shipped = [value for name in passes.__all__ if isinstance(value := getattr(passes, name), type)]
    assert {cls for cls in shipped if dataclasses.fields(cls)} == covered


@pytest.mark.parametrize("cls", [passes.GPTQ, passes.RTN])
@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"bits": 4, "group_size": 0}, {"group_size": 64}, {"symmetric": False}]
)
def test_shorthands_that_mean_nothing(cls: type[Pass], options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        cls(**options)


def test_what_is_near_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        passes.RTN(search="minmx")  # type: ignore[arg-type]
    assert caught.value.remedy == "did you mean minmax?"


@dataclasses.dataclass(frozen=True)
class Made:
    count: Annotated[int, Within(1)] = 1
    share: Annotated[float, Within(0, 1, below=True)] = 0
    kind: Literal["a", "b"] | None = None
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    anything: object = None
    pair: tuple[int, int] = (1, 2)


@pytest.mark.parametrize(
    "fields", [{}, {"count": 9}, {"kind": "b"}, {"table": {"x": 1}}, {"anything": [1]}, {"pair": 3}]
)
def test_what_is_taken(fields: dict[str, Any]) -> None:
    check_options(Made(**fields))


@pytest.mark.parametrize(
    "fields", [{"count": 0}, {"share": 1.0}, {"share": math.inf}, {"kind": "c"}, {"table": {"x": "1"}}, {"table": [1]}]
)
def test_what_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"Made.{next(iter(fields))}"):
        check_options(Made(**fields))


def test_annotations_that_cannot_be_looked_up_check_nothing() -> None:
    @dataclasses.dataclass
    class Odd:
        value: "NoSuchName" = 1  # type: ignore[name-defined]  # noqa: F821

    check_options(Odd())


def test_hints_in_words() -> None:
    assert describe_hint(Annotated[int, Within(2, 5, below=True)] | None) == "int at least 2, below 5 or none"
    assert describe_hint(Literal["a", "b"]) == "a or b"
    assert str(Within()) == "a finite number"
