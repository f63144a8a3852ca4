"""Rounded activations: exact in ONNX Runtime, and fused where the target says so."""

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Affine
from qcompiler.lowering.onnx import OnnxTarget, lower
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.protocol.ranges import activation_qparams
from tests.lowering.onnx.harness import GraphMaker, open_session

canonical = torch.ops.qcompiler
FUSED = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
SYMBOLIC, FIXED, MATRIX = (7, 5, 64), (2, 3, 64), (7, 64)  # 7 and 5 stand for batch and sequence

INTEGERS = ["w8a8", "w8a8-asym", "w8a8-tensor", "w8a8-actsym", "w8a8-dyntensor", "w8a8-dyntensor-actsym"]
UNFUSED = [
    "w8a8-dynamic",
    "w4a8-g32-dynamic-actasym",
    "w8a8-g32-dynamic",
    "w4a8-g32",
    "w4a8-channel",
    "w3a8-g32-dynamic",
    "w4a4-g32",
    "w4a4-g32-clip90",
    "w4a4-g32-actasym",
    "w4a4-dyntensor",
]
FLOATS = ["fp8", "fp8-tensor", "fp8-g32", "fp8-e5m2", "fp8-dynamic", "fp8-dyntensor", "fp8-e5m2-dynamic"]


def quantized_linear(
    maker: GraphMaker, scheme: Scheme, shape: tuple[int, ...] = SYMBOLIC, rows: int = 48, *, bias: bool = True
) -> Graph:
    """One linear layer as the passes leave it."""
    width = shape[-1]
    x = maker.input(torch.randn(shape))
    weight = maker.weight("site.weight", torch.randn(rows, width) / 8)
    shift = [maker.weight("site.bias", torch.randn(rows))] if bias else []
    node = maker.call(canonical.linear.default, x, weight, *shift)
    node.meta["weight_shape"] = (rows, width)
    graph = maker.graph(node)
    (site,) = graph.sites()
    graph.schemes["site"] = scheme
    spec = scheme.weight
    if spec is not None:
        value = graph.weights.read("site.weight")
        scale, zero = numerics.min_max_qparams(value, spec, torch.float32)
        codes = numerics.quantize(value, scale, zero, spec)
        graph.set_weight(site, Affine(codes, scale, zero, spec, torch.float32))
    names: dict[str, str] = {}
    activation = scheme.activation
    assert activation is not None
    if not activation.dynamic:
        for name, tensor in zip(("scale", "zero_point"), activation_qparams(-2.5, 3.0, activation), strict=True):
            if tensor is not None:
                names[name] = f"site.input_{name}"
                graph.weights.set(names[name], tensor)
    graph.quantize_input(x, site.nodes, activation, names.get("scale"), names.get("zero_point"))
    return graph


def weights_alone(maker: GraphMaker, scheme: Scheme) -> Graph:
    """A layer whose input is not rounded."""
    x, weight = maker.input(torch.randn(SYMBOLIC)), maker.weight("site.weight", torch.randn(48, 64) / 8)
    node = maker.call(canonical.linear.default, x, weight)
    node.meta["weight_shape"] = (48, 64)
    graph = maker.graph(node)
    (site,) = graph.sites()
    graph.schemes["site"] = scheme
    assert scheme.weight is not None
    value = graph.weights.read("site.weight")
    scale, zero = numerics.min_max_qparams(value, scheme.weight, torch.float32)
    codes = numerics.quantize(value, scale, zero, scheme.weight)
    graph.set_weight(site, Affine(codes, scale, zero, scheme.weight, torch.float32))
    return graph


def reference(graph: Graph, x: Tensor) -> Tensor:
    values = {}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = graph.weights.read(node.target)
        elif node.op == "call_function":
            values[node] = node.target(*fx.node.map_arg(node.args, values.__getitem__))
    return values[graph.outputs[0]]


def sized(shape: tuple[int, ...]) -> Tensor:
    return 1.3 * torch.randn([{7: 2, 5: 3}.get(size, size) for size in shape])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [SYMBOLIC, FIXED, MATRIX], ids=["symbolic", "fixed", "matrix"])
@pytest.mark.parametrize("name", [*INTEGERS, *UNFUSED, *FLOATS])
def test_linear_layers_are_exact_and_fused_as_promised(name, shape, bias, maker, optimized, run_onnx, tmp_path):
    scheme = Scheme.parse(name)
    graph = quantized_linear(maker, scheme, shape, bias=bias)
    report = lower(graph, tmp_path / "out")
    x = sized(shape)
    (result,) = run_onnx(graph, x, session=open_session(tmp_path / "out"))
    expected = reference(graph, x)
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()
    kinds = Counter(node.op_type for node in optimized(tmp_path / "out").graph.node)
    support = OnnxTarget().supports(scheme, 64)
    assert support.status == ("fused" if name in INTEGERS else "runs")
    assert report["sites"]["site"]["status"] == support.status
    if shape is not MATRIX or not bias:  # a matrix with a bias becomes a float Gemm
        assert sum(kinds[kind] for kind in FUSED) == (support.status == "fused")
        assert not kinds["DequantizeLinear"] or support.status == "runs"


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize(
    ("name", "default"),
    [("w8a8", "uint8"), ("w8a8-actsym", "uint8"), ("w8a8-tensor", "uint8"), ("w8a8-dynamic", "int8"), ("w8", "int8")],
)
def test_weights_of_integer_products_are_unsigned(name, default, kind, maker, tmp_path):
    """What is stored stands for the same numbers; int8 is only compared as written, as processors differ in it."""
    scheme = Scheme.parse("w8a16" if name == "w8" else name)
    graph = quantized_linear(maker, scheme) if name != "w8" else weights_alone(maker, scheme)
    report = lower(graph, tmp_path / "out", int8_weights=kind)
    stored = default if kind == "uint8" else "int8"
    assert report["sites"]["site"]["stored"] == stored
    model = onnx.load(tmp_path / "out" / "model.onnx")
    (node,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("site.weight"))
    found = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(int) for tensor in model.graph.initializer}
    middle = found[node.input[2]] if len(node.input) > 2 else 0
    codes = graph.weights.read("site.weight_codes").T.numpy().astype(int)
    assert (found[node.input[0]] - middle == codes).all()
    assert (found[node.input[0]].min() >= 0) == (stored == "uint8")


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8-actsym", "w8a8-dynamic", "w8a8-dyntensor", "w4a8-g32", "fp8", "fp8-e5m2"]
)
def test_float16(name, maker, run_onnx, tmp_path):
    scheme = Scheme.parse(name)
    graph = quantized_linear(maker, scheme)
    report = lower(graph, tmp_path / "out", float_dtype="float16")
    x = sized(SYMBOLIC).half().float()
    (result,) = run_onnx(graph, x, session=open_session(tmp_path / "out"))
    expected = reference(graph, x)
    assert result.dtype == torch.float32
    assert (result - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (result - expected).square().mean() <= 1e-5 * expected.square().mean()
    assert report["sites"]["site"]["status"] == "runs"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("w8a8-g32", "scales per channel"),
        ("w8a8-g32-actsym", "scales per channel"),
        ("w8a8-g32-dyntensor", "scales per channel"),
        ("w8a8-dynamic-actasym", "symmetric codes per token"),
    ],
)
def test_the_refused_form_fails_in_the_runtime(name, advice, maker, run_onnx):
    """Where this test fails one day, the refusal can go."""
    scheme = Scheme.parse(name)
    support = OnnxTarget().supports(scheme, 64)
    assert (support.status, advice in support.remedy) == ("refused", True)
    with pytest.raises(Exception, match=r"MatMulIntegerToFloat|DynamicQuantizeMatMul"):
        run_onnx(quantized_linear(maker, scheme), sized(SYMBOLIC))


def written(graph: Graph, directory) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    lower(graph, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return list(model.node), {tensor.name: tensor for tensor in model.initializer}


def test_static_integers_as_written(maker, tmp_path):
    nodes, tensors = written(quantized_linear(maker, Scheme.parse("w8a8"), bias=False), tmp_path / "out")
    assert [node.op_type for node in nodes] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    quantize, dequantize = nodes[:2]
    assert list(quantize.input[1:]) == ["site.input_scale", "site.input_zero_point"] == list(dequantize.input[1:])
    assert tensors["site.input_zero_point"].data_type == onnx.TensorProto.UINT8
    assert list(tensors["site.input_scale"].dims) == []


def test_symmetric_integers_have_an_explicit_zero_point(maker, tmp_path):
    nodes, tensors = written(quantized_linear(maker, Scheme.parse("w8a8-actsym"), bias=False), tmp_path / "out")
    zero = tensors[nodes[0].input[2]]
    assert zero.data_type == onnx.TensorProto.INT8
    assert onnx.numpy_helper.to_array(zero) == 0
    assert nodes[1].input[2] == nodes[0].input[2]


@pytest.mark.parametrize(("name", "kind"), [("fp8", "FLOAT8E4M3FN"), ("fp8-e5m2", "FLOAT8E5M2")])
def test_float_codes_as_written(name, kind, maker, tmp_path):
    graph = quantized_linear(maker, Scheme.parse(name), rows=4, bias=False)
    nodes, tensors = written(graph, tmp_path / "out")
    code = onnx.TensorProto.DataType.Value(kind)
    assert tensors["site.weight_codes"].data_type == code
    assert list(tensors["site.weight_codes"].dims) == [64, 4]
    assert (nodes[0].op_type, len(nodes[0].input)) == ("QuantizeLinear", 2)
    assert {a.name: a.i for a in nodes[0].attribute}["output_dtype"] == code
    stored = onnx.numpy_helper.to_array(tensors["site.weight_codes"]).astype("float32")
    assert torch.equal(torch.from_numpy(stored), graph.weights.read("site.weight_codes").float().T)


def test_a_range_of_the_whole_tensor_is_one_standard_operator(maker, tmp_path):
    nodes, _ = written(quantized_linear(maker, Scheme.parse("w8a8-dyntensor"), bias=False), tmp_path / "out")
    kinds = [node.op_type for node in nodes]
    assert kinds == ["DynamicQuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert list(nodes[1].input) == list(nodes[0].output)


def test_one_scale_per_token_as_written(maker, tmp_path):
    nodes, _ = written(quantized_linear(maker, Scheme.parse("w8a8-dynamic"), bias=False), tmp_path / "out")
    assert [node.op_type for node in nodes][:5] == ["Abs", "ReduceMax", "Div", "Max", "QuantizeLinear"]
    attributes = {a.name: a.i for a in nodes[4].attribute}
    assert (attributes["axis"], attributes["block_size"]) == (-1, 64)
    assert list(nodes[4].input[1:]) == list(nodes[5].input[1:])


def test_a_float_weight_under_rounded_activations(maker, run_onnx):
    scheme = Scheme(None, QuantSpec("int8", "per_tensor", None))
    graph = quantized_linear(maker, scheme)
    x = sized(SYMBOLIC)
    (result,) = run_onnx(graph, x)
    expected = reference(graph, x)
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert OnnxTarget().supports(scheme, 64).status == "runs"


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-dyntensor", "fp8-dynamic"])
@pytest.mark.parametrize("float_dtype", ["float32", "float16"])
def test_zeros_stay_zeros(name, float_dtype, maker, run_onnx):
    graph = quantized_linear(maker, Scheme.parse(name), bias=False)
    (result,) = run_onnx(graph, torch.zeros(2, 3, 64), float_dtype=float_dtype)
    assert not result.any()


@pytest.mark.parametrize("shape", [SYMBOLIC, MATRIX], ids=["symbolic", "matrix"])
@pytest.mark.parametrize("side", [16, 20, 48, 50, 128])
def test_scales_of_squares_are_repeated_for_every_row(side, shape, maker, run_onnx, tmp_path):
    scheme = Scheme(QuantSpec("float8_e4m3fn", "per_block", side), Scheme.parse("fp8-dynamic").activation)
    graph = quantized_linear(maker, scheme, shape, rows=100)
    assert graph.weights.info("site.weight_scale").shape == (-(-100 // side), -(-64 // side))
    report = lower(graph, tmp_path / "out")
    x = sized(shape)
    (result,) = run_onnx(graph, x, session=open_session(tmp_path / "out"))
    expected = reference(graph, x)
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert report["sites"]["site"]["status"] == "runs"
