"""Cuts lie on the residual stream; segments one after another compute what the whole graph computes."""

import pytest
import torch
from torch import nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir import segments
from qcompiler.ir.execute import Stretch
from qcompiler.ir.feeding import feed, feed_tensors
from qcompiler.ir.graph import is_op
from qcompiler.ir.segments import segment_graph
from tests.models import FAMILIES, VOCABULARY, canonical_graph, copy_graph

CPU = torch.device("cpu")
aten = torch.ops.aten


def waves(segment):
    return [[site.name.split(".")[-1] for site in wave] for wave in segment.waves()]


LLAMA = [[], [["q_proj", "k_proj", "v_proj"], ["o_proj"]], [["gate_proj", "up_proj"], ["down_proj"]]]
EXPECTED = {
    "llama": [*LLAMA, *LLAMA[1:], [["lm_head"]]],
    "gpt2": [[], *[[["c_attn"], ["c_proj"]], [["c_fc"], ["c_proj"]]] * 2, [["lm_head"]]],
    "bert": [
        [],  # the word embedding
        [],  # the token types'
        *[[["query", "key", "value"], ["dense"]], [["dense"], ["dense"]]] * 2,
        [["dense"]],
        [["decoder"]],
    ],
}


@pytest.mark.parametrize("family", EXPECTED)
def test_segments_and_waves(family):
    cut = segment_graph(canonical_graph(family))
    assert [waves(segment) for segment in cut.segments] == EXPECTED[family]
    assert [segment.index for segment in cut.segments] == list(range(len(cut.segments)))
    assert all(len(segment.outputs) == 1 for segment in cut.segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_in_one_segment(family):
    graph = canonical_graph(family)
    names = [site.name for segment in segment_graph(graph).segments for site in segment.sites]
    assert names == [site.name for site in graph.sites()]


def test_the_embedding_is_alone():
    first = segment_graph(canonical_graph("llama")).segments[0]
    assert [node.target for node in first.nodes() if node.op == "call_function"] == [aten.embedding.default]


def test_the_prologue_is_what_no_token_changes():
    graph = canonical_graph("llama")
    cut = segment_graph(graph)
    targets = {node.target for node in cut.prologue}
    assert {aten.cos.default, aten.sin.default, aten.sym_size.int} <= targets
    assert aten.embedding.default not in targets
    attention = [node for node in graph.fx.nodes if is_op(node, torch.ops.qcompiler.attention.default)]
    assert all(node.args[3] in cut.prologue for node in attention)
    assert not any(node in cut.prologue for segment in cut.segments for node in segment.nodes())


def in_segments(graph, values):
    """The results computed segment by segment; each sees only the inputs, the prologue and what segments pass on."""
    cut = segment_graph(graph)
    prologue = Stretch(graph.fx.nodes, cut.prologue)
    outside = {**values, **prologue.run(values, prologue.load(graph.weights.read, CPU), CPU)}
    passed, results = {}, {}
    for segment in cut.segments:
        stretch = Stretch(segment.nodes(), segment.outputs)
        passed = stretch.run({**outside, **passed}, stretch.load(graph.weights.read, CPU), CPU)
        results.update(passed)
    return [results[node] for node in graph.outputs if node in results]


def at_once(graph, values):
    stretch = Stretch(graph.fx.nodes, graph.outputs)
    computed = stretch.run(values, stretch.load(graph.weights.read, CPU), CPU)
    return [computed[node] for node in graph.outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_after_another_equals_the_whole(family):
    graph = canonical_graph(family)
    values = feed(graph, torch.randint(VOCABULARY, (2, 9)))
    (logits,) = in_segments(graph, values)
    torch.testing.assert_close(logits, at_once(graph, values)[0], rtol=0, atol=0)


def plain(model, *examples):
    return canonicalize(capture_module(model.eval(), examples))


def test_a_chain():
    graph = plain(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(3, 4)
    )
    cut = segment_graph(graph)
    assert [[site.name for site in segment.sites] for segment in cut.segments] == [["0"], ["2"], ["4"]]
    values = feed_tensors(graph, [torch.randn(5, 4)])
    torch.testing.assert_close(in_segments(graph, values), at_once(graph, values), rtol=0, atol=0)


def test_what_is_put_before_a_segment_s_first_node_belongs_to_it():
    graph = plain(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.ones(3, 4))
    segments = segment_graph(graph).segments
    for segment, site in zip(segments, graph.sites(), strict=True):
        (linear,) = site.nodes
        with graph.fx.inserting_before(linear):
            doubled = graph.fx.call_function(aten.mul.Tensor, (linear.args[0], 2.0))
        linear.update_arg(0, doubled)
        assert doubled in segment.nodes()
    assert len({node for segment in segments for node in segment.nodes()}) == sum(len(s.nodes()) for s in segments)


class Looped(nn.Module):
    """A layer used twice, with others between and around its uses."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.between, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = self.again(self.first(x)).relu()
        return self.last(self.again(self.between(x).relu()))


def test_no_cut_between_two_uses_of_a_layer():
    graph = plain(Looped(), torch.ones(3, 4))
    cut = segment_graph(graph)
    assert [[site.name for site in s.sites] for s in cut.segments] == [["first"], ["again", "between"], ["last"]]
    assert [[site.name for site in wave] for wave in cut.segments[1].waves()] == [["between"], ["again"]]
    values = feed_tensors(graph, [torch.randn(5, 4)])
    torch.testing.assert_close(in_segments(graph, values), at_once(graph, values), rtol=0, atol=0)


class Several(nn.Module):
    """Two results, and a layer that no input reaches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.table = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.a(x) + self.table(torch.arange(4.0))
        return self.b(y), self.c(y.relu())


def test_layers_behind_every_result_and_before_every_input_are_covered():
    graph = plain(Several(), torch.ones(3, 4))
    cut = segment_graph(graph)
    assert sorted(site.name for s in cut.segments for site in s.sites) == ["a", "b", "c", "table"]
    values = feed_tensors(graph, [torch.randn(5, 4)])
    torch.testing.assert_close(in_segments(graph, values), at_once(graph, values), rtol=0, atol=0)


def test_a_model_without_layers():
    graph = plain(nn.ReLU(), torch.ones(3, 4))
    (segment,) = segment_graph(graph).segments
    assert (segment.sites, segment.waves()) == ((), [])


def test_segments_outlive_a_rewrite():
    graph = copy_graph(canonical_graph("llama"))
    segments = segment_graph(graph).segments
    before = [node for node in segments[1].nodes() if node.op == "call_function"]
    site = segments[1].sites[0]
    node = site.nodes[0]
    with graph.fx.inserting_after(node):
        doubled = graph.fx.call_function(aten.mul.Tensor, (node, 2.0))
    after = [node for node in segments[1].nodes() if node.op == "call_function"]
    assert [node for node in after if node is not doubled] == before
    assert doubled in after


def test_many_inputs_are_gathered_in_parts(monkeypatch):
    """A mixture of experts: the second moments of all experts' inputs need not be in memory together."""
    cut = segment_graph(canonical_graph("mixtral"))
    (segment,) = (s for s in cut.segments if any("layers.1.mlp.experts" in site.name for site in s.sites))
    whole = segment.waves()
    assert [len(wave) for wave in whole] == [1, 4, 4]  # what chooses; gate and up; down
    monkeypatch.setattr(segments, "_LARGEST_MOMENTS", 2 * 48 * 48)
    parts = segment.waves()
    assert [len(wave) for wave in parts] == [1, 4, 2, 2]
    assert [site for wave in parts for site in wave] == [site for wave in whole for site in wave]
    monkeypatch.setattr(segments, "_LARGEST_MOMENTS", 0)
    assert [len(wave) for wave in segment.waves()] == [1] * 9
    (attention,) = (s for s in cut.segments if any("layers.1.self_attn" in site.name for site in s.sites))
    assert [len(wave) for wave in attention.waves()] == [3, 1]  # those that read one value stay together
