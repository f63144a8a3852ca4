"""Rules fire at their anchors; where one does not fit, the reason is written down once."""

import pytest
import torch
from torch import fx

from qcompiler.frontend.pattern import (
    Miss,
    Rule,
    apply_rules,
    arguments,
    expect,
    is_weight,
    note,
    other_operand,
    replace,
)
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port, Signature
from qcompiler.storage.weights import WeightStore

aten = torch.ops.aten


@pytest.fixture
def graph():
    """``relu(relu(x)) * 2``."""
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    first = nodes.call_function(aten.relu.default, (x,))
    second = nodes.call_function(aten.relu.default, (first,))
    nodes.output((nodes.call_function(aten.mul.Tensor, (second, 2)),))
    for node in nodes.nodes:
        node.meta.update(dtype=torch.float32, shape=(3,))
    port = Port("x", "other", "float32", (3,))
    return Graph(nodes, Signature((port,), (port,)), WeightStore())


def targets(graph):
    return [node.target for node in graph.fx.nodes if node.op == "call_function"]


def to_neg(graph, node):
    replace(graph, node, aten.neg.default, node.args, marked=True)


def test_a_rule_fires_at_each_anchor(graph):
    apply_rules(graph, [Rule("neg", (aten.relu.default,), to_neg)])
    assert targets(graph) == [aten.neg.default, aten.neg.default, aten.mul.Tensor]
    assert graph.unrecognized == []
    node = next(node for node in graph.fx.nodes if node.target is aten.neg.default)
    assert node.meta == {"dtype": torch.float32, "shape": (3,), "marked": True}


def test_a_miss_is_noted_once_and_changes_nothing(graph):
    def miss(graph, node):
        raise Miss("not today")

    rules = [Rule("never", (aten.mul.Tensor,), miss)]
    apply_rules(graph, rules)
    apply_rules(graph, rules)
    assert graph.unrecognized == [{"node": "mul_tensor", "pattern": "never", "reason": "not today"}]
    assert targets(graph) == [aten.relu.default, aten.relu.default, aten.mul.Tensor]


def test_an_anchor_that_another_rewrite_took_along_is_passed_over(graph):
    def fuse(graph, node):
        (reader,) = node.users
        if reader.target is aten.relu.default:
            reader.replace_all_uses_with(node)
            graph.fx.erase_node(reader)

    apply_rules(graph, [Rule("fuse", (aten.relu.default,), fuse)])
    assert targets(graph) == [aten.relu.default, aten.mul.Tensor]


def test_arguments_left_out_are_filled_in(graph):
    (node,) = [node for node in graph.fx.nodes if node.target is aten.mul.Tensor]
    assert arguments(node, 1, "a", "b", "c") == (*node.args, "b", "c")
    assert arguments(node, 2) == node.args
    assert arguments(node, 2, 5) == (*node.args, 5)


def test_small_questions(graph):
    mul = graph.fx.output_node().args[0][0]
    relu = mul.args[0]
    assert expect(relu, aten.relu.default, aten.mul.Tensor, what="a relu") is relu
    with pytest.raises(Miss, match=r"expected a sine, found aten\.relu"):
        expect(relu, aten.sin.default, what="a sine")
    with pytest.raises(Miss, match="expected a sine, found 2"):
        expect(2, aten.sin.default, what="a sine")
    assert other_operand(mul, relu) == 2
    assert other_operand(mul, 2) is relu
    assert not is_weight(relu)
    assert is_weight(graph.fx.create_node("get_attr", "w"))
    note(graph, relu, "p", "r")
    assert graph.unrecognized == [{"node": relu.name, "pattern": "p", "reason": "r"}]
