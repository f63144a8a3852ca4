import pytest
import torch

from qcompiler.errors import VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Codebook, Csr
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.protocol.pass_base import (
    PassContext,
)
from qcompiler.protocol.ranges import activation_qparams
from qcompiler.protocol.verify import verify_graph
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


# --- codebooks --------------------------------------------------------------------------------------------------------


def squeezed(bits: int = 3, *, sparse: bool = True) -> Graph:
    """A chain of sites of 8 × 8, the first two with tables and, in every other row, one value added."""
    graph = chain()
    spec = Scheme.parse(f"w{bits}a16-lut").weight
    assert spec is not None
    graph.schemes = {"0": Scheme(spec), "1": Scheme(spec), "2": Scheme()}
    for site in graph.sites()[:2]:
        offsets = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4, 4], dtype=torch.int32)
        added = Csr(torch.ones(4, dtype=torch.float16), torch.tensor([0, 3, 7, 7], dtype=torch.int32), offsets)
        codes = torch.randint(1 << bits, (8, 8), dtype=torch.uint8)
        table = torch.randn(8, 1 << bits).sort().values.half()
        graph.set_weight(site, Codebook(codes, table, added if sparse else None, spec))
    return graph


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_legal_codebooks(bits, sparse):
    verify_graph(squeezed(bits, sparse=sparse))


@pytest.mark.parametrize(
    ("name", "tensor", "dtype", "found"),
    [
        ("codes", torch.zeros(8, 8, dtype=torch.uint8), "uint4", "codes are uint4 (8, 8), not uint3 (8, 8)"),
        ("codes", torch.zeros(8, 7, dtype=torch.uint8), "uint3", "codes are uint3 (8, 7), not uint3 (8, 8)"),
        ("table", torch.zeros(8, 4), None, "table has shape (8, 4), not (8, 8)"),
        ("table", torch.full((8, 8), torch.nan), None, "table is not finite"),
        ("sparse_values", torch.full((4,), torch.inf), None, "value of the sparse matrix is not finite"),
        ("sparse_values", torch.ones(3), None, "do not belong together"),
        ("sparse_row_offsets", torch.zeros(8, dtype=torch.int32), None, "do not belong together"),
        ("sparse_row_offsets", torch.arange(9, dtype=torch.int32), None, "do not follow one another"),
        ("sparse_row_offsets", torch.tensor([0, 2, 1, 2, 2, 3, 3, 4, 4], dtype=torch.int32), None, "do not follow"),
        ("sparse_columns", torch.tensor([0, 8, 1, 1], dtype=torch.int32), None, "outside of the weight"),
        ("sparse_columns", torch.tensor([0, -1, 1, 1], dtype=torch.int32), None, "outside of the weight"),
    ],
)
def test_planted_codebooks(name, tensor, dtype, found):
    graph = squeezed()
    graph.weights.set(f"1.weight_{name}", tensor, dtype)
    text = problem(graph)
    assert "where: 1" in text
    assert found in text


@pytest.mark.parametrize(("made", "stated"), [("w3a16-lut", "w3a16-channel"), ("w4a16-channel", "w4a16-lut")])
def test_a_codebook_where_the_scheme_has_a_grid_and_the_other_way_round(made, stated):
    graph = squeezed() if made.endswith("lut") else quantized(made)
    graph.schemes["1"] = Scheme.parse(stated)
    assert "a codebook where the scheme has scales, or the other way round" in problem(graph)


# --- activations ------------------------------------------------------------------------------------------------------


def rounded(scheme: str) -> Graph:
    """As `quantized`, with the inputs of the two sites rounded; no calibration: ranges are made up."""
    graph = quantized(scheme)
    for name in ("0", "1"):
        spec = graph.schemes[name].activation
        assert spec is not None
        (site,) = (site for site in graph.sites() if site.name == name)
        scale = zero = None
        if not spec.dynamic:
            qparams = activation_qparams(-1.0, 2.0, spec)
            scale = f"{name}.input_scale"
            graph.weights.set(scale, qparams[0])
            if qparams[1] is not None:
                zero = f"{name}.input_zero_point"
                graph.weights.set(zero, qparams[1])
        graph.quantize_input(site.inputs[0], site.nodes, spec, scale, zero)
    return graph


ACTIVATIONS = ["w8a8", "w8a8-actsym", "w8a8-dynamic", "w8a8-dyntensor", "w4a8-g4", "fp8", "fp8-dynamic", "fp8-e5m2"]
ACTIVATIONS += ["w4a4-g4", "w4a4-g4-clip90", "w4a4-g4-actasym"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_legal_activations(name):
    verify_graph(rounded(name))


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-g4", "fp8-e5m2"])
def test_legal_float_weights(name):
    graph = rounded(name)
    assert graph.weights.info("0.weight_codes").dtype.startswith("float8")
    verify_graph(graph)


def test_a_float_activation_where_the_scheme_says_rounded():
    text = problem(quantized("w8a8"))
    assert "got: a float activation" in text
    assert "expected: int8 per_tensor asymmetric" in text
    assert "InsertQDQ" in text


def test_a_rounded_activation_without_a_scheme():
    graph = rounded("w8a8")
    graph.schemes["1"] = Scheme(graph.schemes["1"].weight)
    text = problem(graph)
    assert "where: 1" in text
    assert "got: a quantized activation" in text


@pytest.mark.parametrize(
    ("actual", "stated", "found"),
    [
        ("fp8", "fp8-e5m2", "codes are torch.float8_e4m3fn, not torch.float8_e5m2"),
        ("w4a8-g4-dynamic", "w4a4-g4", "codes are not of 4 bits"),
        ("w4a4-g4", "w4a4-g4-clip90", "a range of something else"),
        ("w8a8", "w8a8-actsym", "codes are torch.uint8, not torch.int8"),
        ("w8a8", "w8a8-actsym", "a zero point where the scheme is symmetric"),
        ("w8a8-actsym", "w8a8", "none where it is not"),
        ("w8a8", "w8a8-dyntensor", "a range that is static where the scheme is dynamic"),
        ("w8a8-dyntensor", "w8a8", "or the other way round"),
        ("w8a8-dyntensor-actsym", "w8a8-dynamic", "scales run along (axis, block) (0, 0), not (-1, 8)"),
        ("w8a8-dyntensor-actsym", "w8a8-dynamic", "a range of something else"),
    ],
)
def test_other_activation_formats_than_the_scheme_s(actual, stated, found):
    graph = rounded(actual)
    graph.schemes["1"] = Scheme(graph.schemes["1"].weight, Scheme.parse(stated).activation)
    text = problem(graph)
    assert "where: 1" in text
    assert found in text


@pytest.mark.parametrize(
    ("name", "tensor", "found"),
    [
        ("input_scale", torch.tensor(0.0), "not all positive and finite"),
        ("input_scale", torch.tensor(-1.0), "not all positive and finite"),
        ("input_scale", torch.tensor(torch.inf), "not all positive and finite"),
        ("input_scale", torch.ones(1), "1.input_scale is not one number"),
        ("input_zero_point", torch.tensor(3, dtype=torch.int8), "zero point is not uint8"),
    ],
)
def test_planted_ranges(name, tensor, found):
    graph = rounded("w8a8")
    graph.weights.set(f"1.{name}", tensor)
    assert found in problem(graph)


def test_dequantized_with_another_scale():
    graph = rounded("w8a8")
    first, second = (site.inputs[0] for site in graph.sites()[:2])
    second.update_arg(1, first.args[1])
    assert "not dequantized with the scale it was quantized with" in problem(graph)


def test_a_range_of_another_value():
    graph = rounded("w8a8-dynamic")
    first, second = (site.inputs[0].args[0] for site in graph.sites()[:2])
    second.args[1].args[0].update_arg(0, first.args[0])
    assert "a range of something else" in problem(graph)
