"""Quantized weights and activations in a graph."""

import pytest
import torch
from torch import nn

from qcompiler.errors import PipelineError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import activation_rounding, quantized_value
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.ir.graph.beginnings import quantized, rebuilt, stored
from tests.models import canonical_graph, copy_graph, run

canonical = torch.ops.qcompiler


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", group_size=16),
        QuantSpec("int4", group_size=12),
        QuantSpec("int3", group_size=16, symmetric=False),
        QuantSpec("int8", "per_channel", None),
        QuantSpec("int8", "per_channel", None, symmetric=False),
        QuantSpec("int8", "per_tensor", None),
        QuantSpec("float8_e4m3fn", "per_channel", None),
        QuantSpec("float8_e5m2", group_size=12),
    ],
    ids=str,
)
def test_a_quantized_weight(spec):
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    graph = canonicalize(capture_module(model, (torch.randn(3, 32),)))
    site, other = graph.sites()
    weight = quantized(graph.weights.read(site.weight), spec)
    graph.set_weight(site, weight)
    assert site.weight not in graph.weights
    assert [s.name for s in graph.sites()] == [site.name, other.name]
    assert graph.weights.info(f"{site.weight}_codes").dtype == ("" if spec.symmetric else "u") + spec.dtype
    assert (f"{site.weight}_zero_point" in graph.weights) is not spec.symmetric
    with torch.no_grad():
        model[0].weight.copy_(weight.dequantize())
        x = torch.randn(5, 32)
        torch.testing.assert_close(run(graph, input_0=x)["output_0"], model(x))
    graph.fx.lint()
    with pytest.raises(PipelineError, match="quantized already"):
        graph.set_weight(graph.sites()[0], weight)
    with pytest.raises(PipelineError, match="wrong shape"):
        graph.set_weight(other, weight)


def test_quantizing_one_use_of_a_tied_weight_leaves_the_other():
    graph = copy_graph(canonical_graph("gpt2"))
    (head,) = [site for site in graph.sites() if site.name == "lm_head"]
    table = graph.weights.read("transformer.wte.weight")
    graph.set_weight(head, quantized(graph.weights.read(head.weight), QuantSpec("int4", group_size=16)))
    torch.testing.assert_close(graph.weights.read("transformer.wte.weight"), table, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic", "w8a8-dyntensor", "w4a4-clip90", "w4a4-actasym", "fp8"])
def test_a_quantized_input(name):
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    graph = canonicalize(capture_module(model, (torch.randn(3, 32),)))
    spec = Scheme.parse(name).activation
    last = graph.sites()[1]
    (value,) = last.inputs
    scale, zero = torch.tensor(0.02), None if spec.symmetric else torch.tensor(0, dtype=torch.uint8)
    if not spec.dynamic:
        graph.weights.set("scale", scale)
        graph.weights.set("zero", torch.tensor(0, dtype=torch.uint8))
    result = graph.quantize_input(
        value, last.nodes, spec, None if spec.dynamic else "scale", None if spec.dynamic or spec.symmetric else "zero"
    )
    graph.fx.lint()
    assert quantized_value(result) is value
    assert quantized_value(result.args[0]) is quantized_value(value) is quantized_value(7) is None
    assert activation_rounding(graph.fx.nodes) == {result, result.args[0]}
    assert graph.sites()[1].inputs == (result,)
    assert result.meta == {"dtype": torch.float32, "shape": value.meta["shape"]}
    assert result.args[0].meta == {"dtype": spec.code_dtype, "shape": value.meta["shape"]}
    along = -1 if spec.granularity == "per_token" else None
    with torch.no_grad():
        x = torch.randn(5, 32)
        hidden = model[1](model[0](x))
        if spec.dynamic:
            scale, chosen = canonical.choose_qparams(hidden, spec.code_dtype, along, spec.bits, spec.clip)
            zero = None if spec.symmetric else chosen
            assert result.args[1].meta["shape"] == ((*value.meta["shape"][:-1], 1) if along else ())
        place = (0, 0) if along is None else (-1, 6)
        codes = canonical.quantize(hidden, scale, zero, *place, spec.code_dtype, spec.bits)
        expected = model[2](canonical.dequantize(codes, scale, zero, *place, torch.float32))
        torch.testing.assert_close(run(graph, input_0=x)["output_0"], expected)
        assert (expected - model(x)).abs().max() > 1e-4
    again = rebuilt(stored(graph), graph)
    assert torch.equal(run(again, input_0=x)["output_0"], run(graph, input_0=x)["output_0"])
    with pytest.raises(PipelineError, match="quantized already"):
        graph.quantize_input(value, last.nodes, spec, "scale", None)
