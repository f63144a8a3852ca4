import pytest
import torch

from qcompiler import numerics
from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph, is_quantized_weight, stored_names
from qcompiler.ir.qtensor import Affine, Codebook, Csr
from qcompiler.numerics import fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.reporting.report import quantized_bits_per_weight
from tests.tiny_graphs import Maker, chain, interpret, other


def affine(x: torch.Tensor, spec: QuantSpec, scale_dtype: torch.dtype = torch.float16) -> Affine:
    scale, zero = numerics.min_max_qparams(x, spec, scale_dtype)
    return Affine(numerics.quantize(x, scale, zero, spec), scale, zero, spec, scale_dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize(symmetric):
    spec = QuantSpec("int4", "per_group", 8, symmetric)
    x = torch.randn(4, 16)
    found = affine(x, spec).dequantize()
    assert found.dtype == torch.float32
    assert torch.equal(found, numerics.fake_quantize(x, *numerics.min_max_qparams(x, spec, torch.float16), spec))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w3a16-channel-asym", "fp8", "nvfp4", "mxfp4"])
def test_codes_under_scales_of_ones_choice(scheme):
    spec = Scheme.parse(scheme).weight
    x = torch.randn(4, 16)
    scale, zero = numerics.mse_qparams(x, spec, spec.scale_torch_dtype(torch.float16))
    found = Affine.of(x, scale, zero, spec, torch.float16)
    assert torch.equal(found.codes, numerics.quantize(x, scale, zero, spec))
    assert (found.scale is scale, found.zero_point is zero, found.spec) == (True, True, spec)
    assert found.scale_dtype == torch.float16
    assert (found.factor is not None) is spec.has_factor
    assert torch.equal(found.dequantize(), numerics.fake_quantize(x, scale, zero, spec))


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec("int4", "per_group", 8), 64 * 4 + 8 * 16),
        (QuantSpec("int4", "per_group", 8, symmetric=False), 64 * 4 + 8 * (16 + 4)),
        (QuantSpec("int8", "per_channel", None), 64 * 8 + 8 * 16),
        (QuantSpec("int2", "per_tensor", None), 64 * 2 + 16),
        (QuantSpec("float8_e4m3fn", "per_channel", None), 64 * 8 + 8 * 16),
    ],
    ids=str,
)
def test_stored_bits(spec, bits):
    assert affine(torch.randn(8, 8), spec).stored_bits == bits


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("int4", "per_group", 4, symmetric=False), QuantSpec("float8_e5m2", "per_channel", None)],
    ids=str,
)
def test_stored_bits_are_what_the_store_needs(spec):
    graph: Graph = chain(sites=1, width=8)
    (site,) = graph.sites()
    quantized = affine(graph.weights.read(site.weight), spec)
    graph.set_weight(site, quantized)
    assert 8 * graph.weights.stored_bytes(graph.weight_names()) == quantized.stored_bits


def codebook(*, sparse: bool) -> Codebook:
    """8 × 8 codes of three bits, float16 tables, five values added."""
    offsets = torch.tensor([0, 2, 2, 3, 3, 3, 3, 3, 5], dtype=torch.int32)
    columns = torch.tensor([1, 7, 0, 2, 3], dtype=torch.int32)
    added = Csr(torch.randn(5).half(), columns, offsets)
    spec = QuantSpec("int3", "per_channel", None, codebook=True)
    return Codebook(
        torch.randint(8, (8, 8), dtype=torch.uint8), torch.randn(8, 8).half(), added if sparse else None, spec
    )


def test_a_codebook_and_what_is_added_to_it():
    quantized = codebook(sparse=True)
    assert quantized.sparse is not None
    expected = quantized.table.float().gather(1, quantized.codes.long())
    assert torch.equal(codebook_without_sparse(quantized).dequantize(), expected)
    for row, column, value in zip((0, 0, 2, 7, 7), quantized.sparse.columns, quantized.sparse.values, strict=True):
        expected[row, column] += float(value)
    assert torch.equal(quantized.dequantize(), expected)


def codebook_without_sparse(quantized: Codebook) -> Codebook:
    return Codebook(quantized.codes, quantized.table, None, quantized.spec)


@pytest.mark.parametrize("sparse", [True, False])
def test_all_of_a_codebook_counts_and_survives_the_graph(sparse):
    graph: Graph = chain(sites=1, width=8)
    (site,) = graph.sites()
    quantized = codebook(sparse=sparse)
    graph.set_weight(site, quantized)
    assert quantized.stored_bits == 64 * 3 + 64 * 16 + (5 * (16 + 32) + 9 * 32 if sparse else 0)
    assert 8 * graph.weights.stored_bytes(graph.weight_names()) == quantized.stored_bits
    assert quantized_bits_per_weight(graph) == quantized.stored_bits / 64
    (again,) = graph.sites()
    assert (again.name, again.weight) == (site.name, site.weight)
    node = again.nodes[0].args[1]
    assert is_quantized_weight(node)
    assert graph.weights.info(stored_names(node)[0]).dtype == "uint3"
    assert site.weight not in graph.weights
    x = torch.randn(3, 8)
    found = interpret(graph, {graph.inputs[0]: x})[graph.outputs[0].name]
    torch.testing.assert_close(found, x @ quantized.dequantize().T)
    with pytest.raises(PipelineError, match="quantized already"):
        graph.set_weight(again, quantized)


@pytest.mark.parametrize(
    ("scheme", "bits"), [("nvfp4a16", 1600 * 4 + 40 * 3 * 8 + 32), ("mxfp4a16", 1600 * 4 + 40 * 2 * 8)]
)
def test_four_bit_floats_survive_the_graph(scheme, bits):
    """Codes, one-byte scales and the factor are stored, and give the same numbers when read."""
    graph: Graph = chain(sites=1, width=40)
    (site,) = graph.sites()
    spec = Scheme.parse(scheme).weight
    weight = graph.weights.read(site.weight)
    scale, _ = numerics.min_max_qparams(weight, spec, spec.scale_torch_dtype(weight.dtype))
    factor = numerics.scale_factor(weight, spec)
    codes = numerics.quantize(weight, scale, None, spec)
    quantized = Affine(codes, scale, None, spec, spec.scale_torch_dtype(weight.dtype), factor)
    graph.set_weight(site, quantized)
    store = graph.weights
    assert 8 * store.stored_bytes(graph.weight_names()) == quantized.stored_bits == bits
    assert store.info(f"{site.weight}_codes").dtype == "uint4"
    assert store.info(f"{site.weight}_scale").dtype == ("float8_e4m3fn" if spec.has_factor else "uint8")
    stored = store.read(f"{site.weight}_scale")
    assert torch.equal(fp4.decode_scale(stored, factor), scale)
    node = site.nodes[0].args[1]
    values = [None if n is None else store.read(n.target) for n in node.args[:3]]
    assert torch.equal(node.target(*values, *node.args[3:]), quantized.dequantize())


def test_every_stored_scale_comes_back():
    """The product with the factor is rounded; the quotient still finds the E4M3 number it was made from."""
    nv, mx = (Scheme.parse(name).weight for name in ("nvfp4a16", "mxfp4a16"))
    everything = torch.arange(1, 127, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    for factor in (torch.rand(200) + 0.5).unbind():
        scale = fp4.decode_scale(everything, factor)
        found = Affine(torch.zeros(1, 126 * 16), scale, None, nv, torch.float8_e4m3fn, factor).stored_scale
        assert torch.equal(found.float(), everything.float())
    exponents = torch.arange(255, dtype=torch.int32).to(torch.uint8)[None]
    scale = fp4.decode_scale(exponents, None)
    found = Affine(torch.zeros(1, 255 * 32), scale, None, mx, torch.float8_e8m0fnu).stored_scale
    assert torch.equal(found, exponents)


@pytest.mark.parametrize("side", [4, 5, 8, 16, 40])
def test_squares_survive_the_graph(side):
    """One float32 scale per square is stored, and the operator finds it again; a side may be wider than the weight."""
    make = Maker()
    x = make.fx.placeholder("x")
    graph = make.graph([other("x", "batch", 7)], {other("y", "batch", 24): make.linear(x, "0", 24, 7)})
    (site,) = graph.sites()
    spec = QuantSpec("float8_e4m3fn", "per_block", side)
    quantized = affine(graph.weights.read(site.weight), spec, torch.float32)
    graph.set_weight(site, quantized)
    count = (-(-24 // side), -(-7 // side))
    assert graph.weights.info(f"{site.weight}_scale").shape == count
    bits = 24 * 7 * 8 + count[0] * count[1] * 32
    assert 8 * graph.weights.stored_bytes(graph.weight_names()) == quantized.stored_bits == bits
    node = site.nodes[0].args[1]
    codes, scale = (graph.weights.read(n.target) for n in node.args[:2])
    assert torch.equal(node.target(codes, scale, *node.args[2:]), quantized.dequantize())
