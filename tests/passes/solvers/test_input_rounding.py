"""What is tried on sampled rows is what the graph will do, and the error is that of the layer's output."""

import math

import pytest
import torch

from qcompiler import numerics
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes.solvers.input_rounding import output_error, round_rows, try_rounding
from qcompiler.protocol.ranges import activation_qparams
from tests.tiny_graphs import Maker, interpret, other

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a8-actsym", "fp8", "w8a8-dynamic", "w8a8-dyntensor", "w4a4-actasym-clip90", "nvfp4", "mxfp4"]
)
def test_rows_are_rounded_as_by_the_graph(scheme):
    spec = Scheme.parse(scheme).activation
    maker = Maker()
    value = maker.fx.placeholder("x")
    value.meta.update(dtype=torch.float32, shape=("batch", 64))
    reader = maker.linear(value, "site", 8, 64)
    graph = maker.graph([other("x", "batch", 64)], {other("y", "batch", 8): reader})
    rows = torch.randn(9, 64) * torch.rand(64).exp()
    names, scale, zero_point = [None, None], None, None
    if not spec.dynamic:
        scale, zero_point = activation_qparams(float(rows.min()), float(rows.max()), spec)
        for index, tensor in enumerate((scale, zero_point)):
            if tensor is not None:
                names[index] = f"site.{index}"
                graph.weights.set(names[index], tensor)
    rounded = graph.quantize_input(value, [reader], spec, *names)
    expected = interpret(graph, {graph.inputs[0]: rows})[rounded.name]
    assert torch.equal(round_rows(rows, spec, scale, zero_point), expected)
    assert not torch.equal(expected, rows)


def test_a_typical_row_counts_by_its_relative_error():
    weight, rows = torch.randn(5, 7), torch.randn(1, 7).expand(4, 7)
    rounded = rows + 0.1 * torch.randn(4, 7)
    relative = ((rounded - rows) @ weight.T).square().sum(-1) / (rows @ weight.T).square().sum(-1)
    assert output_error(rows, rounded, weight) == pytest.approx(float(relative.mean()), rel=1e-5)


def test_one_large_row_does_not_hide_the_others():
    weight, rows = torch.eye(6), torch.randn(64, 6)
    rows[0] *= 1000
    rounded = rows + torch.randn(64, 6)  # as strong as the signal of all rows but one
    naive = float((rounded - rows).square().sum() / rows.square().sum())
    assert naive < 1e-3
    spread = output_error(rows[1:], rounded[1:], weight)
    assert 0.3 < spread < 3
    assert output_error(rows, rounded, weight) < spread  # one row sets the mean that the quiet ones are held against


def test_zeros():
    assert output_error(torch.zeros(3, 4), torch.zeros(3, 4), torch.randn(2, 4)) == 0


def test_the_formula():
    weight, rows = torch.randn(5, 7), torch.randn(6, 7) * torch.tensor([1.0, 1, 1, 1, 1, 50])[:, None]
    rounded = rows + 0.1 * torch.randn(6, 7) * rows.abs()
    energies = [float((weight @ row).square().sum()) for row in rows]
    errors = [float((weight @ (a - b)).square().sum()) for a, b in zip(rows, rounded, strict=True)]
    mean = sum(energies) / 6
    expected = sum(2 * error / (energy + mean) for error, energy in zip(errors, energies, strict=True)) / 6
    assert output_error(rows, rounded, weight) == pytest.approx(expected, rel=1e-4)


def test_a_trial_tells_of_input_and_output():
    spec = Scheme.parse("w8a8").activation
    rows, weight = torch.randn(64, 32), torch.randn(8, 32)
    scale, zero_point = activation_qparams(float(rows.min()), float(rows.max()), spec)
    rounded = round_rows(rows, spec, scale, zero_point)
    trial = try_rounding(rows, weight, spec, scale, zero_point)
    assert trial.input_sqnr_db == numerics.sqnr_db(rows, rounded)
    assert 10 ** (-trial.output_sqnr_db / 10) == pytest.approx(output_error(rows, rounded, weight))
    assert try_rounding(torch.zeros(4, 32), weight, spec, scale, zero_point).output_sqnr_db == math.inf
