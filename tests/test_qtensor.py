import pytest
import torch

from qcompiler import numerics
from qcompiler.graph import Graph
from qcompiler.qtensor import Affine
from qcompiler.spec import QuantSpec
from tests.tiny_graphs import chain


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
