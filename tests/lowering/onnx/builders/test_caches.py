"""Quantized caches in ONNX Runtime: the same codes, the same logits, and no code that changes once it is there."""

import operator

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.lowering.onnx import OnnxArtifact, OnnxTarget, lower
from qcompiler.passes import QuantizeKVCache
from tests.lowering.onnx.harness import open_session
from tests.models import canonical_graph, copy_graph

ops = torch.ops.qcompiler
PAST, NEW = 13, 5
FORMATS = {
    "int8": QuantizeKVCache("int8"),
    "int8-asym": QuantizeKVCache("int8", symmetric=False, group_size=4),
    "fp8": QuantizeKVCache("fp8"),
    "int4": QuantizeKVCache("int4", rotate=True, group_size=4),
    "int4-sym": QuantizeKVCache("int4", symmetric=True),
    "int8-static": QuantizeKVCache("int8", scales="static"),
    "int4-static": QuantizeKVCache("int4", scales="static"),
    "fp8-static": QuantizeKVCache("fp8", scales="static"),
}


def compiled(family, quantizer):
    graph = copy_graph(canonical_graph(family))
    ids = torch.randint(61, (24, 12), generator=torch.Generator().manual_seed(0))
    return qc.compile(graph, [quantizer], Calibration.from_tokens(ids), targets=["onnx"])


@pytest.fixture
def runs(run_onnx):
    """The values of nodes, as ONNX Runtime has them."""

    def run(maker, *nodes):
        graph = maker.graph(*nodes)
        return [value.numpy() for value in run_onnx(graph, *(maker.values[node] for node in graph.inputs))]

    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantizer", FORMATS.values(), ids=FORMATS.keys())
def test_parity_in_one_piece_and_through_the_cache(family, quantizer, tmp_path):
    result = compiled(family, quantizer)
    report = qc.lower(result, "onnx", tmp_path / "onnx")
    artifact = OnnxArtifact(tmp_path / "onnx")
    assert artifact.has_quantized_cache
    assert artifact.cache_bytes_per_token == result.artifact().cache_bytes_per_token
    ids = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(1))
    exact = NativeArtifact(result.graph, round_activations=False).forward(ids)
    rounding = (artifact.forward(ids) - exact).abs().max() / exact.abs().max()
    # far closer than rounding the cache goes; where sums end in another last bit, a code may tip
    assert report["parity"]["max_difference"] < rounding / 5
    assert report["parity"]["cached_difference"] < rounding / 5


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4-sym"])
def test_the_cache_of_both_holds_the_same_codes(name, tmp_path):
    result = compiled("llama", FORMATS[name])
    qc.lower(result, "onnx", tmp_path / "onnx")
    ids = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(1))
    native, other = result.artifact(), OnnxArtifact(tmp_path / "onnx")
    _, expected = native.prefill(ids[:, :4])
    _, found = other.prefill(ids[:, :4])
    ports = [port for port in result.graph.signature.inputs if port.role == "past"]
    before = {}
    for port, codes in zip(ports, expected.values, strict=True):
        mine = found.values[port.name]
        assert mine.shape() == list(codes.shape)
        if codes.dtype != torch.float8_e4m3fn:
            before[port.name] = mine.numpy().copy()
            same = (torch.from_numpy(before[port.name]) == codes).float().mean()
            assert same > 0.99  # a last bit may tip one
    _, longer = other.step(ids[:, 4:], found)
    for key, codes in before.items():
        assert np.array_equal(longer.values[key].numpy()[:, :, :4], codes)


@pytest.mark.parametrize("float_dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int8-static"])
def test_half_precision(name, float_dtype, tmp_path):
    result = compiled("llama", FORMATS[name])
    qc.lower(result, "onnx", tmp_path / "onnx", float_dtype=float_dtype)
    types = {port.name: port.type for port in open_session(tmp_path / "onnx").get_inputs()}
    codes = {"int8": "int8", "fp8": "float8e4m3fn", "int4": "uint8", "int8-static": "int8"}[name]
    assert types["past_key_values.0.key"] == f"tensor({codes})"
    if "static" not in name:
        assert types["past_key_values.1.value_scale"] == "tensor(float16)"
    assert types.get("past_key_values.1.value_zero_point") == ("tensor(uint8)" if name == "int4" else None)


# --- operators alone --------------------------------------------------------------------------------------------------


def caches(maker, past, new):
    return maker.input(past, "past_key_values.0.key", role="past"), maker.input(new)


def test_no_float8_code_changes_when_a_cache_grows(maker, tmp_path):
    """All 254 finite codes, whatever scale they have."""
    finite = [code for code in range(256) if code & 127 != 127]
    codes = torch.tensor([*finite, 0, 0], dtype=torch.uint8).view(torch.float8_e4m3fn)
    past, new = codes.reshape(1, 1, 2, 128).repeat(7, 1, 1, 1), codes.reshape(1, 1, 2, 128).repeat(7, 1, 1, 1).flip(2)
    node = maker.call(ops.kv_append.default, *caches(maker, past, new))
    graph = maker.graph(maker.call(torch.ops.aten.to.dtype, node, torch.float32))
    lower(graph, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx")
    feeds = {
        port.name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(torch.uint8).numpy(), 17)
        for port, value in zip(session.get_inputs(), (past, new), strict=True)
    }
    (found,) = session.run_with_ort_values([session.get_outputs()[0].name], feeds)
    assert np.array_equal(found.numpy(), torch.cat((past, new), dim=2).float().numpy())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float32])
def test_other_caches_are_joined_as_they_are(dtype, maker, runs):
    past, new = (torch.arange(7 * 2 * n * 3).reshape(7, 2, n, 3).to(dtype) for n in (PAST, NEW))
    (found,) = runs(maker, maker.call(ops.kv_append.default, *caches(maker, past, new)))
    assert np.array_equal(found, torch.cat((past, new), dim=2).numpy())


@pytest.mark.parametrize("signed", [False, True])
def test_nibbles(signed, maker, runs):
    codes = torch.arange(7 * NEW * 8).reshape(7, 1, NEW, 8) % 16
    codes = (codes - 8).to(torch.int8) if signed else codes.to(torch.uint8)
    packed = maker.call(ops.pack_nibbles.default, maker.input(codes))
    found = runs(maker, packed, maker.call(ops.unpack_nibbles.default, packed, signed))
    assert np.array_equal(found[0], ops.pack_nibbles(codes).numpy())
    assert np.array_equal(found[1], codes.numpy())


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.int8, 8), (torch.uint8, 8), (torch.uint8, 4), (torch.int8, 4), (torch.float8_e4m3fn, 8)]
)
def test_ranges_of_blocks_behind_a_transpose(dtype, bits, block, maker, runs):
    """Where ONNX Runtime would move a QuantizeLinear ahead of it, and not its scale."""
    x = torch.randn(7, NEW, 2, 16)
    x[0, 0, 0] = 0
    x[0, 1, 0] = 1e30
    value = maker.call(torch.ops.aten.transpose.int, maker.input(x), 1, 2)
    chosen = maker.call(ops.choose_block_qparams.default, value, dtype, block, bits)
    scale = maker.call(operator.getitem, chosen, 0)
    zero = maker.call(operator.getitem, chosen, 1) if dtype == torch.uint8 else None
    codes = maker.call(ops.quantize.default, value, scale, zero, -1, block, dtype, bits)
    wide = maker.call(torch.ops.aten.to.dtype, scale, torch.float32)
    back = maker.call(ops.dequantize.default, codes, wide, zero, -1, block, torch.float32)
    outputs = [back, wide, *([zero] if zero is not None else [])]
    for found, node in zip(runs(maker, *outputs), outputs, strict=True):
        np.testing.assert_array_equal(found, maker.values[node].numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_static_scale_per_channel_of_every_head(bits, symmetric, maker, runs):
    dtype = torch.int8 if symmetric else torch.uint8
    x = maker.input(torch.randn(7, 2, NEW, 6))
    scale = maker.weight("scale", 0.02 + torch.rand(1, 2, 1, 6) / 10)
    zero = None if symmetric else maker.weight("zero", torch.randint(4, (1, 2, 1, 6)).to(torch.uint8))
    codes = maker.call(ops.quantize.default, x, scale, zero, -1, 1, dtype, bits)
    back = maker.call(ops.dequantize.default, codes, scale, zero, -1, 1, torch.float32)
    (found,) = runs(maker, back)
    np.testing.assert_allclose(found, maker.values[back].numpy(), rtol=1e-6)


def test_what_the_target_says():
    target = OnnxTarget()
    found = [target.supports_cache(spec) for item in FORMATS.values() for spec in item.cache_formats()]
    assert {support.status for support in found} == {"runs"}
    assert "no Concat of float8" in target.supports_cache(FORMATS["fp8"].cache_formats()[0]).reason
    assert "bit operations" in target.supports_cache(FORMATS["int4"].cache_formats()[0]).reason


def test_no_generation_config_that_does_not_know_the_scales(tmp_path):
    report = qc.lower(compiled("llama", FORMATS["int8"]), "onnx", tmp_path / "onnx")
    assert any("scales of a quantized cache" in note for note in report["notes"])
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert "present.0.key_scale" in [output.name for output in model.graph.output]
