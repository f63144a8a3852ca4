"""Rotated weights: the model computes what it did, from other numbers."""

import pytest
import torch

from qcompiler.ir.graph import Graph, is_op
from qcompiler.numerics.hadamard import hadamard_matrix
from qcompiler.proofs.fold_rotations import (
    Rotation,
    rotate_heads,
    rotate_input,
    rotate_stream,
)
from qcompiler.proofs.heads import find_heads
from qcompiler.proofs.streams import find_streams, online_inputs
from qcompiler.storage.stored_tensor import Deferred
from tests.models import (
    VOCABULARY,
    canonical_graph,
    copy_graph,
    language_inputs,
    padding_mask,
    run,
    tolerance,
)

canonical = torch.ops.qcompiler
FAMILIES = ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "mixtral", "granite"]


def logits(graph: Graph) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    return run(graph, **language_inputs(graph, ids, padding_mask(2, 9, "left")))["logits"]


def some(width: int) -> Rotation:
    return Rotation.random(width, torch.Generator().manual_seed(3))


def test_a_rotation_is_orthogonal_and_of_random_signs():
    rotation = some(24)
    matrix = rotation(torch.eye(24))
    assert torch.allclose(matrix @ matrix.T, torch.eye(24), atol=1e-6)
    assert torch.equal(matrix.sign(), rotation.signs[:, None] * hadamard_matrix(24))
    assert sorted(set(rotation.signs.tolist())) == [-1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_stream_computes_the_same(family):
    graph = copy_graph(canonical_graph(family))
    before = {name: graph.weights.read(name) for name in graph.weight_names()}
    expected = logits(graph)
    (stream,), _ = find_streams(graph)
    rotate_stream(graph, stream, some(stream.width))
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)
    for writer in stream.writers:
        assert not torch.allclose(graph.weights.read(writer.weight), before[writer.weight], atol=1e-2)
    for reader in stream.readers:
        assert not torch.allclose(graph.weights.read(reader.site.weight), before[reader.site.weight], atol=1e-2)
    for norm in stream.norms:
        assert is_op(norm, canonical.rms_norm.default)
        assert torch.equal(graph.weights.read(norm.args[1].target), torch.ones(32))
    assert not any(is_op(node, canonical.layer_norm.default) for node in graph.fx.nodes)


def test_weights_are_computed_when_they_are_read():
    graph = copy_graph(canonical_graph("llama"))
    (stream,), _ = find_streams(graph)
    rotate_stream(graph, stream, some(stream.width))
    for name in graph.weight_names():
        if "proj" in name or "embed" in name or "head" in name:
            assert isinstance(graph.weights.version(name).source, Deferred)
            assert graph.source_dtype(name) == "float32"


def test_the_stream_itself_is_rotated():
    graph = copy_graph(canonical_graph("gpt2"))
    table = graph.weights.read("transformer.wte.weight")
    (stream,), _ = find_streams(graph)
    rotation = some(32)
    assert rotate_stream(graph, stream, rotation) == ["transformer.wte.weight"]
    centered = table - table.mean(-1, keepdim=True)
    matrix = rotation.signs[:, None] * hadamard_matrix(32) / 32**0.5
    assert torch.allclose(graph.weights.read("transformer.wte.weight"), centered @ matrix, atol=1e-5)
    assert not graph.weights.tied("lm_head.weight")
    assert graph.sites()[-1].bias == "lm_head.bias"  # that of the last norm


def test_a_table_of_the_same_name_as_an_output_projection():
    graph = copy_graph(canonical_graph("llama"))
    (head,) = (node for node in graph.fx.nodes if node.target == "lm_head.weight")
    (table,) = (node for node in graph.fx.nodes if node.target == "model.embed_tokens.weight")
    head.replace_all_uses_with(table)
    graph.fx.erase_node(head)
    expected = logits(graph)
    (stream,), _ = find_streams(graph)
    assert rotate_stream(graph, stream, some(32)) == ["model.embed_tokens.weight"]
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)
    names = graph.weight_names()
    assert "model.embed_tokens.weight.table" in names
    assert graph.sites()[-1].name == "model.embed_tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_heads_compute_the_same(family):
    graph = copy_graph(canonical_graph(family))
    expected = logits(graph)
    found, _ = find_heads(graph)
    assert len(found) == 2
    for heads in found:
        before = graph.weights.read(heads.values.weight)
        rotate_heads(graph, heads, some(heads.rows.shape[1]))
        after = graph.weights.read(heads.values.weight)
        touched = torch.zeros(len(before), dtype=torch.bool)
        touched[heads.rows.reshape(-1)] = True
        assert torch.equal(after[~touched], before[~touched])
        assert not torch.allclose(after[touched], before[touched], atol=1e-2)
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)


def test_inputs_rotated_at_run_time():
    graph = copy_graph(canonical_graph("qwen2"))
    expected = logits(graph)
    for value, sites in online_inputs(graph, graph.sites()).items():
        rotated = rotate_input(graph, value, sites, 48)
        assert rotated.meta["shape"] == value.meta["shape"]
        assert all(node.args[0] is rotated for site in sites for node in site.nodes)
    assert sum(is_op(node, canonical.hadamard.default) for node in graph.fx.nodes) == 2
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_together_and_blocks(family):
    graph = copy_graph(canonical_graph(family))
    expected = logits(graph)
    (stream,), _ = find_streams(graph)
    heads, _ = find_heads(graph)
    rotate_stream(graph, stream, Rotation(some(32).signs, 8))
    for item in heads:
        rotate_heads(graph, item, some(8))
    for value, sites in online_inputs(graph, graph.sites()).items():
        rotate_input(graph, value, sites, 4)
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)
