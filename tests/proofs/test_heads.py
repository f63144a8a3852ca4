"""Heads of values that may be rotated, found in graphs of several families; and who stands in the way, by name."""

import pytest
import torch

from qcompiler.proofs.heads import find_heads
from tests.models import canonical_graph, copy_graph

aten, canonical = torch.ops.aten, torch.ops.qcompiler


@pytest.mark.parametrize(
    ("family", "heads", "first"),
    [
        ("llama", 2, [0, 8]),
        ("gpt2", 4, [64, 72, 80, 88]),  # q, k and v one behind the other
        ("gpt_neox", 4, [16, 40, 64, 88]),  # q, k and v of each head together
        ("phi3", 2, [48, 56]),
    ],
)
def test_heads_of_values(family, heads, first):
    found, refused = find_heads(canonical_graph(family))
    assert not refused
    assert len(found) == 2
    for item in found:
        assert item.rows.shape == (heads, 8)
        assert sorted(item.rows[:, 0].tolist()) == first
        assert torch.equal(item.rows - item.rows[:, :1], torch.arange(8).expand(heads, 8))
        assert len(item.outputs) == 1


def test_values_that_are_clamped_are_no_heads():
    assert find_heads(canonical_graph("olmo"))[0] == []


def test_an_output_projection_that_reads_more_than_whole_heads():
    graph = copy_graph(canonical_graph("llama"))
    (attention, *_) = (node for node in graph.fx.nodes if node.target == canonical.attention.default)
    with graph.fx.inserting_after(attention):
        scaled = graph.fx.call_function(aten.relu.default, (attention,))
    scaled.meta.update(attention.meta)
    attention.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    found, (refused,) = find_heads(graph)
    assert [item.values.name for item in found] == ["model.layers.1.self_attn.v_proj"]
    assert refused.where == "model.layers.0.self_attn.v_proj"
    assert "relu" in refused.reason
