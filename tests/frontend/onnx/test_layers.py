"""Weights as other programs pack them."""

import pytest
import torch
from onnx import TensorProto, helper

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.onnx import capture_onnx
from qcompiler.protocol.verify import verify_graph
from tests.frontend.onnx.exported import by_onnxruntime, computed, port, saved, tensor

ROWS, COLUMNS, BLOCK = 24, 40, 16


def packed(codes, bits):
    """uint8 codes ``[rows, n]``, the first in the low bits."""
    per = 8 // bits
    shifts = torch.arange(per) * bits
    return (codes.reshape(*codes.shape[:-1], -1, per).int() << shifts).sum(-1).to(torch.uint8)


def product(folder, bits, zeros, *, drop=0):
    """A MatMulNBits of 40 columns in blocks of 16, the last one short."""
    groups = -(-COLUMNS // BLOCK)
    codes = torch.randint(0, 1 << bits, (ROWS, groups * BLOCK)).to(torch.uint8)
    scales = torch.rand(ROWS, groups) * 0.1 + 0.01
    data = packed(codes, bits).reshape(ROWS, groups, -1)
    names = ["x", "proj.qweight", "scales"]
    initializers = [tensor("proj.qweight", data[: ROWS - drop]), tensor("scales", scales)]
    if zeros:
        points = torch.randint(0, 1 << bits, (ROWS, groups)).to(torch.uint8)
        per = 8 // bits
        padded = torch.nn.functional.pad(points, (0, -groups % per))
        initializers.append(tensor("zeros", packed(padded, bits).reshape(-1)))
        names.append("zeros")
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=COLUMNS, N=ROWS, bits=bits, block_size=BLOCK
    )
    path = saved(folder, [node], [port("x", ["b", COLUMNS])], [port("y", ["b", ROWS])], initializers)
    return path, codes[:, :COLUMNS]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_packed_codes(tmp_path, bits, zeros):
    path, codes = product(tmp_path, bits, zeros)
    graph = capture_onnx(path)
    (site,) = graph.sites()
    assert site.name == "proj"
    middle = 0 if zeros else 1 << (bits - 1)
    assert torch.equal(graph.weights.read("proj.weight_codes").int(), codes.int() - middle)
    assert str(graph.schemes["proj"].weight).startswith(f"int{bits} g{BLOCK}")
    verify_graph(graph)
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(computed(graph, [x])[0], by_onnxruntime(path, {"x": x})[0], rtol=1e-3, atol=1e-3)


def test_codes_that_do_not_fill_their_shape(tmp_path):
    path, _ = product(tmp_path, 4, False, drop=1)
    with pytest.raises(WeightError, match="do not fill their shape"):
        capture_onnx(path)


def test_codes_that_are_computed(tmp_path):
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=16, N=4, bits=4, block_size=16
    )
    given = [port("x", ["b", 16]), port("w", [4, 1, 8], TensorProto.UINT8), port("s", [4, 1])]
    path = saved(tmp_path, [node], given, [port("y", ["b", 4])], [])
    with pytest.raises(UnsupportedModelError, match="a form that is not read"):
        capture_onnx(path)


def test_a_table_of_packed_codes(tmp_path):
    codes = torch.randint(0, 16, (10, 32)).to(torch.uint8)
    scales = torch.rand(10, 2) + 0.1
    node = helper.make_node(
        "GatherBlockQuantized",
        ["table.weight_Q4", "ids", "scales"],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=16,
        bits=4,
    )
    stored = [tensor("table.weight_Q4", packed(codes, 4)), tensor("scales", scales)]
    ids = port("ids", ["b", "s"], TensorProto.INT64)
    path = saved(tmp_path, [node], [ids], [port("y", ["b", "s", 32])], stored)
    graph = capture_onnx(path)
    assert "table.weight_codes" in graph.weights
    given = torch.tensor([[3, 1, 9]])
    expected = by_onnxruntime(path, {"ids": given})[0]
    torch.testing.assert_close(computed(graph, [given])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_pairs_by_channel(tmp_path, signed):
    """int8 with zeros, or uint8 around 128: the same codes."""
    codes = torch.randint(-128, 128, (32, 8)).to(torch.int8)
    stored = codes if signed else (codes.int() + 128).to(torch.uint8)
    zeros = torch.zeros(8, dtype=torch.int8) if signed else torch.full((8,), 128, dtype=torch.uint8)
    scale = torch.rand(8) + 0.01
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.weight_quantized", "s", "z"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "bias"], ["y"]),
    ]
    parts = [tensor("fc.weight_quantized", stored), tensor("s", scale), tensor("z", zeros)]
    bias = torch.randn(8)
    parts.append(tensor("bias", bias))
    path = saved(tmp_path, nodes, [port("x", ["b", 32])], [port("y", ["b", 8])], parts)
    graph = capture_onnx(path)
    (site,) = graph.sites()
    assert (site.name, site.bias) == ("fc", "bias")
    assert torch.equal(graph.weights.read("fc.weight_codes"), codes.t())
    assert str(graph.schemes["fc"].weight) == "int8 per_channel symmetric"
    x = torch.randn(2, 32)
    torch.testing.assert_close(computed(graph, [x])[0], x @ (codes * scale) + bias, rtol=1e-4, atol=1e-3)
