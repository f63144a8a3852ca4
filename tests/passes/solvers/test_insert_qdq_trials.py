"""Inputs that are tried before they are rounded, and 4-bit floats."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph, quantized_value
from qcompiler.numerics import fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN, Assign, InsertQDQ
from qcompiler.protocol.pass_base import (
    PassContext,
)
from qcompiler.sweep.streaming import sweep
from tests.passes.test_insert_qdq import CPU, inputs_by_site, ops, pairs, rounded_model
from tests.tiny_graphs import language_model, token_batches


def with_outliers(factor: float) -> Graph:
    """A model whose second layer has one loud channel behind each norm, quiet in the weights that read it."""
    graph = language_model()
    for norm, readers in (("1.norm_1", "qkv"), ("1.norm_2", ("gate", "up"))):
        name = next(name for name in graph.weight_names() if name.startswith(norm))
        weight = graph.weights.read(name).clone()
        weight[3] *= factor
        graph.weights.set(name, weight)
        for reader in readers:
            columns = graph.weights.read(f"1.{reader}.weight").clone()
            columns[:, 3] /= factor
            graph.weights.set(f"1.{reader}.weight", columns)
    return graph


@pytest.mark.parametrize("weights_first", [True, False])
def test_inputs_with_outliers_stay_in_float(weights_first, tmp_path):
    graph = with_outliers(4096.0)
    assign, quantizers = Assign("w8a8"), [RTN(), InsertQDQ()]
    context = PassContext(graph, CPU, 0)
    assign.run(graph, context)
    done = sweep(
        graph, quantizers if weights_first else quantizers[::-1], token_batches(graph), context, work_dir=tmp_path
    )
    skips = {skip.site: skip for skip in done.skips}
    assert skips.keys() == {"1.q", "1.k", "1.v", "1.gate", "1.up"}
    assert not any(skip.asked for skip in skips.values())
    found = inputs_by_site(graph)
    for name, node in found.items():
        assert (quantized_value(node) is None) == (name in skips or name == "head")
    for name in skips:
        assert graph.schemes[name] == Scheme(Scheme.parse("w8a8").weight, None)
    assert {report.site for report in done.sites if report.method == "rtn"} == {*found} - {"head"}
    reason = skips["1.gate"].reason
    decibels = float(reason.split(" dB of")[0].split()[-1])
    assert -20 < decibels < 20
    assert "20 are wanted" in reason
    assert float(reason.split("reaches ")[1].split(" times")[0]) > 1000


def test_the_signal_over_noise_that_is_asked_for(tmp_path):
    def left(number, **options):
        graph = with_outliers(64.0)
        context = PassContext(graph, CPU, 0)
        Assign("w8a8").run(graph, context)
        item = InsertQDQ(**options)
        done = sweep(graph, [RTN(), item], token_batches(graph), context, work_dir=tmp_path / str(number))
        kept = {report.site: report.details["output_sqnr_db"] for report in done.sites if report.method == item.name}
        return {skip.site for skip in done.skips}, kept

    none, everything = left(0, least_sqnr_db=-math.inf)
    assert none == set()
    quiet = min(everything, key=everything.get)
    assert quiet[:2] == "1."
    among, kept = left(1, least_sqnr_db=everything[quiet] + 0.01)
    assert quiet in among
    assert all(value > everything[quiet] + 0.01 for value in kept.values())
    some, _ = left(2, least_sqnr_db=everything[quiet] - 0.01)
    assert some == set()


def test_dynamic_inputs_are_tried_where_they_are_calibrated(tmp_path):
    graph = with_outliers(4096.0)
    context = PassContext(graph, CPU, 0)
    Assign("w4a4").run(graph, context)
    done = sweep(graph, [InsertQDQ(), RTN()], token_batches(graph), context, work_dir=tmp_path)
    assert {skip.site for skip in done.skips} >= {"1.q", "1.k", "1.v", "1.gate", "1.up"}
    assert not any(skip.site.startswith("0.") for skip in done.skips)
    assert "12 are wanted" in done.skips[0].reason
    kept = {report.site: report for report in done.sites if report.method == "insert-qdq"}
    assert all(10 < report.sqnr_db < 40 for report in kept.values())
    assert kept["0.q"].sqnr_db == kept["0.k"].sqnr_db != kept["0.down"].sqnr_db


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_the_factor_of_four_bit_floats_is_that_of_all_that_was_seen(observer, tmp_path):
    graph, reports = rounded_model("nvfp4", tmp_path, InsertQDQ(observer=observer), RTN())
    (first, *_) = (report for report in reports if report.method == "insert-qdq")
    name, (_, high) = first.details["input"], first.details["range"]
    factor = graph.weights.read(name)
    assert factor.item() == pytest.approx(high / 2688)
    assert high == pytest.approx(max(abs(end) for end in first.details["seen"]))
    assert 15 < first.sqnr_db < 25  # of a sample: what blocks do to values no histogram tells
    nodes = [node for node in graph.fx.nodes if node.target is ops.fp4_scale.default]
    assert len(nodes) == len(pairs(graph))
    assert all(node.args[1].target in graph.weights for node in nodes)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp4-ceil"])
def test_what_runs_is_the_reference_arithmetic_of_four_bit_floats(scheme, tmp_path):
    graph, _ = rounded_model(scheme, tmp_path, RTN(), InsertQDQ())
    parsed = Scheme.parse(scheme)
    checked = 0

    def rounded(x: Tensor, factor: Tensor | None) -> Tensor:
        spec = parsed.activation
        assert spec is not None
        rows = x.reshape(-1, x.shape[-1])
        stored = torch.ops.qcompiler.fp4_scale(rows, factor, spec.group_of(x.shape[-1]), spec.exponent == "floor")
        return numerics.fake_quantize(rows, fp4.decode_scale(stored, factor), None, spec).reshape(x.shape)

    values: dict[fx.Node, Any] = dict(token_batches(graph, (3,))[0])
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            values[node] = graph.weights.read(node.target)
        elif node.op == "call_function":
            values[node] = node.target(*fx.node.map_arg(node.args, values.__getitem__))
            if quantized_value(node) is not None:
                factor = node.args[2]
                assert (factor is not None) is (scheme == "nvfp4")
                expected = rounded(values[quantized_value(node)], None if factor is None else values[factor])
                assert torch.equal(values[node], expected)
                checked += 1
    assert checked == len(pairs(graph)) > 3
    ids = token_batches(graph, (3,))[0][graph.inputs[0]]
    found, expected = NativeArtifact(graph).forward(ids), values[graph.outputs[0]]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    unrounded = NativeArtifact(graph, round_activations=False).forward(ids)
    assert (unrounded - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_a_reader_cannot_be_given_four_bit_floats_twice(scheme, tmp_path):
    graph, _ = rounded_model(scheme, tmp_path, InsertQDQ(), RTN())
    site = graph.sites()[0]
    spec = graph.schemes[site.name].activation
    assert spec is not None
    with pytest.raises(PipelineError, match="already"):
        graph.quantize_input(site.inputs[0], site.nodes, spec, None, None)
