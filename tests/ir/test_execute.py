"""Stretches run what is needed, in order, and free what is not needed any more."""

import weakref

import pytest
import torch
from torch import fx

from qcompiler.ir.execute import Stretch

aten = torch.ops.aten
CPU = torch.device("cpu")


@pytest.fixture
def graph():
    """``y = x * (w + w); z = y + x``; ``unused = -y``."""
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    w = nodes.create_node("get_attr", "w")
    double = nodes.call_function(aten.add.Tensor, (w, w))
    y = nodes.call_function(aten.mul.Tensor, (x, double))
    unused = nodes.call_function(aten.neg.default, (y,))
    z = nodes.call_function(aten.add.Tensor, (y, x))
    nodes.output((z,))
    return nodes, {"x": x, "w": w, "double": double, "y": y, "unused": unused, "z": z}


def test_runs_what_is_needed(graph):
    nodes, named = graph
    stretch = Stretch(nodes.nodes, [named["z"]])
    assert stretch.nodes == [named["y"], named["z"]]
    assert stretch.inputs == [named["x"]]
    loaded = stretch.load({"w": torch.tensor(3.0)}.__getitem__, CPU)
    assert stretch.run({named["x"]: torch.tensor(2.0)}, loaded, CPU) == {named["z"]: torch.tensor(14.0)}


def test_expressions_of_weights_are_computed_once(graph):
    nodes, named = graph
    stretch = Stretch(nodes.nodes, [named["z"]])
    reads = []

    def fetch(name):
        reads.append(name)
        return torch.tensor(3, dtype=torch.bfloat16)

    loaded = stretch.load(fetch, CPU)
    assert loaded == {named["double"]: torch.tensor(6.0)}
    assert loaded[named["double"]].dtype == torch.float32
    for value in (1.0, 2.0):
        stretch.run({named["x"]: torch.tensor(value)}, loaded, CPU)
    assert reads == ["w"]


def test_integers_stay_integers(graph):
    nodes, named = graph
    stretch = Stretch(nodes.nodes, [named["double"]])
    loaded = stretch.load({"w": torch.tensor(3, dtype=torch.int8)}.__getitem__, CPU)
    assert stretch.run({}, loaded, CPU)[named["double"]].dtype == torch.int8


def test_starts_in_the_middle(graph):
    _, named = graph
    stretch = Stretch([named["z"]], [named["z"], named["x"]])
    assert stretch.inputs == [named["y"], named["x"]]
    values = {named["y"]: torch.tensor(5.0), named["x"]: torch.tensor(1.0), named["unused"]: torch.tensor(0.0)}
    assert stretch.run(values, {}, CPU) == {named["z"]: torch.tensor(6.0), named["x"]: torch.tensor(1.0)}


def test_weights_may_stand_before_the_stretch(graph):
    _, named = graph
    stretch = Stretch([named["double"], named["y"]], [named["y"]])
    loaded = stretch.load({"w": torch.tensor(3.0)}.__getitem__, CPU)
    assert stretch.run({named["x"]: torch.tensor(2.0)}, loaded, CPU)[named["y"]] == 12


def test_values_are_freed_after_their_last_use():
    seen = []

    def make(x):
        y = x + 1
        seen.append(weakref.ref(y))
        return y

    def check(x):
        seen.append(sum(reference() is not None for reference in seen))
        return x + 1

    nodes = fx.Graph()
    x = nodes.placeholder("x")
    first = nodes.call_function(make, (x,))
    second = nodes.call_function(make, (first,))
    third = nodes.call_function(check, (second,))
    nodes.output((third,))
    assert Stretch(nodes.nodes, [third]).run({x: torch.zeros(1)}, {}, CPU)[third] == 3
    assert seen[2] == 1  # the first is gone while the last runs


def test_no_gradients_and_the_given_device():
    nodes = fx.Graph()
    x = nodes.placeholder("x")
    made = nodes.call_function(aten.arange.default, (3,))
    total = nodes.call_function(aten.add.Tensor, (x, made))
    nodes.output((total,))
    x_value = torch.zeros(3, requires_grad=True)
    assert not Stretch(nodes.nodes, [total]).run({x: x_value}, {}, CPU)[total].requires_grad
    meta = torch.device("meta")
    assert Stretch(nodes.nodes, [total]).run({x: x_value.to(meta)}, {}, meta)[total].device == meta


def test_nodes_passed_through(graph):
    nodes, named = graph
    stretch = Stretch(nodes.nodes, [named["y"], named["z"]])
    loaded = stretch.load({"w": torch.tensor(3.0)}.__getitem__, CPU)
    values = stretch.run({named["x"]: torch.tensor(2.0)}, loaded, CPU, {named["y"]})
    assert values == {named["y"]: torch.tensor(2.0), named["z"]: torch.tensor(4.0)}


def test_values_given_instead_of_being_computed(graph):
    nodes, named = graph
    stretch = Stretch(nodes.nodes, [named["y"], named["z"]])
    loaded = stretch.load({"w": torch.tensor(3.0)}.__getitem__, CPU)
    values = stretch.run({named["x"]: torch.tensor(2.0)}, loaded, CPU, fixed={named["y"]: torch.tensor(5.0)})
    assert values == {named["y"]: torch.tensor(5.0), named["z"]: torch.tensor(7.0)}
