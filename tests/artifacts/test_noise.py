"""The graph with errors as large as those of a dtype."""

import math

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.artifacts.noise import (
    _add_noise,
    _add_noise_of_attention,
    _add_noise_of_terms,
    with_block_noise,
    with_noise,
)
from qcompiler.ir.feeding import feed
from qcompiler.ir.graph import is_op
from qcompiler.lowering.kernels.module.build import build_module
from qcompiler.passes import RTN, Assign, InsertQDQ
from tests.tiny_graphs import interpret, language_model

IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
_canonical = torch.ops.qcompiler


def names(graph, target):
    return [node.name for node in graph.fx.nodes if is_op(node, target)]


def test_errors_are_as_large_as_a_rounding_and_stand_where_they_are_asked_for():
    graph = language_model(width=64)
    (first, *_) = names(graph, _canonical.rms_norm.default)
    before = interpret(graph, feed(graph, IDS))
    noisy = with_noise(graph, {first}, torch.bfloat16)
    after = interpret(noisy, feed(noisy, IDS))
    added = next(n.name for n in noisy.fx.nodes if n.op == "call_function" and "noise" in n.name)
    error = ((after[added] - before[first]) / before[first]).abs()
    half_a_step = torch.finfo(torch.bfloat16).eps / 2
    assert 0.9 * half_a_step < error.max() <= 1.001 * half_a_step
    assert torch.equal(after[first], before[first])
    assert sum(node.op == "call_function" for node in noisy.fx.nodes) == 1 + sum(
        node.op == "call_function" for node in graph.fx.nodes
    )


def test_products_have_errors_of_the_size_of_their_terms():
    graph = language_model(width=64)
    first = next(n for n in graph.fx.nodes if is_op(n, _canonical.linear.default))
    before = interpret(graph, feed(graph, IDS))
    noisy = with_noise(graph, {first.name}, torch.float32)
    after = interpret(noisy, feed(noisy, IDS))
    added = next(n.name for n in noisy.fx.nodes if n.op == "call_function" and "noise" in n.name)
    x, weight = (before[node.name] for node in first.args[:2])
    size = torch.nn.functional.linear(x.square(), weight.square()).sqrt()
    error = ((after[added] - before[first.name]) / size).abs().max().item()
    expected = torch.finfo(torch.float32).eps / 2 * math.sqrt(128)
    assert error == pytest.approx(expected, rel=0.5)


def test_masks_have_no_errors_and_samples_differ():
    x = torch.tensor([[1.0, -math.inf, torch.finfo(torch.float32).min, 2.0]])
    first, other = (_add_noise(x, 2**-9, seed) for seed in (1, 2))
    assert torch.equal(first[:, 1:3], x[:, 1:3])
    assert first.isfinite()[0, [0, 3]].all()
    assert not torch.equal(first, other)


def test_one_large_weight_makes_one_result_uncertain():
    x, weight = torch.randn(2, 5, 16), torch.randn(8, 16)
    weight[3, 0] = 3e4
    y = torch.nn.functional.linear(x, weight)
    error = (_add_noise_of_terms(y, x, weight, 0.0, 2**-9, 0) - y).abs()
    others = [row for row in range(8) if row != 3]
    assert error[..., others].max() < 0.1 < error[..., 3].max()


def test_one_large_value_makes_one_channel_of_attention_uncertain():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    v[..., 3] *= 3e4
    given = (q, k, v, None, 0.35, True)
    y = _canonical.attention(*given)
    error = (_add_noise_of_attention(y, given, 0.0, 2**-9, 0) - y).abs()
    others = [channel for channel in range(8) if channel != 3]
    assert error[..., others].max() < 0.1 < error[..., 3].max()


def test_the_same_errors_every_time_and_the_graph_is_not_changed():
    graph = language_model()
    rounded = build_module(graph, torch.device("cpu"), torch.bfloat16).rounded
    fields = graph.to_dict()
    one, other = (NativeArtifact(with_noise(graph, rounded, torch.bfloat16)).forward(IDS) for _ in range(2))
    assert torch.equal(one, other)
    assert graph.to_dict() == fields
    assert not torch.equal(one, NativeArtifact(graph).forward(IDS))


def test_what_is_rounded():
    graph = language_model()
    rounded = build_module(graph, torch.device("cpu"), torch.bfloat16).rounded
    for target in (_canonical.linear, _canonical.attention, _canonical.rms_norm, torch.ops.aten.silu):
        assert set(names(graph, target.default)) <= rounded
    moved = set(names(graph, torch.ops.aten.transpose.int)) | set(names(graph, torch.ops.aten.unsqueeze.default))
    assert not moved & rounded


def test_a_norm_that_quantizes_its_result_is_rounded_first():
    calibration = qc.Calibration.from_tokens(torch.randint(32, (4, 8)))
    passes = [Assign("w8a8-dynamic"), RTN(), InsertQDQ(observer=None)]
    graph = qc.compile(language_model(), passes, calibration).graph
    made = build_module(graph, torch.device("cpu"), torch.bfloat16)
    assert made.fused_norms == 4
    assert set(names(graph, _canonical.rms_norm.default)) <= made.rounded


def test_errors_of_blocks_are_within_half_a_step_of_eight_bits():
    graph = language_model(width=64)
    before = interpret(graph, feed(graph, IDS))
    noisy = with_block_noise(graph, 48)  # one block of 48 channels, and one of 16
    after = interpret(noisy, feed(noisy, IDS))
    first = next(node.args[0].name for node in graph.fx.nodes if is_op(node, _canonical.linear.default))
    readers = [node for node in noisy.fx.nodes if is_op(node, _canonical.linear.default)]
    assert all("noise" in node.args[0].name for node in readers)
    assert len(readers) == len(names(graph, _canonical.linear.default))
    error = (after[readers[0].args[0].name] - before[first]).abs()
    for block in (slice(0, 48), slice(48, 64)):
        steps = before[first][..., block].abs().amax(-1, keepdim=True) / 127
        ratio = error[..., block] / steps
        assert 0.4 < ratio.max() <= 0.5001
    again, other = with_block_noise(graph, 48), with_block_noise(graph, 48, sample=1)
    name = readers[0].args[0].name
    assert torch.equal(interpret(again, feed(again, IDS))[name], after[name])
    assert not torch.equal(interpret(other, feed(other, IDS))[name], after[name])


def test_samples_have_errors_of_their_own():
    graph = language_model(width=64)
    every = [node.name for node in graph.fx.nodes if node.op == "call_function"]
    first, second = (with_noise(graph, every, torch.bfloat16, sample=sample) for sample in (1, 2))
    logits = [NativeArtifact(noisy).forward(IDS) for noisy in (first, second)]
    assert not torch.equal(*logits)
