"""Layers that share a range, and what stands for the inputs of experts that no calibration row was sent to."""

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import ZeroCoverageError
from qcompiler.ir.experts import is_expert, routed_from
from qcompiler.ir.graph import Graph
from qcompiler.ir.segments import segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ
from qcompiler.passes.solvers.observed_inputs import sites_that_share_a_range
from qcompiler.protocol.histograms import Histogram
from qcompiler.protocol.pass_base import PassContext, Tap
from qcompiler.protocol.statistics import RowSample
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import Maker, other

CPU = torch.device("cpu")
ONE_TOKEN = torch.ones(1, 2).long()  # sent to two experts of four


@pytest.mark.parametrize(
    ("family", "scheme"), [("mixtral", "w8a8"), ("mixtral", "fp8"), ("qwen3_moe", "w8a8"), ("deepseek_v3", "fp8")]
)
def test_the_range_of_fellow_experts_is_taken(family: str, scheme: str) -> None:
    graph = copy_graph(canonical_graph(family))
    passes = [Assign(scheme), RTN(), InsertQDQ(least_sqnr_db=float("-inf"))]
    result = qc.compile(graph, passes, qc.Calibration.from_tokens(ONE_TOKEN))
    activations = [site for site in result.report.sites if site.method == "insert-qdq" and ".experts." in site.site]
    borrowed = {site.site: site.details for site in activations if "fallback" in site.details}
    own = {site.site: site.details for site in activations if "fallback" not in site.details}
    assert borrowed
    assert own
    for name, details in borrowed.items():
        product = name.rpartition(".")[0]
        fellows = [other for site, other in own.items() if site.rpartition(".")[0] == product]
        assert details["calibration_rows"] == 0
        assert details["seen"] == [min(f["seen"][0] for f in fellows), max(f["seen"][1] for f in fellows)]
    assert torch.isfinite(result.artifact().forward(torch.arange(1, 30)[None])).all()


def test_the_report_says_so_and_weights_are_calibrated_behind() -> None:
    graph = copy_graph(canonical_graph("mixtral"))
    passes = [Assign("w8a8"), InsertQDQ(least_sqnr_db=float("-inf")), GPTQ()]
    result = qc.compile(graph, passes, qc.Calibration.from_tokens(ONE_TOKEN))
    found = [site.details["fallback"] for site in result.report.sites if "fallback" in site.details]
    assert any("range of its fellow experts" in text for text in found)


def wave_of_experts(scheme: str) -> tuple[Graph, list]:
    graph = copy_graph(canonical_graph("mixtral"))
    Assign(scheme).run(graph, PassContext(graph, CPU, 0))
    waves = [list(wave) for segment in segment_graph(graph).segments for wave in segment.waves()]
    return graph, next(wave for wave in waves if all(is_expert(site) for site in wave))


def test_a_mixture_that_got_no_row_keeps_its_inputs_in_float() -> None:
    graph, wave = wave_of_experts("w8a8")
    values = [value for site in wave for value in site.inputs]
    statistics = {Tap(value, kind): kind() for value in values for kind in (Histogram, RowSample)}
    result = InsertQDQ().rewrite(wave, statistics, PassContext(graph, CPU, 0))
    assert not result.modified
    assert {skip.site for skip in result.skips} == {site.name for site in wave}
    assert all("no calibration row" in skip.reason and not skip.asked for skip in result.skips)
    assert all(graph.schemes[site.name].activation is None for site in wave)
    assert all(graph.schemes[site.name].weight is not None for site in wave)


def test_a_layer_that_is_no_expert_is_an_error() -> None:
    graph, _ = wave_of_experts("w8a8")
    wave = [next(site for site in graph.sites() if not is_expert(site))]
    statistics = {Tap(value, kind): kind() for value in wave[0].inputs for kind in (Histogram, RowSample)}
    with pytest.raises(ZeroCoverageError, match="never reached"):
        InsertQDQ().rewrite(wave, statistics, PassContext(graph, CPU, 0))


def test_experts_of_one_mixture_are_fellows() -> None:
    graph = canonical_graph("mixtral")
    mixtures: dict = {}
    for site in graph.sites():
        if is_expert(site):
            mixtures.setdefault(routed_from(site), set()).add(site.name.rpartition(".")[0])
        else:
            assert routed_from(site) == frozenset()
    assert len(mixtures) == 4  # in and out of two layers
    assert all(len(products) <= 2 for products in mixtures.values())
    assert not any("down" in a and "up" in b for products in mixtures.values() for a in products for b in products)


def test_layers_that_share_an_input_share_a_range() -> None:
    make = Maker()
    x = make.fx.placeholder("x")
    y = make.call(torch.ops.aten.relu.default, x)
    parts = [make.linear(value, site, 8, 8) for value, site in ((x, "a"), (y, "b"), (y, "c"), (y, "a"), (y, "d"))]
    graph = make.graph([other("x", "batch", 8)], {other(f"y{i}", "batch", 8): part for i, part in enumerate(parts)})
    graph.schemes = {name: Scheme.parse("fp8" if name == "d" else "w8a8") for name in "abcd"}
    found = sites_that_share_a_range(graph.sites(), graph)
    assert [[site.name for site in sites] for _, sites in found] == [["a", "b", "c"], ["d"]]  # a is called on both
    assert [spec for spec, _ in found] == [graph.schemes[name].activation for name in "ad"]
