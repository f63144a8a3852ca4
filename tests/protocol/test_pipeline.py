from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.protocol.pass_base import (
    CANONICAL,
    SCHEMES,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Tap,
    Wave,
)
from qcompiler.protocol.pipeline import Pipeline, Stage


@dataclass(frozen=True)
class Swept(Pass):
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True)
class Measure(Swept):
    barrier: ClassVar[bool] = True


@dataclass(frozen=True)
class Whole(Pass):
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        return PassResult(modified=False)


@dataclass(frozen=True)
class Decompose(Whole):
    invalidates: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})


def message(passes: Any) -> str:
    with pytest.raises(PipelineError) as caught:
        Pipeline(passes)
    return str(caught.value)


def test_a_good_order_is_kept():
    passes = (Assign(), Swept(), RTN())
    assert Pipeline(passes).passes == passes
    assert Pipeline([]).passes == ()


def test_a_missing_fact():
    assert message([RTN()]) == (
        "the passes cannot run in this order\n"
        "  got: RTN (position 0) needs 'schemes': no pass here establishes it\n"
        "  expected: every pass behind the ones that establish what it needs"
    )


def test_every_violation_is_listed():
    assert message([Decompose(), RTN(), GPTQ(), Assign()]) == (
        "the passes cannot run in this order\n"
        "  got: RTN (position 1) needs 'canonical operators': Decompose (position 0) has done away with it; "
        "RTN (position 1) needs 'schemes': Assign establishes it, but stands behind; "
        "GPTQ (position 2) needs 'canonical operators': Decompose (position 0) has done away with it; "
        "GPTQ (position 2) needs 'schemes': Assign establishes it, but stands behind; "
        "GPTQ (position 2) quantizes weights that are quantized already; "
        "Assign (position 3) needs 'canonical operators': Decompose (position 0) has done away with it\n"
        "  expected: every pass behind the ones that establish what it needs"
    )


def test_facts_are_lost_where_a_pass_invalidates_them():
    assert "RTN (position 2) needs 'schemes'" in message([Assign(), Decompose(), RTN()])


def test_weights_are_quantized_once():
    assert "GPTQ (position 2) quantizes weights that are quantized already" in message([Assign(), RTN(), GPTQ()])


def test_a_shorthand_puts_its_assign_in_front():
    shorthand = GPTQ(bits=3, group_size=64, symmetric=False)
    assert Pipeline([Swept(), shorthand]).passes == (
        Assign("w3a16", group_size=64, symmetric=False),
        Swept(),
        shorthand,
    )


@pytest.mark.parametrize(
    "given",
    [
        Assign("w4a16", group_size=64),
        Assign("w4a16-g64"),
        Assign("w4a16", group_size=64, overrides={"*.down": "w8a16"}),
    ],
)
def test_an_assign_that_says_the_same_stands_for_the_implied_one(given):
    passes = (given, GPTQ(bits=4, group_size=64))
    assert Pipeline(passes).passes == passes


def test_expanding_twice_changes_nothing():
    once = Pipeline([GPTQ(bits=4)]).passes
    assert Pipeline(once).passes == once


def test_disagreement():
    assert message([Assign("w4a16"), GPTQ(bits=3)]) == (
        "passes disagree about the same thing\n"
        f"  got: GPTQ implies {Assign('w3a16')}, and {Assign('w4a16')} is there\n"
        "  remedy: give the shorthand alone, or leave its options out"
    )
    two = message([Assign("w4a16"), GPTQ(bits=3), RTN(bits=2)])
    assert "GPTQ implies" in two
    assert "RTN implies" in two
    assert "RTN implies" in message([GPTQ(bits=3), RTN(bits=2)])  # two implied ones


def test_an_implied_assign_that_comes_too_late():
    assert "Assign establishes it, but stands behind" in message([GPTQ(bits=4), Assign("w4a16")])


@pytest.mark.parametrize("wrong", ["w4a16-gptq", GPTQ, None, 4])
def test_what_is_no_pass(wrong):
    text = message([Assign(), wrong, RTN()])
    assert text.startswith("a recipe is a sequence of passes")
    assert f"got: {wrong!r}" in text


def test_a_pass_that_does_nothing_is_refused_and_named_with_others():
    @dataclass(frozen=True)
    class Idle(Pass):
        effect: ClassVar[Effect] = Effect.EXACT

    text = message([Idle(), Assign(), 7])
    assert "Idle()" in text
    assert "7" in text


def test_one_stage_for_ordinary_recipes():
    assign, swept, rtn = Assign(), Swept(), RTN()
    assert Pipeline([assign, swept, rtn]).stages == (Stage((assign,), (swept, rtn)),)


def test_stages_end_behind_barriers_and_before_whole_graph_passes():
    measure, swept, whole, assign, rtn = Measure(), Swept(), Whole(), Assign(), RTN()
    assert Pipeline([whole, swept, measure, swept, assign, rtn, measure, whole]).stages == (
        Stage((whole,), (swept, measure)),
        Stage((), (swept,)),
        Stage((assign,), (rtn, measure)),
        Stage((whole,), ()),
    )


def test_calibration_is_asked_for_by_stage():
    stages = Pipeline([Assign(), Measure(), GPTQ()]).stages
    assert [stage.is_calibrated for stage in stages] == [False, True]
    assert Pipeline([GPTQ(bits=4)]).is_calibrated
    assert not Pipeline([RTN(bits=4)]).is_calibrated
