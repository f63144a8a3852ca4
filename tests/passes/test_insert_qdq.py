"""Activations rounded where their schemes say so: what is inserted, from which statistics, and what runs afterwards."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.artifacts.native import NativeArtifact, load_native, save_native
from qcompiler.errors import PipelineError, RecipeError, ZeroCoverageError
from qcompiler.ir.graph import Graph, quantized_value
from qcompiler.ir.segments import Segment, segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ
from qcompiler.protocol.histograms import Histogram
from qcompiler.protocol.pass_base import (
    ACTIVATIONS_QUANTIZED,
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Tap,
    Wave,
)
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.ranges import activation_qparams, choose_range
from qcompiler.protocol.statistics import CrossGram, RowSample
from qcompiler.protocol.verify import verify_graph
from qcompiler.sweep.position import Batch
from qcompiler.sweep.streaming import sweep
from tests.tiny_checkpoint import file_bytes
from tests.tiny_graphs import Maker, input_batches, interpret, language_model, other, residual_mlp, token_batches

CPU = torch.device("cpu")
ops = torch.ops.qcompiler
STATIC = ["w8a8", "w8a8-actsym", "fp8", "fp8-e5m2"]
DYNAMIC = ["w8a8-dynamic", "w8a8-dynamic-actasym", "w8a8-dyntensor", "fp8-dynamic"]


def compiled(graph: Graph, passes: Sequence[Pass], batches: Sequence[Batch], work_dir: Path) -> list[SiteReport]:
    context, reports = PassContext(graph, CPU, 0), []
    (stage,) = Pipeline(passes).stages
    for item in stage.whole_graph:
        item.run(graph, context)
    reports += sweep(graph, stage.swept, batches, context, work_dir=work_dir).sites
    verify_graph(graph)
    return reports


def rounded_model(scheme: str, work_dir: Path, *passes: Pass, batches: bool = True) -> tuple[Graph, list[SiteReport]]:
    graph = language_model()
    reports = compiled(graph, [Assign(scheme), *passes], token_batches(graph) if batches else [], work_dir)
    return graph, reports


def pairs(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.fx.nodes if quantized_value(node) is not None]


def inputs_by_site(graph: Graph) -> dict[str, fx.Node]:
    return {site.name: site.inputs[0] for site in graph.sites()}


@pytest.mark.parametrize("scheme", STATIC)
def test_one_pair_for_sites_that_read_one_value(scheme, tmp_path):
    graph, reports = rounded_model(scheme, tmp_path, RTN(), InsertQDQ())
    spec = Scheme.parse(scheme).activation
    assert len(pairs(graph)) == 2 * 4  # in each layer: for q, k, v; for o; for gate, up; for down
    found = inputs_by_site(graph)
    for layer in range(2):
        assert len({found[f"{layer}.{name}"] for name in "qkv"}) == 1
        assert len({found[f"{layer}.{name}"] for name in ("gate", "up")}) == 1
        for name, first in (("v", "q"), ("o", "o"), ("up", "gate"), ("down", "down")):
            node = found[f"{layer}.{name}"]
            codes, scale, zero, axis, block, dtype = node.args
            assert codes.args == (quantized_value(node), scale, zero, axis, block, spec.code_dtype)
            assert (axis, block, dtype) == (0, 0, torch.float32)
            assert scale.target == f"{layer}.{first}.input_scale"
            stored = graph.weights.read(scale.target)
            assert (stored.dtype, stored.shape) == (torch.float32, ())
            assert (zero is None) == spec.symmetric
            if zero is not None:
                assert zero.target == f"{layer}.{first}.input_zero_point"
                assert graph.weights.read(zero.target).dtype == torch.uint8
    assert quantized_value(found["head"]) is None
    sites = [report.site for report in reports if report.method == "insert-qdq"]
    assert sorted(sites) == sorted(name for name in found if name != "head")


def test_ranges_are_chosen_with_everything_ahead_rounded_already(tmp_path):
    """A copy of the model is run as a whole before every wave, and given the scale that its values ask for."""
    graph, _ = rounded_model("w8a8", tmp_path, RTN(), InsertQDQ())
    naive = language_model()
    context = PassContext(naive, CPU, 0)
    Assign("w8a8").run(naive, context)
    RTN().rewrite(naive.sites()[:-1], {}, context)
    spec = Scheme.parse("w8a8").activation
    batches = token_batches(naive)
    for layer in range(2):
        for names in ("qkv", "o", ("gate", "up"), ("down",)):
            everywhere = [interpret(naive, batch) for batch in batches]
            sites = [site for site in naive.sites() if site.name in [f"{layer}.{name}" for name in names]]
            (value,) = sites[0].inputs
            seen = Histogram()
            for values in everywhere:
                seen.update(values[value.name])
            scale, zero = activation_qparams(*choose_range(seen, spec), spec)
            first = f"{layer}.{names[0]}"
            assert torch.equal(graph.weights.read(f"{first}.input_scale"), scale)
            assert torch.equal(graph.weights.read(f"{first}.input_zero_point"), zero)
            naive.weights.set(f"{first}.s", scale)
            naive.weights.set(f"{first}.z", zero)
            naive.quantize_input(value, [site.nodes[0] for site in sites], spec, f"{first}.s", f"{first}.z")
    expected = interpret(naive, batches[0])[naive.outputs[0].name]
    assert torch.equal(interpret(graph, token_batches(graph)[0])[graph.outputs[0].name], expected)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_dynamic_ranges_need_no_calibration(scheme, tmp_path):
    item = InsertQDQ(observer=None)
    assert not Pipeline([Assign(scheme), RTN(), item]).is_calibrated
    graph, reports = rounded_model(scheme, tmp_path, RTN(), item, batches=False)
    spec = Scheme.parse(scheme).activation
    assert len(pairs(graph)) == 8
    assert not [name for name in graph.weights.names() if "input" in name]
    for node in pairs(graph):
        value, codes = quantized_value(node), node.args[0]
        chosen = codes.args[1].args[0]
        width = node.users.copy().popitem()[0].meta["weight_shape"][1]
        per_token = spec.granularity == "per_token"
        assert chosen.target is ops.choose_qparams.default
        assert chosen.args == (value, spec.code_dtype, -1 if per_token else None)
        assert codes.args[3:5] == ((-1, width) if per_token else (0, 0))
        assert (codes.args[2] is None) == spec.symmetric
        if codes.args[2] is not None:
            assert (codes.args[2].target, codes.args[2].args) == (operator.getitem, (chosen, 1))
    assert all(math.isnan(report.sqnr_db) for report in reports if report.method == "insert-qdq")


def expected_logits(scheme: str, ids: Tensor) -> Tensor:
    """The float model with weights rounded, and the input of every site rounded by the reference arithmetic."""
    graph = language_model()
    spec, by_row = Scheme.parse(scheme).weight, per_channel(Scheme.parse(scheme))
    per_row = "dyntensor" not in scheme
    assert spec is not None
    sites = {node: site for site in graph.sites()[:-1] for node in site.nodes}
    (batch,) = token_batches(graph, (3,))
    values: dict[fx.Node, Any] = {}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = next(value for given, value in batch.items() if given.name == node.name)
        elif node.op == "get_attr":
            values[node] = graph.weights.read(node.target)
        elif node in sites:
            x, weight = values[node.args[0]], values[node.args[1]]
            scale, zero = numerics.min_max_qparams(weight, spec, torch.float32)
            weight = numerics.fake_quantize(weight, scale, zero, spec)
            rows = x.reshape(-1, x.shape[-1])
            rows = rows if per_row else rows.reshape(1, -1)
            scale, zero = numerics.min_max_qparams(rows, by_row, torch.float32)
            rows = numerics.fake_quantize(rows, scale, zero, by_row)
            values[node] = torch.nn.functional.linear(rows.reshape(x.shape), weight)
        elif node.op == "call_function":
            values[node] = node.target(*fx.node.map_arg(node.args, values.__getitem__))
    return values[graph.outputs[0]]


def per_channel(scheme: Scheme) -> QuantSpec:
    """The activation format with one scale per row of a matrix."""
    assert scheme.activation is not None
    return replace(scheme.activation, granularity="per_channel", dynamic=False)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_what_runs_is_the_reference_arithmetic(scheme, tmp_path):
    graph, _ = rounded_model(scheme, tmp_path, RTN(), InsertQDQ(observer=None), batches=False)
    ids = token_batches(graph, (3,))[0][graph.inputs[0]]
    found = NativeArtifact(graph).forward(ids)
    expected = expected_logits(scheme, ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    unrounded = NativeArtifact(graph, round_activations=False).forward(ids)
    assert (unrounded - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w8a8-dynamic", "fp8-dynamic", "w8a8-dyntensor", "nvfp4", "mxfp4"])
def test_saved_loaded_and_saved_again(scheme, tmp_path):
    graph, _ = rounded_model(scheme, tmp_path / "work", RTN(), InsertQDQ())
    ids = token_batches(graph, (3,))[0][graph.inputs[0]]
    save_native(graph, tmp_path / "a", {}, {})
    again, _, _ = load_native(tmp_path / "a")
    assert again.schemes == graph.schemes
    verify_graph(again)
    assert torch.equal(NativeArtifact(again).forward(ids), NativeArtifact(graph).forward(ids))
    save_native(again, tmp_path / "b", {}, {})
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def test_sqnr_and_range_are_reported(tmp_path):
    graph, reports = rounded_model("w8a8", tmp_path, RTN(), InsertQDQ())
    (report,) = (r for r in reports if r.method == "insert-qdq" and r.site == "1.down")
    assert report.scheme == "activation int8 per_tensor asymmetric"
    everywhere = [interpret(graph, batch) for batch in token_batches(graph)]
    node = inputs_by_site(graph)["1.down"]
    value = torch.cat([values[quantized_value(node).name].flatten() for values in everywhere])
    rounded = torch.cat([values[node.name].flatten() for values in everywhere])
    assert report.sqnr_db == pytest.approx(numerics.sqnr_db(value, rounded), abs=0.3)
    assert report.details["seen"] == pytest.approx([float(value.min()), float(value.max())], rel=1e-5)
    low, high = report.details["range"]
    assert report.details["seen"][0] <= low <= 0 <= high <= report.details["seen"][1]
    assert report.details["input"] == "1.down.input_scale"


def test_observers_differ(tmp_path):
    found = {}
    for number, options in enumerate(({"observer": "minmax"}, {"observer": "percentile", "percentile": 95.0}, {})):
        item = InsertQDQ(**options, least_sqnr_db=-math.inf)
        graph, _ = rounded_model("w8a8", tmp_path / str(number), RTN(), item)
        found[number] = float(graph.weights.read("0.down.input_scale"))
    assert found[1] < found[2] <= found[0]


def test_sites_keep_their_own_formats(tmp_path):
    graph = language_model()
    overrides = {"*.k": "w8a16", "*.v": "w8a8-dynamic", "1.*": None}
    compiled(graph, [Assign("w8a8", overrides=overrides), RTN(), InsertQDQ()], token_batches(graph), tmp_path)
    found = inputs_by_site(graph)
    value = found["0.k"]
    assert quantized_value(value) is None
    assert quantized_value(found["0.q"]) is quantized_value(found["0.v"]) is value
    assert found["0.q"] is not found["0.v"]
    assert found["0.v"].args[1].target is operator.getitem
    assert all(quantized_value(node) is None for name, node in found.items() if name.startswith("1."))


def test_nothing_to_do(tmp_path):
    graph, reports = rounded_model("w8a16", tmp_path, RTN(), InsertQDQ())
    assert pairs(graph) == []
    assert {report.method for report in reports} == {"rtn"}


class TwiceRead:
    """``a(x) + b(relu(x))``, where ``a`` is called on both values: one site, two inputs, one of them shared with b."""

    @staticmethod
    def graph() -> Graph:
        make = Maker()
        x = make.fx.placeholder("x")
        y = make.call(torch.ops.aten.relu.default, x)
        parts = [make.linear(value, site, 8, 8) for value, site in ((x, "a"), (y, "b"), (y, "a"))]
        total = make.call(torch.ops.aten.add.Tensor, *parts[:2])
        total = make.call(torch.ops.aten.add.Tensor, total, parts[2])
        return make.graph([other("x", "batch", 8)], {other("y", "batch", 8): total})


def test_sites_tied_by_shared_values_share_one_scale(tmp_path):
    graph = TwiceRead.graph()
    batches = input_batches(graph)
    reports = compiled(graph, [Assign("w8a8"), RTN(), InsertQDQ("minmax")], batches, tmp_path)
    first, second, third = (node.args[0] for node in graph.fx.nodes if node.target is ops.linear.default)
    assert second is third
    assert first is not second
    assert {node.args[1].target for node in (first, second)} == {"a.input_scale"}
    everything = torch.cat([batch[graph.inputs[0]] for batch in batches])
    spec = Scheme.parse("w8a8").activation
    expected, _ = activation_qparams(float(everything.min()), float(everything.max()), spec)
    assert torch.equal(graph.weights.read("a.input_scale"), expected)
    assert [report.site for report in reports if report.method == "insert-qdq"] == ["a", "b"]


def test_the_nodes_belong_to_their_segment(tmp_path):
    graph = residual_mlp()
    compiled(graph, [Assign("w8a8"), RTN(), InsertQDQ()], input_batches(graph), tmp_path)
    segments = segment_graph(graph).segments
    fresh = segment_graph(residual_mlp()).segments
    assert [[s.name for s in segment.sites] for segment in segments] == [[s.name for s in one.sites] for one in fresh]
    for segment, before in zip(segments, fresh, strict=True):
        assert [[s.name for s in wave] for wave in segment.waves()] == [[s.name for s in w] for w in before.waves()]
        inside = set(segment.nodes())
        for site in segment.sites:
            assert {site.inputs[0], site.inputs[0].args[0]} <= inside


class Record(Pass):
    """Keeps what it is shown; changes nothing."""

    effect: ClassVar[Effect] = Effect.ANALYSIS
    shown: ClassVar[dict[str, tuple[Tensor, Tensor]]] = {}

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        return list(segment.waves())

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        return [Tap(site.inputs[0], kind) for site in wave for kind in (CrossGram, Histogram)]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        for site in wave:
            cross = statistics[Tap(site.inputs[0], CrossGram)].result()
            self.shown[site.name] = cross, statistics[Tap(site.inputs[0], Histogram)].result()
        return PassResult(modified=False)


def test_what_stands_behind_sees_rounded_values_and_an_unrounded_reference(tmp_path):
    graph = language_model()
    compiled(graph, [Assign("w8a8"), RTN(), InsertQDQ(), Record()], token_batches(graph), tmp_path)
    float_model = language_model()
    reference = [interpret(float_model, batch) for batch in token_batches(float_model)]
    rounded = [interpret(graph, batch) for batch in token_batches(graph)]
    originals = {site.name: site.inputs[0].name for site in float_model.sites()}
    for site in graph.sites()[:-1]:
        x = torch.cat([values[site.inputs[0].name].flatten(0, -2) for values in rounded])
        y = torch.cat([values[originals[site.name]].flatten(0, -2) for values in reference])
        cross, seen = Record.shown[site.name]
        torch.testing.assert_close(cross, y.T @ x, rtol=1e-4, atol=1e-4)
        assert (seen.low, seen.high) == pytest.approx((float(x.min()), float(x.max())), rel=1e-5)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "fp8-dynamic", "fp8-e5m2", "fp8-block", "nvfp4", "mxfp4"])
def test_gptq_behind_it_beats_rounding_to_nearest(scheme, tmp_path):
    graph, reports = rounded_model(scheme, tmp_path, InsertQDQ(), GPTQ())
    assert len(pairs(graph)) == 8
    solved = [report for report in reports if report.method == "gptq"]
    assert len(solved) == len(graph.sites()) - 1
    assert sum(r.output_error for r in solved) < 0.9 * sum(r.rtn_output_error for r in solved)


def test_static_schemes_without_an_observer(tmp_path):
    with pytest.raises(RecipeError, match="calibrated") as caught:
        rounded_model("w8a8", tmp_path, RTN(), InsertQDQ(observer=None))
    assert "InsertQDQ(observer='mse')" in str(caught.value)


def test_twice(tmp_path):
    with pytest.raises(PipelineError, match="quantized already"):
        rounded_model("w8a8", tmp_path, RTN(), InsertQDQ(), InsertQDQ())


def test_no_rows():
    graph = language_model()
    context = PassContext(graph, CPU, 0)
    Assign("w8a8").run(graph, context)
    wave = graph.sites()[:1]
    value = wave[0].inputs[0]
    statistics = {Tap(value, Histogram): Histogram(), Tap(value, RowSample): RowSample()}
    with pytest.raises(ZeroCoverageError) as caught:
        InsertQDQ().rewrite(wave, statistics, context)
    assert caught.value.where == "0.q"


@pytest.mark.parametrize("options", [{"observer": "entropy"}, {"percentile": 12.0}])
def test_options(options):
    with pytest.raises(RecipeError):
        InsertQDQ(**options)


def test_declarations():
    assert InsertQDQ().name == "insert-qdq"
    assert InsertQDQ.establishes == {ACTIVATIONS_QUANTIZED}
    assert Pipeline([Assign("w8a8"), RTN(), InsertQDQ()]).is_calibrated
    with pytest.raises(PipelineError, match="schemes"):
        Pipeline([InsertQDQ()])
