import pytest
import torch

from qcompiler.errors import VerificationError
from qcompiler.graph import Graph
from qcompiler.pass_base import PassContext
from qcompiler.passes import RTN
from qcompiler.spec import Scheme
from qcompiler.verify import verify_graph
from tests.tiny_graphs import chain, language_model


def quantized(scheme: str) -> Graph:
    """Three sites of 8 × 8; only the last is left in float."""
    graph = chain()
    graph.schemes = {name: Scheme.parse(scheme) for name in ("0", "1")} | {"2": Scheme()}
    RTN().rewrite(graph.sites()[:2], {}, PassContext(graph, torch.device("cpu"), 0))
    return graph


def problem(graph: Graph) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_graph(graph)
    return str(caught.value)


@pytest.mark.parametrize("options", ["", "-asym"])
@pytest.mark.parametrize("name", ["w4a16-g4", "w3a16-g5", "w8a16", "w2a16-tensor", "w4a16-channel"])
def test_legal_graphs(name, options):
    verify_graph(quantized(name + options))


def test_a_float_graph_without_schemes():
    verify_graph(language_model())


def test_float_weight_where_the_scheme_says_quantized():
    graph = quantized("w4a16-g4")
    graph.schemes["2"] = Scheme.parse("w4a16-g4")
    text = problem(graph)
    assert "where: 2" in text
    assert "got: a float weight" in text
    assert "expected: int4 g4 symmetric" in text


@pytest.mark.parametrize("scheme", [None, Scheme()])
def test_quantized_weight_without_a_scheme(scheme):
    graph = quantized("w4a16-g4")
    graph.schemes.pop("1")
    if scheme is not None:
        graph.schemes["1"] = scheme
    assert "got: a quantized weight" in problem(graph)


@pytest.mark.parametrize(
    ("name", "tensor", "dtype", "found"),
    [
        ("weight_scale", torch.ones(8, 3), None, "scale has shape (8, 3), not (8, 2)"),
        ("weight_scale", torch.ones(8), None, "scale has shape (8,), not (8, 2)"),
        ("weight_scale", -torch.ones(8, 2), None, "not all positive"),
        ("weight_scale", torch.zeros(8, 2), None, "not all positive"),
        ("weight_scale", torch.full((8, 2), torch.inf), None, "not all positive and finite"),
        ("weight_scale", torch.full((8, 2), torch.nan), None, "not all positive and finite"),
        ("weight_codes", torch.zeros(8, 8, dtype=torch.uint8), "uint8", "codes are uint8, not uint4"),
        ("weight_codes", torch.zeros(8, 8, dtype=torch.int8), "int4", "codes are int4, not uint4"),
        ("weight_codes", torch.zeros(8, 6, dtype=torch.uint8), "uint4", "codes have shape (8, 6), not (8, 8)"),
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.uint8), "uint8", "zero point is uint8 (8, 2)"),
        ("weight_zero_point", torch.zeros(8, 1, dtype=torch.uint8), "uint4", "zero point is uint4 (8, 1)"),
    ],
)
def test_planted_tensors(name, tensor, dtype, found):
    graph = quantized("w4a16-g4-asym")
    graph.weights.set(f"1.{name}", tensor, dtype)
    text = problem(graph)
    assert "where: 1" in text
    assert found in text


def test_a_scale_that_is_not_stored():
    graph = quantized("w4a16-g4")
    graph.weights.remove("0.weight_scale")
    assert "where: 0.weight_scale" in problem(graph)


def test_zero_point_against_the_scheme():
    graph = quantized("w4a16-g4-asym")
    graph.sites()[0].nodes[0].args[1].update_arg(2, None)
    assert "none where it is not" in problem(graph)


def test_scales_along_the_wrong_axis():
    graph = quantized("w4a16-g4")
    graph.sites()[0].nodes[0].args[1].update_arg(3, 0)
    assert "scales run along (axis, block) (0, 4), not (1, 4)" in problem(graph)


def test_every_problem_of_a_weight_is_listed():
    graph = quantized("w4a16-g4")
    graph.weights.set("0.weight_scale", torch.zeros(3))
    text = problem(graph)
    assert "shape" in text
    assert "positive" in text


def test_nodes_out_of_order():
    graph = quantized("w4a16-g4")
    first, last = graph.sites()[0].nodes[0], graph.sites()[2].nodes[0]
    last.append(first)
    assert "not well-formed" in problem(graph)


def test_ports_against_the_signature():
    graph = chain()
    graph.fx.output_node().args = ((graph.outputs[0], graph.outputs[0]),)
    assert "got: 1 inputs and 2 outputs" in problem(graph)
