"""Graphs with 4-bit floats and squares of 8-bit ones, legal and not."""

import pytest
import torch

from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes import RTN
from qcompiler.protocol.pass_base import (
    PassContext,
)
from qcompiler.protocol.verify import (
    verify_graph,
)
from tests.protocol.test_verify import problem, quantized, rounded
from tests.tiny_graphs import chain

# --- 4-bit floats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp4-ceil"])
def test_legal_four_bit_floats(name):
    verify_graph(rounded(name))
    verify_graph(quantized(name.replace("fp4", "fp4a16")))


@pytest.mark.parametrize(
    ("scheme", "name", "tensor", "dtype", "found"),
    [
        ("nvfp4a16", "codes", torch.zeros(8, 8, dtype=torch.int8), "int4", "codes: int4 (8, 8), not uint4"),
        ("nvfp4a16", "scale", torch.ones(8, 1), None, "scale: float32 (8, 1), not float8_e4m3fn"),
        ("nvfp4a16", "scale", torch.zeros(8, 1).to(torch.float8_e4m3fn), None, "scales are not all positive"),
        ("nvfp4a16", "scale", torch.ones(8, 2).to(torch.float8_e4m3fn), None, "not float8_e4m3fn (8, 1)"),
        ("mxfp4a16", "scale", torch.full((8, 1), 255, dtype=torch.uint8), None, "scales are not all positive"),
        ("nvfp4a16", "factor", torch.ones(1), None, "factor is float32 (1,), not one float32 number"),
        ("nvfp4a16", "factor", torch.tensor(1.0).half(), None, "factor is float16 (), not one float32 number"),
        ("nvfp4a16", "factor", torch.tensor(-1.0), None, "the factor is not positive and finite"),
    ],
)
def test_planted_four_bit_floats(scheme, name, tensor, dtype, found):
    graph = quantized(scheme)
    graph.weights.set(f"1.weight_{name}", tensor, dtype=dtype)
    text = problem(graph)
    assert "where: 1" in text
    assert found in text


@pytest.mark.parametrize(
    ("made", "stated", "found"),
    [
        ("nvfp4a16", "w4a16-g16", "4-bit floats where the scheme has other codes"),
        ("w4a16-g16", "mxfp4a16", "or the other way round"),
        ("mxfp4a16", "nvfp4a16", "no factor where scales are relative to one"),
    ],
)
def test_other_weights_than_four_bit_floats_of_the_scheme(made, stated, found):
    graph = quantized(made)
    graph.schemes["1"] = Scheme.parse(stated)
    assert found in problem(graph)


def test_other_blocks_than_the_scheme_s():
    graph = quantized("nvfp4a16")
    graph.sites()[1].nodes[0].args[1].update_arg(3, 4)
    assert "blocks of 4, not 8" in problem(graph)


@pytest.mark.parametrize(
    ("actual", "stated", "found"),
    [
        ("w8a8", "nvfp4", "4-bit floats where the scheme has other codes"),
        ("nvfp4", "w8a8", "or the other way round"),
        ("mxfp4", "mxfp4-ceil", "scales of something else"),
        ("nvfp4", "mxfp4", "or one where they are not"),
    ],
)
def test_other_rounded_activations_than_four_bit_floats_of_the_scheme(actual, stated, found):
    graph = rounded(actual)
    graph.schemes["1"] = Scheme(graph.schemes["1"].weight, Scheme.parse(stated).activation)
    assert found in problem(graph)


def test_four_bit_floats_with_the_scales_of_others():
    graph = rounded("mxfp4")
    first, second = (site.inputs[0] for site in graph.sites()[:2])
    second.args[0].args[1].update_arg(0, first.args[0].args[0])
    assert "scales of something else" in problem(graph)
    graph = rounded("mxfp4")
    first, second = (site.inputs[0] for site in graph.sites()[:2])
    second.update_arg(1, first.args[1])
    assert "not dequantized with the scale it was quantized with" in problem(graph)
    graph = rounded("mxfp4")
    (node,) = (site.inputs[0] for site in graph.sites()[1:2])
    node.update_arg(3, 4)
    node.args[0].update_arg(3, 4)
    assert "blocks of 4, not 8" in problem(graph)


def test_four_bit_floats_with_a_stored_scale():
    graph = rounded("mxfp4")
    node = graph.sites()[1].inputs[0]
    stored = graph.sites()[1].nodes[0].args[1].args[1]
    node.update_arg(1, stored)
    node.args[0].update_arg(1, stored)
    assert "scales of blocks that are not computed from the value" in problem(graph)


def test_a_factor_of_activations_that_is_none():
    graph = rounded("nvfp4")
    graph.weights.set("1.input_scale", torch.tensor(0.0))
    assert "the factor is not positive and finite" in problem(graph)


def with_squares(side: int) -> Graph:
    graph = chain()
    spec = QuantSpec("float8_e4m3fn", "per_block", side)
    graph.schemes = {name: Scheme(spec) for name in ("0", "1")} | {"2": Scheme()}
    RTN().rewrite(graph.sites()[:2], {}, PassContext(graph, torch.device("cpu"), 0))
    return graph


@pytest.mark.parametrize("side", [3, 4, 8, 128])
def test_legal_squares(side):
    verify_graph(with_squares(side))


def test_squares_of_another_size():
    graph = with_squares(4)
    graph.schemes["1"] = Scheme(QuantSpec("float8_e4m3fn", "per_block", 3))
    text = problem(graph)
    assert "scale has shape (2, 2), not (3, 3)" in text
    assert "scales run along (axis, block) (1, 4), not (1, 3)" in text
