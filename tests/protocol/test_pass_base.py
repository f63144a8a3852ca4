import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph
from qcompiler.ir.segments import segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    Tap,
    Wave,
)
from qcompiler.protocol.statistics import Gram
from tests.tiny_graphs import chain, residual_mlp


@dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Options of every kind that a report must be able to hold."""

    bits: int = 8
    ratio: float | None = None
    names: tuple[str, ...] = ("a", "b")
    dtype: torch.dtype = torch.float16
    overrides: Mapping[str, str | None] = field(default_factory=lambda: {"x": None})
    effect: ClassVar[Effect] = Effect.APPROXIMATE


class Swept(QuantizeKVCache):
    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        return PassResult(modified=False)


def context(graph: Graph, seed: int = 0) -> PassContext:
    return PassContext(graph, torch.device("cpu"), seed)


@pytest.mark.parametrize(
    ("item", "name"),
    [(GPTQ(), "gptq"), (RTN(), "rtn"), (Assign(), "assign"), (QuantizeKVCache(), "quantize-kv-cache")],
)
def test_name(item, name):
    assert item.name == name


def test_what_a_pass_is_follows_from_what_it_implements():
    assert (Assign().works_in_sweep, Assign().is_calibrated) == (False, False)
    assert (RTN().works_in_sweep, RTN().is_calibrated) == (True, False)
    assert (GPTQ().works_in_sweep, GPTQ().is_calibrated) == (True, True)


def test_options_are_plain_json_values():
    assert QuantizeKVCache().options() == {
        "bits": 8,
        "ratio": None,
        "names": ["a", "b"],
        "dtype": "torch.float16",
        "overrides": {"x": None},
    }


def test_a_pass_that_does_nothing():
    graph = chain()
    with pytest.raises(PipelineError, match="neither run nor rewrite"):
        QuantizeKVCache().run(graph, context(graph))


def test_one_wave_of_all_sites_by_default():
    graph = residual_mlp(blocks=2)
    segments = segment_graph(graph).segments
    waves = [wave for segment in segments for wave in Swept().waves(segment, graph)]
    assert [[site.name for site in wave] for wave in waves] == [
        [site.name for site in segment.sites] for segment in segments if segment.sites
    ]
    assert Swept().statistics(waves[0], graph) == []


def test_taps_are_equal_where_value_and_kind_are():
    graph = chain()
    (x,) = graph.inputs
    assert Tap(x, Gram) == Tap(x, Gram)
    assert Tap(x, Gram) != Tap(graph.outputs[0], Gram)


def test_weights_are_read_in_float32():
    graph = chain()
    site = graph.sites()[0]
    stored = graph.weights.read(site.weight).bfloat16()
    graph.weights.set(site.weight, stored)
    weight = context(graph).weight(site)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, stored.float())


def test_scale_dtype():
    graph = chain()
    site = graph.sites()[0]
    graph.weights.set(site.weight, graph.weights.read(site.weight).bfloat16())
    graph.schemes[site.name] = Scheme.parse("w4a16")
    assert context(graph).scale_dtype(site) == torch.bfloat16
    graph.schemes[site.name] = Scheme.parse("w4a16", scale_dtype="float16")
    assert context(graph).scale_dtype(site) == torch.float16


def test_randomness_depends_on_seed_and_site_alone():
    graph = chain()
    first, second = graph.sites()[:2]
    draws = [
        torch.rand(4, generator=context(graph, seed).generator(site)).tolist()
        for seed, site in [(0, first), (0, first), (1, first), (0, second), (-(2**70), first)]
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


def test_an_option_that_is_no_json_number_keeps_its_meaning():
    assert InsertQDQ(least_sqnr_db=-math.inf).options()["least_sqnr_db"] == "-inf"
    assert InsertQDQ().options()["least_sqnr_db"] is None
