import pytest
import torch

from qcompiler import numerics
from qcompiler.errors import PipelineError
from qcompiler.graph import Graph, is_quantized_weight, stored_names
from qcompiler.qtensor import Affine, Codebook, Csr
from qcompiler.report import quantized_bits_per_weight
from qcompiler.spec import QuantSpec
from tests.tiny_graphs import chain, interpret


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
