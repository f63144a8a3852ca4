"""Tables of values and sparse matrices in ONNX: stored as they are, a float weight once the model is loaded."""

from collections import Counter

import onnx
import pytest
import torch

from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Codebook, Csr
from qcompiler.lowering.onnx import OnnxTarget, lower
from qcompiler.numerics.scheme import Scheme
from tests.lowering.onnx.harness import GraphMaker

canonical = torch.ops.qcompiler


def squeezed_linear(
    maker: GraphMaker, bits: int, sparse: int, rows: int = 24, width: int = 40
) -> tuple[Graph, Codebook]:
    """One linear layer whose weight is a codebook with ``sparse`` values added."""
    spec = Scheme.parse(f"w{bits}a16-lut").weight
    assert spec is not None
    apart = torch.zeros(rows * width, dtype=torch.bool)
    apart[torch.randperm(rows * width)[:sparse]] = True
    apart = apart.reshape(rows, width)
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = apart.sum(-1).cumsum(0)
    added = Csr(torch.randn(sparse).bfloat16(), apart.nonzero()[:, 1].to(torch.int32), offsets)
    table = torch.randn(rows, 1 << bits).sort().values.bfloat16()
    codes = torch.randint(1 << bits, (rows, width), dtype=torch.uint8)
    quantized = Codebook(codes, table, added if sparse else None, spec)
    x = maker.input(torch.randn(7, 5, width))
    weight, bias = maker.weight("site.weight", torch.randn(rows, width)), maker.weight("site.bias", torch.randn(rows))
    node = maker.call(canonical.linear.default, x, weight, bias)
    node.meta["weight_shape"] = (rows, width)
    graph = maker.graph(node)
    graph.schemes["site"] = Scheme(spec)
    graph.set_weight(graph.sites()[0], quantized)
    return graph, quantized


@pytest.mark.parametrize(("bits", "opset"), [(2, 21), (3, 21), (4, 21), (4, 23), (2, 25)])
@pytest.mark.parametrize("sparse", [0, 31])
def test_equals_the_float_layer_and_is_one_in_the_runtime(bits, opset, sparse, maker, run_onnx, optimized, tmp_path):
    graph, quantized = squeezed_linear(maker, bits, sparse)
    bias = graph.weights.read("site.bias")
    lower(graph, tmp_path / "model", opset=opset)
    kinds = Counter(node.op_type for node in optimized(tmp_path / "model").graph.node)
    assert set(kinds) <= {"MatMul", "Add", "Gemm", "Reshape", "FusedMatMul"}
    for shape in ((2, 3, 40), (1, 1, 40)):
        x = torch.randn(shape)
        (found,) = run_onnx(graph, x, opset=opset)
        torch.testing.assert_close(found, x @ quantized.dequantize().T + bias, rtol=1e-5, atol=1e-5)


def test_float16(maker, run_onnx):
    graph, quantized = squeezed_linear(maker, 3, 31)
    x = torch.randn(2, 3, 40)
    (found,) = run_onnx(graph, x, float_dtype="float16")
    torch.testing.assert_close(
        found.float(), x @ quantized.dequantize().T + graph.weights.read("site.bias"), rtol=0.02, atol=0.05
    )


def test_as_written(maker, tmp_path):
    graph, _ = squeezed_linear(maker, 3, 31)
    report = lower(graph, tmp_path / "model")
    model = onnx.load(tmp_path / "model" / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["Cast", "GatherElements", "Reshape", "ScatterElements", "Reshape", "Transpose", "MatMul", "Add"]
    shapes = {t.name: (t.data_type, list(t.dims)) for t in model.graph.initializer}
    assert shapes["site.weight_codes"] == (onnx.TensorProto.UINT4, [24, 40])
    assert shapes["site.weight_table"] == (onnx.TensorProto.FLOAT, [24, 8])
    assert shapes["site.weight_sparse_places"] == (onnx.TensorProto.INT32, [31])
    assert shapes["site.weight_sparse_values"] == (onnx.TensorProto.FLOAT, [31])
    assert "site/MatMul" in {node.name for node in model.graph.node}
    (site,) = report["sites"].values()
    assert (site["codes"], site["stored"], site["block"], site["status"]) == ("uint3", "uint4", None, "runs")
    assert "codebook" in report["notes"][0]
    assert report["weight_bytes"] == 24 * 40 // 2 + 4 * (24 * 8 + 2 * 31 + 24)


@pytest.mark.parametrize(("bits", "opset", "widened"), [(2, 21, True), (2, 25, False), (3, 21, True), (4, 21, False)])
def test_what_the_target_says(bits, opset, widened):
    support = OnnxTarget(opset=opset).supports(Scheme.parse(f"w{bits}a16-lut"), 4096)
    assert support.status == "runs"
    assert "float weight" in support.reason
    assert ("stored in 4 bits" in support.reason) is widened
