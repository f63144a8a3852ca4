import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler.artifacts.native import NativeArtifact
from qcompiler.artifacts.parity import check_parity
from qcompiler.artifacts.streamed import StreamedArtifact
from qcompiler.errors import VerificationError
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.protocol.pass_base import PassContext
from tests.tiny_graphs import language_model


def artifact(scale: float = 1.0) -> NativeArtifact:
    """A quantized model; the scales of one site are off by a factor."""
    graph = language_model()
    graph.schemes = {site.name: Scheme.parse("w8a16") for site in graph.sites()[:-1]}
    RTN().rewrite(graph.sites()[:-1], {}, PassContext(graph, torch.device("cpu"), 0))
    graph.weights.set("1.o.weight_scale", graph.weights.read("1.o.weight_scale") * scale)
    return NativeArtifact(graph)


class Changed(NativeArtifact):
    """A model with one logit changed, in one piece or through the cache."""

    def __init__(self, value: float, *, cached: bool) -> None:
        good = artifact()
        super().__init__(good._graph)
        self._value, self._is_in_cached = value, cached

    def _change(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[-1, -1, -1] = self._value
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        return logits if self._is_in_cached else self._change(logits)

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        logits, cache = super().step(ids, cache)
        return (self._change(logits) if self._is_in_cached else logits), cache


def test_a_model_equals_itself():
    found = check_parity(artifact(), artifact(), tolerance=1e-5)
    assert found["max_difference"] == 0
    assert found["cached_difference"] < 1e-5
    assert found["top1_agreement"] == 1
    assert found["tokens"] == 64


@pytest.mark.parametrize("scale", [1.05, -1.0])
def test_a_planted_wrong_scale(scale):
    with pytest.raises(VerificationError, match="does not compute what") as caught:
        check_parity(artifact(), artifact(scale), tolerance=1e-3)
    assert "relative difference" in str(caught.value)
    assert check_parity(artifact(), artifact(scale), tolerance=10)["max_difference"] > 1e-3


@pytest.mark.parametrize("value", [1e6, math.nan, math.inf])
@pytest.mark.parametrize("cached", [False, True])
def test_one_wrong_logit(value, cached):
    with pytest.raises(VerificationError, match="does not compute what"):
        check_parity(artifact(), Changed(value, cached=cached), tolerance=1e-3)


class Narrow(NativeArtifact):
    """Gives a single logit, which would broadcast."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[..., :1]


def test_other_shapes():
    with pytest.raises(VerificationError, match="another shape") as caught:
        check_parity(artifact(), Narrow(language_model()), tolerance=100)
    assert "(2, 32, 1)" in str(caught.value)


def test_short_contexts_and_models_without_a_cache():
    expected, actual = artifact(), artifact()
    actual.max_positions, actual.has_cache = 8, False
    found = check_parity(expected, actual, tolerance=1e-5)
    assert found["tokens"] == 16
    assert found["cached_difference"] is None


def rounding_artifact(scale: float = 1.0, *, round_activations: bool = True) -> NativeArtifact:
    """As `artifact`, with activations rounded per token."""
    graph = artifact(scale)._graph
    scheme = Scheme.parse("w8a8-dynamic")
    for site in graph.sites()[:-1]:
        assert scheme.activation is not None
        graph.quantize_input(site.inputs[0], site.nodes, scheme.activation, None, None)
    return NativeArtifact(graph, round_activations=round_activations)


def test_rounding_of_activations_widens_the_tolerance_by_twice_what_it_does():
    reference, unrounded = rounding_artifact(), rounding_artifact(round_activations=False)
    plain = check_parity(reference, unrounded, tolerance=1.0)
    assert plain["tolerance"] == 1.0
    assert 1e-3 < plain["max_difference"] < 0.1
    found = check_parity(reference, unrounded, tolerance=1e-3, unrounded=unrounded)
    assert found["tolerance"] == pytest.approx(1e-3 + 2 * plain["max_difference"])
    with pytest.raises(VerificationError):
        check_parity(reference, unrounded, tolerance=1e-3)
    with pytest.raises(VerificationError):
        check_parity(reference, rounding_artifact(-1.0), tolerance=1e-3, unrounded=unrounded)


def test_divergence():
    found = check_parity(artifact(), artifact(2.0), tolerance=10)
    ids = torch.randint(32, (2, 32), generator=torch.Generator().manual_seed(0))
    p, q = (a.forward(ids).double().softmax(-1) for a in (artifact(), artifact(2.0)))
    assert found["kl_divergence"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    assert check_parity(artifact(), artifact(), tolerance=1e-5)["kl_divergence"] == 0


@pytest.mark.parametrize(
    ("steps", "lengths"), [(None, [16, *[1] * 16]), (16, [16, *[1] * 16]), (1, [16, 1, 15]), (0, [16, 16])]
)
def test_parts_that_go_through_the_cache(steps: int | None, lengths: list[int]) -> None:
    class Asked(StreamedArtifact):
        def run_together(self, runs: Sequence[Sequence[Tensor]], *arguments: Any) -> Iterator[Tensor]:
            assert [[part.shape[1] for part in parts] for parts in runs] == [[32], lengths]
            return super().run_together(runs, *arguments)

    graph = language_model()
    assert check_parity(NativeArtifact(graph), Asked(graph), tolerance=1e-5, steps=steps)["cached_difference"] < 1e-5
