"""A graph run segment by segment gives what it gives as a whole, with few weights in memory."""

import sys

import pytest
import torch

from qcompiler.ir.execute import Stretch
from qcompiler.ir.feeding import feed
from qcompiler.ir.run_by_segments import results_of, run_by_segments
from qcompiler.ir.segments import segment_graph
from tests.models import DECODERS, VOCABULARY, canonical_graph, copy_graph, language_inputs, padding_mask, run

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", DECODERS)
def test_the_same_values_as_at_once(family):
    graph = canonical_graph(family)
    ids = torch.randint(VOCABULARY, (2, 7))
    expected = run(graph, **language_inputs(graph, ids, padding_mask(2, 7, "none")))["logits"]
    (logits,) = next(run_by_segments(graph, [[feed(graph, ids)]], CPU, results_of(graph)))  # and no caches
    assert torch.equal(logits, expected)


def test_weights_are_read_segment_by_segment(monkeypatch):
    graph = copy_graph(canonical_graph("llama"))
    loads: list[set[str]] = []

    class Spy(Stretch):
        def load(self, fetch, device):
            names = set()
            loads.append(names)
            return super().load(lambda name: names.add(name) or fetch(name), device)

    monkeypatch.setattr(sys.modules["qcompiler.ir.run_by_segments"], "Stretch", Spy)  # the name is the function's, too
    next(run_by_segments(graph, [[feed(graph, torch.zeros(1, 3, dtype=torch.int64))]], CPU, results_of(graph)))
    assert len(loads) == 1 + len(segment_graph(graph).segments)
    assert [sum("down_proj" in name for name in names) for names in loads if names].count(1) == 2
    assert max(sum("proj" in name for name in names) for names in loads) < 7  # of the 14 in two layers
