"""Canonical operators against their definition, and what ONNX Runtime makes of quantized linear layers."""

import itertools
import math
from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.lowering.onnx import OnnxTarget, lower
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.lowering.onnx.harness import GraphMaker, open_session

canonical = torch.ops.qcompiler


def quantized(maker: GraphMaker, spec: QuantSpec, rows: int, width: int, name: str = "site", scale_dtype=torch.float32):
    """A dequantize node over the codes of a random matrix, as `Graph.set_weight` makes it."""
    scale, zero = numerics.min_max_qparams(torch.randn(rows, width), spec, scale_dtype)
    codes = numerics.quantize(torch.randn(rows, width), scale, zero, spec)
    axis, block = 1, spec.group_of(width)
    if spec.granularity == "per_channel":
        axis, block, scale, zero = 0, 0, scale[:, 0], None if zero is None else zero[:, 0]
    elif spec.granularity == "per_tensor":
        axis, block, scale, zero = 0, 0, scale.reshape(()), None if zero is None else zero.reshape(())
    kind = f"{'int' if spec.symmetric else 'uint'}{spec.bits}"
    return maker.call(
        canonical.dequantize.default,
        maker.weight(f"{name}.weight_codes", codes, kind),
        maker.weight(f"{name}.weight_scale", scale.to(scale_dtype)),
        None if zero is None else maker.weight(f"{name}.weight_zero_point", zero, kind),
        axis,
        block,
        torch.float32,
    )


SCHEMES = ["w4a16-g32", "w4a16-g128", "w4a16-g32-asym", "w4a16-channel", "w4a16-tensor", "w8a16-channel", "w8a16-g32"]
SCHEMES += ["w8a16-channel-asym", "w8a16-tensor", "w3a16-g32", "w3a16-g64-asym", "w2a16-g16", "w2a16-g16-asym"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "width"), [(48, 128), (33, 100), (7, 66)])
def test_quantized_linear_is_exact_and_fused(name, rows, width, maker, run_onnx, optimized, tmp_path):
    spec = Scheme.parse(name).weight
    x = maker.input(torch.randn(7, 5, width))
    bias = maker.weight("site.bias", torch.randn(rows))
    node = maker.call(canonical.linear.default, x, quantized(maker, spec, rows, width), bias)
    graph = maker.graph(node)
    lower(graph, tmp_path / "out")
    value = torch.randn(3, 1, width)
    weight, stored_bias = maker.values[node.args[1]], maker.values[bias]
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    torch.testing.assert_close(result, value @ weight.T + stored_bias, rtol=1e-5, atol=1e-5)

    model = optimized(tmp_path / "out")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMulNBits"] == 1
    assert not kinds["DequantizeLinear"]
    assert not kinds["MatMul"]
    (bits,) = (a.i for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits")
    assert bits == (8 if spec.bits == 8 else 4)
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(math.prod(t.dims) for t in floats) < rows * width / 2  # scales, no weight
    assert OnnxTarget().supports(Scheme(spec), width).status == "fused"


@pytest.mark.parametrize("group", [4, 24, 48, 100])
def test_groups_that_are_not_fused_are_exact_all_the_same(group, maker, run_onnx, optimized, tmp_path):
    scheme = Scheme(QuantSpec(group_size=group))
    x = maker.input(torch.randn(7, 5, 128))
    node = maker.call(canonical.linear.default, x, quantized(maker, scheme.weight, 48, 128))
    graph = maker.graph(node)
    lower(graph, tmp_path / "out")
    value = torch.randn(2, 3, 128)
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    torch.testing.assert_close(result, value @ maker.values[node.args[1]].T, rtol=1e-5, atol=1e-5)
    kinds = Counter(node.op_type for node in optimized(tmp_path / "out").graph.node)
    assert (kinds["MatMulNBits"], kinds["DequantizeLinear"]) == (0, 1)
    assert OnnxTarget().supports(scheme, 128).status == "runs"


def initializers(directory) -> dict[str, onnx.TensorProto]:
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    return {t.name: t for t in model.graph.initializer}


@pytest.mark.parametrize(
    ("bits", "opset", "stored"), [(2, 21, "INT4"), (3, 21, "INT4"), (2, 25, "INT2"), (4, 25, "INT4")]
)
def test_codes_are_stored_in_the_narrowest_type_there_is(bits, opset, stored, maker, run_onnx, tmp_path):
    spec = QuantSpec(dtype=f"int{bits}", group_size=32)
    node = maker.call(canonical.linear.default, maker.input(torch.randn(7, 5, 64)), quantized(maker, spec, 24, 64))
    graph = maker.graph(node)
    report = lower(graph, tmp_path / "out", opset=opset)
    tensor = initializers(tmp_path / "out")["site.weight_codes"]
    assert (onnx.TensorProto.DataType.Name(tensor.data_type), list(tensor.dims)) == (stored, [64, 24])
    assert report["sites"]["site"]["stored"] == stored.lower()
    value = torch.randn(2, 3, 64)
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    torch.testing.assert_close(result, value @ maker.values[node.args[1]].T, rtol=1e-5, atol=1e-5)


def test_symmetric_weights_have_no_zero_point_and_feed_matmul_directly(maker, tmp_path):
    node = maker.call(
        canonical.linear.default, maker.input(torch.randn(7, 64)), quantized(maker, QuantSpec(group_size=32), 24, 64)
    )
    lower(maker.graph(node), tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    dequantize, matmul = graph.node
    assert list(dequantize.input) == ["site.weight_codes", "site.weight_scale"]
    assert {a.name: a.i for a in dequantize.attribute} == {"axis": 0, "block_size": 32}
    assert (matmul.op_type, matmul.input[1], matmul.name) == ("MatMul", dequantize.output[0], "site/MatMul")
    assert list(initializers(tmp_path / "out")["site.weight_scale"].dims) == [2, 24]


def test_bfloat16_scales_are_exact_in_float32_and_in_float16(maker, run_onnx, tmp_path):
    spec = QuantSpec(group_size=32)
    x = maker.input(torch.randn(7, 64))
    node = maker.call(canonical.linear.default, x, quantized(maker, spec, 24, 64, scale_dtype=torch.bfloat16))
    graph = maker.graph(node)
    scale = graph.weights.read("site.weight_scale")
    assert scale.dtype == torch.bfloat16
    for float_dtype, kind in (("float32", onnx.TensorProto.FLOAT), ("float16", onnx.TensorProto.FLOAT16)):
        directory = tmp_path / float_dtype
        lower(graph, directory, float_dtype=float_dtype)
        tensor = initializers(directory)["site.weight_scale"]
        assert tensor.data_type == kind
        stored = torch.tensor(onnx.numpy_helper.to_array(tensor).copy()).float()
        assert torch.equal(stored, scale.float().T)


def test_float_linear_is_stored_transposed(maker, run_onnx, tmp_path):
    x = maker.input(torch.randn(7, 5, 64))
    weight = maker.weight("site.weight", torch.randn(24, 64).bfloat16())
    node = maker.call(canonical.linear.default, x, maker.call(torch.ops.aten.to.dtype, weight, torch.float32))
    node.args = (x, weight)
    graph = maker.graph(node)
    lower(graph, tmp_path / "out")
    assert list(initializers(tmp_path / "out")["site.weight"].dims) == [64, 24]
    value = torch.randn(2, 3, 64)
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    torch.testing.assert_close(result, value @ maker.values[weight].float().T, rtol=1e-5, atol=1e-5)


def test_tied_embedding_is_stored_once_and_never_transposed_at_run_time(maker, run_onnx, optimized, tmp_path):
    ids = maker.input(torch.zeros(7, 5, dtype=torch.int64))
    table = maker.weight("embed.weight", torch.randn(300, 64))
    hidden = maker.call(torch.ops.aten.embedding.default, table, ids)
    head = maker.weight("head.weight", maker.values[table])
    graph = maker.graph(maker.call(canonical.linear.default, hidden, head))
    graph.weights.alias("head.weight", "embed.weight")
    report = lower(graph, tmp_path / "out")
    assert report["weight_bytes"] == 300 * 64 * 4
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == 300 * 64 * 4
    value = torch.randint(0, 300, (2, 3))
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    rows = maker.values[table]
    torch.testing.assert_close(result, rows[value] @ rows.T, rtol=1e-5, atol=1e-4)
    assert "Transpose" not in {node.op_type for node in optimized(tmp_path / "out").graph.node}


def test_dequantized_embedding_runs(maker, run_onnx):
    ids = maker.input(torch.zeros(7, 5, dtype=torch.int64))
    node = maker.call(torch.ops.aten.embedding.default, quantized(maker, QuantSpec(group_size=32), 40, 64), ids)
    value = torch.randint(0, 40, (2, 3))
    (result,) = run_onnx(maker.graph(node), value)
    torch.testing.assert_close(result, maker.values[node.args[0]][value], rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_quantize_and_dequantize(symmetric, maker, run_onnx):
    x = maker.input(torch.randn(7, 5, 8))
    scale = maker.weight("scale", torch.tensor(0.02))
    zero = None if symmetric else maker.weight("zero", torch.tensor(117, dtype=torch.uint8))
    dtype = torch.int8 if symmetric else torch.uint8
    codes = maker.call(canonical.quantize.default, x, scale, zero, 0, 0, dtype)
    graph = maker.graph(codes, maker.call(canonical.dequantize.default, codes, scale, zero, 0, 0, torch.float32))
    value = torch.randn(2, 3, 8) * 2
    expected = canonical.quantize(value, maker.values[scale], None if zero is None else maker.values[zero], 0, 0, dtype)
    result, back = run_onnx(graph, value)
    assert torch.equal(result, expected)
    torch.testing.assert_close(back, (expected.float() - (0 if symmetric else 117)) * 0.02)


@pytest.mark.parametrize("float_dtype", ["float32", "float16"])
def test_norms(float_dtype, maker, run_onnx):
    x = maker.input(torch.randn(7, 5, 64) * 9)
    w, b = maker.weight("w", torch.randn(64)), maker.weight("b", torch.randn(64))
    outputs = (
        maker.call(canonical.rms_norm.default, x, w, 1e-3),
        maker.call(canonical.layer_norm.default, x, w, b, 1e-3),
        maker.call(canonical.layer_norm.default, x, None, None, 1e-3),
    )
    graph = maker.graph(*outputs)
    value = torch.randn(3, 2, 64) * 9
    w, b = maker.values[w], maker.values[b]
    expected = [canonical.rms_norm(value, w, 1e-3)]
    expected += [canonical.layer_norm(value, w, b, 1e-3), canonical.layer_norm(value, None, None, 1e-3)]
    tolerance = 1e-5 if float_dtype == "float32" else 1e-2
    for result, wanted in zip(run_onnx(graph, value, float_dtype=float_dtype), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=tolerance, atol=tolerance)


def test_rms_norm_is_fused(maker, optimized, tmp_path):
    x = maker.input(torch.randn(7, 5, 64))
    lower(
        maker.graph(maker.call(canonical.rms_norm.default, x, maker.weight("w", torch.randn(64)), 1e-5)),
        tmp_path / "out",
    )
    assert [node.op_type for node in optimized(tmp_path / "out").graph.node] == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved, maker, run_onnx):
    x, angle = maker.input(torch.randn(7, 4, 5, 16)), maker.input(torch.randn(7, 1, 5, 16))
    cos, sin = maker.call(torch.ops.aten.cos.default, angle), maker.call(torch.ops.aten.sin.default, angle)
    graph = maker.graph(maker.call(canonical.rotary.default, x, cos, sin, interleaved))
    value, angles = torch.randn(2, 4, 3, 16), torch.randn(2, 1, 3, 16)
    (result,) = run_onnx(graph, value, angles)
    torch.testing.assert_close(result, canonical.rotary(value, angles.cos(), angles.sin(), interleaved))


def attention_graph(maker, *, heads=4, kv_heads=2, mask: Tensor | None = None, layers=1, **options):
    """q ``[7, heads, 5, 16]``; keys and values appended to 13 cached ones."""
    q = maker.input(torch.randn(7, heads, 5, 16))
    past_k, past_v = (maker.input(torch.randn(7, kv_heads, 13, 16)) for _ in range(2))
    new_k, new_v = (maker.input(torch.randn(7, kv_heads, 5, 16)) for _ in range(2))
    mask_node = None if mask is None else maker.input(mask)
    k = maker.call(canonical.kv_append.default, past_k, new_k)
    v = maker.call(canonical.kv_append.default, past_v, new_v)
    settings = (options.get("causal", True), options.get("window"), options.get("softcap"))
    results = []
    for _ in range(layers):
        q = maker.call(canonical.attention.default, q, k, v, mask_node, options.get("scale", 0.25), *settings)
        results.append(q)
    return maker.graph(results[-1], k)


def attention_inputs(batch, queries, past, *, heads=4, kv_heads=2):
    shapes = [(batch, heads, queries, 16), *[(batch, kv_heads, past, 16)] * 2, *[(batch, kv_heads, queries, 16)] * 2]
    return [torch.randn(shape) for shape in shapes]


def expected_attention(inputs, mask=None, *, scale=0.25, causal=True, window=None, softcap=None):
    q, past_k, past_v, new_k, new_v = inputs
    k, v = torch.cat((past_k, new_k), 2), torch.cat((past_v, new_v), 2)
    return canonical.attention(q, k, v, mask, scale, causal, window, softcap)


STEPS = [(2, 6, 0), (2, 1, 6), (3, 4, 9), (1, 1, 0)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 3}, {"softcap": 2.0}, {"scale": 1.0}],
    ids=lambda options: str(options),
)
def test_attention(heads, kv_heads, options, maker, run_onnx, tmp_path):
    graph = attention_graph(maker, heads=heads, kv_heads=kv_heads, **options)
    lower(graph, tmp_path / "out")
    session = open_session(tmp_path / "out")
    for step in STEPS:
        inputs = attention_inputs(*step, heads=heads, kv_heads=kv_heads)
        result, present = run_onnx(graph, *inputs, session=session)
        torch.testing.assert_close(result, expected_attention(inputs, **options), rtol=1e-5, atol=1e-5)
        assert torch.equal(present, torch.cat((inputs[1], inputs[3]), 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["boolean", "additive", "additive infinite"])
@pytest.mark.parametrize("float_dtype", ["float32", "float16"])
def test_attention_with_a_mask_and_rows_that_may_attend_to_nothing(
    causal, form, float_dtype, maker, run_onnx, tmp_path
):
    def make(batch, total):
        allowed = torch.rand(batch, 1, 1, total) > 0.4
        allowed[0, ..., : total // 2] = False  # with causal, the first queries of this row see nothing
        allowed[0, ..., -1] = True
        if form == "boolean":
            return allowed
        lowest = -torch.inf if form == "additive infinite" else -1e4
        return torch.where(allowed, torch.randn(allowed.shape), lowest)

    graph = attention_graph(maker, mask=make(7, 18), causal=causal)
    lower(graph, tmp_path / "out", float_dtype=float_dtype)
    session = open_session(tmp_path / "out")
    tolerance = 1e-5 if float_dtype == "float32" else 2e-2
    empty_rows = 0
    for batch, queries, past in STEPS:
        inputs, mask = attention_inputs(batch, queries, past), make(batch, queries + past)
        expected = expected_attention(inputs, mask, causal=causal)
        empty_rows += int((expected == 0).all(-1).sum())
        result, _ = run_onnx(graph, *inputs, mask, session=session)
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)
    assert empty_rows > 0 or not causal or form == "additive"


def test_attention_never_repeats_keys_and_makes_one_mask_for_all_layers(maker, tmp_path):
    mask = torch.ones(7, 1, 1, 18, dtype=torch.bool)
    graph = attention_graph(maker, mask=mask, layers=5)
    lower(graph, tmp_path / "out")
    kinds = Counter(
        node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    )
    assert not {"Expand", "Tile"} & set(kinds)
    assert kinds["Softmax"] == 5
    assert [kinds[kind] for kind in ("Range", "LessOrEqual", "And", "Where", "ReduceMax", "Max")] == [2, 1, 1, 1, 1, 1]


def test_every_step_of_the_cache_is_run_by_one_graph(maker, run_onnx, tmp_path):
    graph = attention_graph(maker)
    lower(graph, tmp_path / "out")
    session = open_session(tmp_path / "out")
    q, _, _, k, v = attention_inputs(2, 8, 0)
    whole = expected_attention((q, k[:, :, :0], v[:, :, :0], k, v))
    for cut in itertools.pairwise((0, 3, 4, 8)):
        now = slice(*cut)
        inputs = (q[:, :, now], k[:, :, : cut[0]], v[:, :, : cut[0]], k[:, :, now], v[:, :, now])
        result, _ = run_onnx(graph, *(t.contiguous() for t in inputs), session=session)
        torch.testing.assert_close(result, whole[:, :, now], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [2, 64, 128, 12, 96, 768])
@pytest.mark.parametrize("rank", [2, 3])
def test_hadamard(block, rank, maker, run_onnx, tmp_path):
    width = 1536 if block == 768 else 2 * block
    sizes = (7, 5)[: rank - 1]
    graph = maker.graph(maker.call(canonical.hadamard.default, maker.input(torch.randn(*sizes, width)), block))
    lower(graph, tmp_path / "out")
    value = torch.randn(*(3, 4)[: rank - 1], width)
    (result,) = run_onnx(graph, value, session=open_session(tmp_path / "out"))
    torch.testing.assert_close(result, canonical.hadamard(value, block), rtol=1e-5, atol=1e-5)
