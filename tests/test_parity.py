import math

import pytest
import torch
from torch import Tensor

from qcompiler.errors import VerificationError
from qcompiler.native import NativeArtifact
from qcompiler.parity import check_parity
from qcompiler.pass_base import PassContext
from qcompiler.passes import RTN
from qcompiler.spec import Scheme
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
