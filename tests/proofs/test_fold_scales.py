"""Scales folded into weights: what moves where, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph
from qcompiler.proofs.fold_scales import (
    consumer_scale,
    fold_scale,
    input_factors,
    per_channel,
)
from qcompiler.proofs.region import Region
from qcompiler.proofs.regions import find_regions
from tests.models import canonical_form, canonical_graph, copy_graph, module


def grouped() -> Region:
    """Values of 2 heads of 8 channels, read by a layer with 4 query heads: two of its columns share every scale."""
    return next(r for r in find_regions(canonical_graph("llama")).found if r.consumers[0].site.name.endswith("o_proj"))


def half_free() -> Graph:
    """A layer with 8 outputs of which the last 4 may be scaled, read by one with 4 inputs."""
    random = torch.Generator().manual_seed(3)
    parameters = {"a": (8, 8), "bias": (8,), "b": (6, 4)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in parameters.items()}

    def body(m, x):
        gate, up = F.linear(x, m.a, m.bias).split(4, -1)
        return F.linear(gate.sigmoid() * up, m.b)

    return canonical_form(module(body, **tensors), torch.randn(3, 8, generator=random))


def test_rows_bias_and_columns():
    graph = half_free()
    (region,) = find_regions(graph).found
    before = {name: graph.weights.read(name) for name in graph.weight_names()}
    scale = torch.tensor([2.0, 0.5, 4.0, 0.25])
    fold_scale(graph, region, scale)
    rows = torch.cat([torch.ones(4), scale])
    assert torch.equal(graph.weights.read("a"), before["a"] / rows[:, None])
    assert torch.equal(graph.weights.read("bias"), before["bias"] / rows)
    assert torch.equal(graph.weights.read("b"), before["b"] * scale)
    (consumer,) = region.consumers
    assert torch.equal(consumer_scale(region, consumer, scale), scale)
    (site,) = (site for site in graph.sites() if site.name == "b")
    (factor,) = input_factors(region, scale).items()
    assert factor[0] is site.inputs[0]
    assert torch.equal(factor[1], 1 / scale)


def test_weights_stay_in_float32_and_remember_their_dtype():
    graph = half_free()
    graph.weights.set("b", graph.weights.read("b").bfloat16())
    (region,) = find_regions(graph).found
    scale = torch.tensor([3.0, 0.7, 1.1, 0.3])
    expected = graph.weights.read("b").float() * scale
    fold_scale(graph, region, scale)
    assert torch.equal(graph.weights.read("b"), expected)
    assert graph.weights.info("b").dtype == "float32"
    assert graph.source_dtype("b") == "bfloat16"
    fold_scale(graph, region, 1 / scale)
    assert graph.source_dtype("b") == "bfloat16"


@pytest.mark.parametrize(
    "scale",
    [torch.ones(3), torch.ones(4, 1), torch.tensor([1, 1, 0, 1.0]), torch.tensor([1, -1, 1, 1.0])]
    + [torch.tensor([1.0, 1, 1, bad]) for bad in (float("nan"), float("inf"))],
    ids=["short", "a column", "zero", "negative", "nan", "inf"],
)
def test_scales_that_are_none(scale):
    graph = half_free()
    (region,) = find_regions(graph).found
    before = {name: graph.weights.version(name) for name in graph.weight_names()}
    with pytest.raises(PipelineError, match=r"positive finite numbers\n  where: a -> b"):
        fold_scale(graph, region, scale)
    assert before == {name: graph.weights.version(name) for name in graph.weight_names()}


@pytest.mark.parametrize("reduce", ["amax", "mean"])
def test_channels_that_share_a_scale(reduce):
    region = grouped()
    (consumer,) = region.consumers
    values = torch.rand(32) + 0.1
    pairs = values.reshape(2, 2, 8)  # key head, query head of it, channel
    expected = pairs.amax(1) if reduce == "amax" else pairs.mean(1)
    torch.testing.assert_close(per_channel(region, consumer, values, reduce), expected.reshape(-1))
    scale = torch.arange(1.0, 17.0)
    assert torch.equal(consumer_scale(region, consumer, scale), scale.reshape(2, 1, 8).expand(2, 2, 8).reshape(-1))


def test_channels_that_a_consumer_does_not_read():
    random = torch.Generator().manual_seed(3)

    def body(m, x):
        y = F.linear(x, m.a)
        return F.linear(y[:, :4], m.b) + F.linear(y, m.c)

    tensors = {
        name: torch.randn(shape, generator=random) for name, shape in {"a": (8, 8), "b": (8, 4), "c": (8, 8)}.items()
    }
    graph = canonical_form(module(body, **tensors), torch.randn(3, 8, generator=random))
    (region,) = find_regions(graph).found
    partial = next(consumer for consumer in region.consumers if consumer.site.name == "b")
    values = torch.tensor([5.0, 6, 7, 8])
    assert per_channel(region, partial, values, "amax").tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
    assert region.size == 8


def test_folding_and_back():
    graph = copy_graph(canonical_graph("qwen2"))
    for region in find_regions(graph).found:
        scale = torch.exp2(torch.randint(-3, 4, (region.size,)).float())
        before = {p.weight: graph.weights.read(p.weight) for p in region.producers}
        fold_scale(graph, region, scale)
        fold_scale(graph, region, 1 / scale)
        for name, tensor in before.items():
            assert torch.equal(graph.weights.read(name), tensor)
