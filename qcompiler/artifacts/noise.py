"""For parity: how far a model may be from its graph because it rounds activations; the graph itself, with such noise.

Behind every node whose value a lowered model rounds stands an error as large as that rounding: evenly distributed
within half a step, ``eps / 2`` of the value. A product of matrices has one error for each of its terms, whatever
cancels in their sum: it is relative to the root of the sum of their squares, in attention to the sum of magnitudes.
Each result has a size of its own, so that one large weight makes one result uncertain and no other. Sums in float32 may
be taken in another order: ``sqrt(terms)`` steps of that. Masks (values that are not finite, or beyond `_MASK`) have no
error.

What these errors make of the logits, the network decides, so they are not estimated but computed: the difference
between the graph and the graph with noise is one sample of what the difference between the graph and a lowered model is
another sample of. Twice the largest such difference is allowed.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, is_op

__all__ = ["noisy_samples", "with_block_noise", "with_noise"]

_canonical = torch.ops.qcompiler
_TERMS_AT_ONCE = 1 << 22  # of a weight, in float64: 32 MiB
_SAMPLES = 3  # of a model, to hold another one against
_SAMPLE = 1_000_003  # between the seeds of two samples; of a seed, torch takes 32 bits on a CPU
_MASK = 1e30  # magnitudes that only masks have: the lowest numbers of float32 and bfloat16


def noisy_samples(graph: Graph, rounded: Collection[str] | None, dtype: torch.dtype) -> Iterator[Graph]:
    """Samples of a graph with the errors of a dtype, behind the nodes named or all: see `with_noise`."""
    names = [node.name for node in graph.fx.nodes if node.op == "call_function"] if rounded is None else rounded
    for sample in range(_SAMPLES):
        yield with_noise(graph, names, dtype, sample=sample)


def with_noise(graph: Graph, rounded: Collection[str], dtype: torch.dtype, *, sample: int = 0) -> Graph:
    """A copy of a graph, weights shared, with an error behind every node that is rounded; the same errors every time.

    Args:
        graph: not changed.
        rounded: names of nodes.
        dtype: that they are rounded to.
        sample: which errors; each number gives others.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    copy = fx.Graph()
    results = copy.graph_copy(graph.fx, nodes)
    copy.output(results)
    for source, node in nodes.items():
        node.meta = dict(source.meta)
    terms = max((site.in_features for site in graph.sites()), default=1)
    in_sums = torch.finfo(torch.float32).eps / 2 * math.sqrt(terms)
    in_values = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for seed, (source, node) in enumerate(nodes.items()):
        if source.name not in rounded:
            continue
        options = (in_values, in_values + in_sums, _SAMPLE * sample + seed)
        with copy.inserting_after(node):
            if is_op(node, _canonical.linear.default):
                noisy = copy.call_function(_add_noise_of_terms, (node, *node.args[:2], *options))
            elif is_op(node, _canonical.attention.default):
                noisy = copy.call_function(_add_noise_of_attention, (node, node.args, *options))
            else:
                noisy = copy.call_function(_add_noise, (node, in_values, options[-1]))
        for user in [user for user in node.users if user is not noisy]:
            user.replace_input_with(node, noisy)
        noisy.meta = dict(source.meta)
    return replace(graph, fx=copy)


def with_block_noise(graph: Graph, block: int, *, sample: int = 0) -> Graph:
    """A copy of a graph whose linear layers read inputs with the errors of eight bits, in blocks with one scale each.

    llama.cpp rounds so what it multiplies with quantized weights: codes from -127 to 127, so that an error is within
    half a step, ``amax / 254`` of its block. The same error is put on what float weights multiply, whose own is
    smaller.

    Args:
        graph: not changed.
        block: channels that share a scale; the last block is short where it does not divide them.
        sample: which errors; each number gives others.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.fx, nodes))
    for source, node in nodes.items():
        node.meta = dict(source.meta)
    for seed, (source, node) in enumerate(nodes.items()):
        readers = [user for user in source.users if is_op(user, _canonical.linear.default) and user.args[0] is source]
        if not readers:
            continue
        with copy.inserting_after(node):
            noisy = copy.call_function(_add_noise_of_blocks, (node, block, _SAMPLE * sample + seed))
        noisy.meta = dict(source.meta)
        for reader in readers:
            nodes[reader].replace_input_with(node, noisy)
    return replace(graph, fx=copy)


def _add_noise_of_blocks(x: Tensor, block: int, seed: int) -> Tensor:
    """``x`` and an error within half a step of each block along its last axis."""
    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    steps = (blocks.abs().amax(-1, keepdim=True) / 127).expand(blocks.shape).flatten(-2)[..., :width]
    return _disturbed(x, steps / 2, seed)


def _add_noise(x: Any, of_values: float, seed: int) -> Any:
    """``x`` and an error within ``of_values`` of each value.

    Codes, and results that are several tensors, are given back as they are.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype.itemsize == 1:
        return x
    return _disturbed(x, of_values * x.abs(), seed)


def _add_noise_of_terms(y: Tensor, x: Tensor, weight: Tensor, of_values: float, of_terms: float, seed: int) -> Tensor:
    """``y`` and an error within ``of_values`` of each value, and ``of_terms`` of the terms that were summed to it."""
    squares = x.double().square()
    rows = weight.split(max(1, _TERMS_AT_ONCE // weight.shape[1]))
    terms = torch.cat([torch.nn.functional.linear(squares, part.double().square()) for part in rows], dim=-1)
    return _disturbed(y, (of_values**2 * y.double().square() + of_terms**2 * terms).sqrt(), seed)


def _add_noise_of_attention(y: Tensor, given: Any, of_values: float, of_terms: float, seed: int) -> Tensor:
    """As `_add_noise_of_terms`, of the values that attention averages: those of its own channel."""
    q, k, v, *rest = given
    return _disturbed(y, of_values * y.abs() + of_terms * _canonical.attention(q, k, v.abs(), *rest), seed)


def _disturbed(x: Tensor, size: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    error = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
    return torch.where(x.abs() < _MASK, x + error * size.to(x.dtype), x)
