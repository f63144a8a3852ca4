"""A pass that does not do what it declares is told so."""

import pytest
import torch

from qcompiler.errors import VerificationError
from qcompiler.protocol.declarations import check_declared, check_exact, state_of
from qcompiler.protocol.pass_base import Effect, Pass, PassResult
from tests.tiny_graphs import chain


class Analysis(Pass):
    effect = Effect.ANALYSIS


class Exact(Pass):
    effect = Effect.EXACT


def test_the_state_of_a_graph():
    graph = chain()
    nodes = list(graph.fx.nodes)
    before = state_of(graph, nodes)
    assert state_of(graph, nodes) == before
    weight = graph.weights.read("1.weight")
    graph.weights.set("1.weight", weight)
    after = state_of(graph, nodes)
    assert [key for key in before if before[key] != after[key]] == ["1.weight"]
    graph.sites()[2].nodes[0].update_arg(0, graph.inputs[0])
    changed = state_of(graph, nodes)
    assert [key for key in after if after[key] != changed[key]] == [graph.sites()[2].nodes[0].name]


def test_the_state_of_some_nodes_is_that_of_the_tensors_they_read():
    graph = chain()
    first = graph.sites()[0].nodes
    before = state_of(graph, first)
    graph.weights.set("1.weight", torch.zeros(8, 8))
    assert state_of(graph, first) == before
    graph.weights.set("0.weight", torch.zeros(8, 8))
    assert state_of(graph, first) != before


@pytest.mark.parametrize(("says", "is_changed"), [(True, False), (False, True)])
def test_a_pass_that_lies(says, is_changed):
    after = {"weight": 2 if is_changed else 1}
    with pytest.raises(VerificationError, match="does not say truly") as caught:
        check_declared(Exact(), PassResult(modified=says), {"weight": 1}, after, "mine, segment 3")
    assert "where: mine, segment 3" in str(caught.value)
    assert f"modified={says}, changed: {'weight' if is_changed else 'nothing'}" in str(caught.value)


@pytest.mark.parametrize("after", [{}, {"node": 1, "more": 1}, {"node": 2}])
def test_what_counts_as_a_change(after):
    check_declared(Exact(), PassResult(modified=True), {"node": 1}, after, "mine")
    with pytest.raises(VerificationError, match="does not say truly"):
        check_declared(Exact(), PassResult(modified=False), {"node": 1}, after, "mine")
    with pytest.raises(VerificationError, match="declared an analysis changed the graph"):
        check_declared(Analysis(), PassResult(modified=True), {"node": 1}, after, "mine")


def test_an_analysis_that_changes_nothing():
    check_declared(Analysis(), PassResult(modified=False), {"node": 1}, {"node": 1}, "mine")


@pytest.mark.parametrize("width", [1, 100])
def test_how_exact_is_exact(width):
    limit = 64 * 2**-23 * width**0.5
    before = torch.tensor([1.0, -4.0, 0.0])
    for share, is_right in ((0.5, True), (2.0, False)):
        after = before + torch.tensor([0.0, 0.0, 4 * share * limit])
        if is_right:
            check_exact([before], [after], width, "mine")
        else:
            with pytest.raises(
                VerificationError, match=r"declared exact changed what the model computes\n  where: mine"
            ):
                check_exact([before], [after], width, "mine")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
        (torch.ones(3), torch.tensor([1.0, float("inf"), 1.0])),
        (torch.ones(3), torch.ones(1, 3)),
        (torch.zeros(3), torch.full((3,), 1e-3)),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.tensor([3, 4]), torch.tensor([3, 5])),
    ],
    ids=["nan", "nan before", "inf", "shape", "zero", "bool", "int"],
)
def test_what_is_not_exact(before, after):
    with pytest.raises(VerificationError, match="changed what the model computes"):
        check_exact([torch.ones(1), before], [torch.ones(1), after], 1, "mine")


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.tensor([True, False]), torch.tensor([3, 4]), torch.empty(1)[:0]]
)
def test_what_is_exact(value):
    check_exact([value], [value.clone()], 1, "mine")
