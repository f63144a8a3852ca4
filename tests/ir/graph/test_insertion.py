"""An operator put between a value and what reads it: what fits is checked at once, and nothing changes otherwise."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qcompiler.errors import ArtifactError, PipelineError, QCompilerError, WeightError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import Graph, is_op
from qcompiler.numerics.scheme import Scheme
from tests.models import canonical_graph, copy_graph, run
from tests.tiny_graphs import language_model, residual_mlp

aten, canonical = torch.ops.aten, torch.ops.qcompiler
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Fork(nn.Module):
    """``relu(x)`` is read by two layers, and returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(x)
        return self.a(y), self.b(y), y


@pytest.fixture
def graph() -> Graph:
    return canonicalize(capture_module(Fork().eval(), (X,)))


def relu(graph: Graph) -> fx.Node:
    (found,) = (node for node in graph.fx.nodes if is_op(node, aten.relu.default))
    return found


def layers(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.fx.nodes if is_op(node, canonical.linear.default)]


def results(graph: Graph) -> list[Tensor]:
    return list(run(graph, **{graph.inputs[0].name: X}).values())


def test_the_readers_alone_read_what_is_inserted(graph: Graph) -> None:
    first, second = layers(graph)
    before = results(graph)
    node = graph.insert(canonical.hadamard.default, relu(graph), [first], 8)
    graph.fx.lint()
    assert node.next is first
    assert (node.meta["dtype"], node.meta["shape"]) == (torch.float32, relu(graph).meta["shape"])
    assert first.args[0] is node
    assert second.args[0] is relu(graph)
    after = results(graph)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    weight, bias = (graph.weights.read(f"a.{part}") for part in ("weight", "bias"))
    torch.testing.assert_close(after[0], canonical.hadamard(torch.relu(X), 8) @ weight.T + bias)


def test_readers_may_come_in_any_order_and_twice(graph: Graph) -> None:
    first, second = layers(graph)
    node = graph.insert(aten.neg.default, relu(graph), [second, first, second, graph.fx.output_node()])
    graph.fx.lint()
    assert node.next is first
    assert list(node.users) == [first, second, graph.fx.output_node()]
    assert results(graph)[2].max() <= 0


def test_tensors_are_stored_and_saved(graph: Graph) -> None:
    scale = torch.rand(8) + 1
    node = graph.insert(aten.mul.Tensor, relu(graph), layers(graph), tensors={"a.scale": scale})
    expected = results(graph)
    assert torch.equal(graph.weights.read("a.scale"), scale)
    assert [source.name for source in node.all_input_nodes] == [relu(graph).name, "a_scale"]
    again = Graph.from_dict(json.loads(json.dumps(graph.to_dict())), graph.weights, {})
    assert all(torch.equal(*pair) for pair in zip(results(again), expected, strict=True))


def test_arguments_stand_in_their_places(graph: Graph) -> None:
    value = relu(graph)
    tensors = {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    node = graph.insert(canonical.layer_norm.default, value, layers(graph), tensors=tensors, eps=1e-6)
    assert len(node.args) == 4
    assert (node.args[3], node.kwargs) == (1e-6, {})
    node = graph.insert(aten.add.Tensor, value, [node], value, alpha=0.5)
    assert (node.args, node.kwargs) == ((value, value), {"alpha": 0.5})
    node = graph.insert(canonical.layer_norm.default, value, [node], weight=None, bias=None, eps=0.5)
    assert node.args == (value, None, None, 0.5)


def test_a_shape_may_change_where_the_reader_takes_it() -> None:
    graph = copy_graph(canonical_graph("llama"))
    reader = next(node for node in graph.fx.nodes if is_op(node, aten.reshape.default))
    value = reader.args[0]
    assert isinstance(value, fx.Node)
    node = graph.insert(aten.unsqueeze.default, value, [reader], 0)
    assert node.meta["shape"] == (1, *value.meta["shape"])
    assert node.meta["shape"][1:3] == ("batch", "sequence")


def test_graphs_that_say_nothing_of_their_nodes() -> None:
    graph = language_model()
    site = next(site for site in graph.sites() if site.name == "1.down")
    node = graph.insert(canonical.hadamard.default, site.inputs[0], site.nodes, 32)
    assert node.meta == {"dtype": torch.float32, "shape": ("batch", "sequence", 32)}


def test_a_linear_layer_is_a_site(graph: Graph) -> None:
    weight = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    graph.schemes = {"a": Scheme.parse("w4a16"), "b": Scheme.parse("w4a16")}
    node = graph.insert(canonical.linear.default, relu(graph), layers(graph), tensors={"turn.weight": weight})
    assert [(site.name, site.nodes) for site in graph.sites()][:1] == [("turn", (node,))]
    assert graph.schemes["turn"] == Scheme()
    torch.testing.assert_close(
        results(graph)[1], (torch.relu(X) @ weight.T) @ graph.weights.read("b.weight").T + graph.weights.read("b.bias")
    )


MISTAKES: dict[str, tuple[type[QCompilerError], str, Any]] = {
    "a packet": (PipelineError, "one overload", lambda g: g.insert(canonical.hadamard, relu(g), layers(g), 8)),
    "a function": (PipelineError, "one overload", lambda g: g.insert(torch.neg, relu(g), layers(g))),
    "writes": (ArtifactError, "cannot be stored", lambda g: g.insert(aten.neg_.default, relu(g), layers(g))),
    "elsewhere": (
        ArtifactError,
        "cannot be stored",
        lambda g: g.insert(torch.ops.prims.neg.default, relu(g), layers(g)),
    ),
    "an object": (ArtifactError, "cannot be stored", lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), object())),
    "a tensor as argument": (
        ArtifactError,
        "cannot be stored",
        lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), torch.ones(8)),
    ),
    "several results": (
        PipelineError,
        "gives one tensor",
        lambda g: g.insert(aten.topk.default, relu(g), layers(g), 2),
    ),
    "a stored value": (
        PipelineError,
        "computes or is given",
        lambda g: g.insert(aten.neg.default, layers(g)[0].args[1], layers(g)[:1]),
    ),
    "another graph": (
        PipelineError,
        "computes or is given",
        lambda g: g.insert(aten.neg.default, residual_mlp().inputs[0], layers(g)),
    ),
    "a name as value": (PipelineError, "computes or is given", lambda g: g.insert(aten.neg.default, "relu", layers(g))),
    "no readers": (PipelineError, "ahead of readers", lambda g: g.insert(aten.neg.default, relu(g), [])),
    "a foreign reader": (
        PipelineError,
        "no node of this graph",
        lambda g: g.insert(aten.neg.default, relu(g), residual_mlp().outputs),
    ),
    "not a reader": (
        PipelineError,
        "does not read the value",
        lambda g: g.insert(aten.neg.default, g.inputs[0], layers(g)),
    ),
    "ahead": (PipelineError, "ahead of the value", lambda g: g.insert(aten.neg.default, layers(g)[0], [relu(g)])),
    "itself": (PipelineError, "ahead of the value", lambda g: g.insert(aten.neg.default, relu(g), [relu(g)])),
    "a late argument": (
        PipelineError,
        "not computed ahead",
        lambda g: g.insert(aten.add.Tensor, relu(g), layers(g)[:1], layers(g)[1]),
    ),
    "no such argument": (
        PipelineError,
        "no such argument",
        lambda g: g.insert(canonical.hadamard.default, relu(g), layers(g), size=8),
    ),
    "a missing argument": (
        PipelineError,
        "is missing",
        lambda g: g.insert(canonical.layer_norm.default, relu(g), layers(g), eps=1e-6),
    ),
    "too few": (PipelineError, "does not take", lambda g: g.insert(canonical.hadamard.default, relu(g), layers(g))),
    "no such matrix": (
        PipelineError,
        "does not take",
        lambda g: g.insert(canonical.hadamard.default, relu(g), layers(g), 3),
    ),
    "a scale of another width": (
        PipelineError,
        "does not take",
        lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), tensors={"s": torch.ones(7)}),
    ),
    "too narrow for the reader": (
        PipelineError,
        "does not take",
        lambda g: g.insert(aten.narrow.default, relu(g), layers(g), -1, 0, 4),
    ),
    "another result": (
        PipelineError,
        "something else",
        lambda g: g.insert(aten.unsqueeze.default, relu(g), layers(g), 0),
    ),
    "another dtype": (
        PipelineError,
        "something else",
        lambda g: g.insert(aten.to.dtype, relu(g), [g.fx.output_node()], torch.float16),
    ),
    "another port": (
        PipelineError,
        "something else",
        lambda g: g.insert(aten.t.default, relu(g), [g.fx.output_node()]),
    ),
    "a name that is taken": (
        WeightError,
        "is taken",
        lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), tensors={"a.bias": torch.ones(8)}),
    ),
    "no tensor": (
        WeightError,
        "is a tensor",
        lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), tensors={"s": [1.0] * 8}),
    ),
    "a tensor that no file takes": (
        WeightError,
        "dtype",
        lambda g: g.insert(aten.mul.Tensor, relu(g), layers(g), tensors={"s": torch.ones(8, dtype=torch.complex64)}),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_does_not_fit_is_refused_and_leaves_all_as_it_was(graph: Graph, name: str) -> None:
    kind, message, mistake = MISTAKES[name]
    nodes, names = str(graph.fx), graph.weights.names()
    with pytest.raises(kind, match=message) as caught:
        mistake(graph)
    assert type(caught.value) is kind
    assert str(graph.fx) == nodes
    assert graph.weights.names() == names
    graph.fx.lint()
