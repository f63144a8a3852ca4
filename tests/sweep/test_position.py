"""Batches inside one segment: what is run, what statistics see, and what a rewrite takes back."""

import pytest
import torch

from qcompiler.ir.segments import segment_graph
from qcompiler.ir.walks import descendants
from qcompiler.protocol.pass_base import Tap
from qcompiler.protocol.statistics import AbsMax
from qcompiler.sweep.position import Frontier, Position, SweepContext, original_name
from qcompiler.sweep.value_store import ValueStore
from tests.tiny_graphs import input_batches, interpret, residual_mlp

CPU = torch.device("cpu")


@pytest.fixture
def graph():
    return residual_mlp()


@pytest.fixture
def store(tmp_path):
    store = ValueStore(1 << 20, tmp_path)
    yield store
    store.close()


def at_start(graph, store, *, probes=0):
    (segment, *_) = segment_graph(graph).segments
    batches = input_batches(graph)
    context = SweepContext(graph, CPU, store, batches, probes, False, lambda batch: dict(batch))
    return Position(context, segment, Frontier.of_inputs(context)), segment, batches


def largest(graph, batches, value):
    return torch.stack([interpret(graph, batch)[value.name].abs().amax(0) for batch in batches]).amax(0)


def test_what_is_gathered_is_what_the_graph_computes(graph, store):
    position, segment, batches = at_start(graph, store)
    tap = Tap(segment.outputs[0], AbsMax)
    found = position.gather([tap], [], [segment.sites])
    assert torch.allclose(found[tap].result(), largest(graph, batches, tap.value))
    frontier = position.finish()
    assert not frontier.is_forked
    assert not frontier.executed
    assert len(frontier.working) == len(batches)
    assert frontier.alive() == set(segment.outputs)


def test_no_statistic_sees_a_probe(graph, store):
    position, segment, batches = at_start(graph, store, probes=2)
    tap = Tap(segment.sites[0].inputs[0], AbsMax)
    found = position.gather([tap], [], [segment.sites])
    assert torch.equal(found[tap].result(), largest(graph, batches[2:], tap.value))


def test_a_rewrite_behind_is_run_again(graph, store):
    position, segment, batches = at_start(graph, store)
    position.keep_start = True
    first, tap = segment.sites[0], Tap(segment.outputs[0], AbsMax)
    before = position.gather([tap], [], [segment.sites])[tap].result()
    graph.weights.set(first.weight, 2 * graph.weights.read(first.weight))
    position.rewind_if_executed([first], upstream=False)
    after = position.gather([tap], [], [segment.sites])[tap].result()
    assert not torch.allclose(before, after)
    assert torch.allclose(after, largest(graph, batches, tap.value))


def test_the_probe_sees_the_segment_as_it_is(graph, store):
    position, segment, batches = at_start(graph, store, probes=1)
    expected = [interpret(graph, batches[0])[node.name] for node in segment.outputs]
    assert all(torch.allclose(a, b) for a, b in zip(position.probe_outputs(), expected, strict=True))
    site = segment.sites[0]
    graph.weights.set(site.weight, 2 * graph.weights.read(site.weight))
    assert not any(torch.allclose(a, b) for a, b in zip(position.probe_outputs(), expected, strict=True))


def test_abandoned_values_are_freed(graph, store):
    position, segment, _ = at_start(graph, store)
    position.gather([Tap(segment.sites[-1].inputs[0], AbsMax)], [], [segment.sites])
    assert position.abandon() == Frontier([], [])
    assert store._held == 0


def test_the_name_of_the_original(graph):
    site = graph.sites()[0]
    assert original_name(site) not in graph.weights
    assert original_name(site).startswith(site.weight)


def test_descendants(graph):
    (source, *_), last = graph.inputs, graph.outputs[0]
    assert last in descendants([source])
    assert descendants([last]) == {last, graph.fx.output_node()}
