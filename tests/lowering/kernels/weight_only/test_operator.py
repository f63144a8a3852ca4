"""Weight-only layers: what is chosen, that it computes what the weight says, what is refused."""

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.ir.qtensor import Affine
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.lowering.kernels.weight_only import operator as weight_only
from qcompiler.lowering.kernels.weight_only.operator import (
    WeightOnlyLinear,
    choose,
    pack_tiles,
    weight_only_linear_reference,
)
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.lowering.kernels.weight_only.weight_only_cases import random_weight, spec_of, worst

CPU = Device("cpu", has_triton=True)
H200 = Device("cuda", "NVIDIA H200", 90, has_triton=True)
OPERATOR = torch.ops.qcompiler_kernels.weight_only_linear
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, 128, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reference_reads_tiles(bits, group, symmetric):
    weight = random_weight(24, 416, spec_of(bits, group, symmetric))
    packed, scale, zero = pack_tiles(weight)
    x, bias = torch.randn(5, 416), torch.randn(24)
    group = group or 416
    found = weight_only_linear_reference(x, packed, scale, zero, bias, bits, group)
    assert worst(found, x @ weight.dequantize().T + bias) < 1e-6
    assert torch.equal(found, OPERATOR(x, packed, scale, zero, bias, bits, group, "tiles"))


def test_reference_goes_slice_by_slice(monkeypatch):
    monkeypatch.setattr("qcompiler.lowering.kernels.weight_only.operator._SLICE_ELEMENTS", 7 * 64)
    weight = random_weight(24, 64, spec_of(4, 32, False))
    packed, scale, zero = pack_tiles(weight)
    x, bias = torch.randn(5, 64), torch.randn(24)
    expected = x @ weight.dequantize().T + bias
    assert worst(weight_only_linear_reference(x, packed, scale, zero, bias, 4, 32), expected) < 1e-6
    layer = WeightOnlyLinear.from_weight(weight, bias, device=torch.device("cpu"), dtype=torch.float32)
    assert worst(layer(x), expected) < 1e-6


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_stay_as_they_were_stored(scale_dtype):
    weight = random_weight(8, 128, spec_of(4, 32), scale_dtype)
    _, scale, _ = pack_tiles(weight)
    assert scale.dtype == scale_dtype
    assert torch.equal(scale.float().T, weight.scale)


SPECS = [
    spec_of(4, 128),
    spec_of(4, 32, False),
    spec_of(3, 64),
    spec_of(2, None, False),
    spec_of(8, None),
    spec_of(8, 32, False),
    spec_of(4, 40),
    QuantSpec("int4", "per_tensor", None, False),
    QuantSpec("float8_e4m3fn", "per_channel", None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_layer_computes_what_the_weight_says(spec, dtype):
    if spec.is_float:
        codes = torch.randn(48, 320).to(torch.float8_e4m3fn)
        weight = Affine(codes, torch.rand(48, 1) + 0.5, None, spec, torch.float32)
    else:
        weight = random_weight(48, 320, spec, torch.bfloat16)
    x, bias = torch.randn(2, 3, 320).to(dtype), torch.randn(48)
    layer = WeightOnlyLinear.from_weight(weight, bias, device=torch.device("cpu"), dtype=dtype)
    found = layer(x)
    assert found.shape == (2, 3, 48)
    assert found.dtype == dtype
    assert worst(found, x.float() @ weight.dequantize().T + bias) < ROUNDING[dtype]
    assert layer(x[:0]).shape == (0, 3, 48)
    assert layer.choice == choose(spec, 48, 320, CPU, dtype)


def test_block_scales_and_4_bit_floats_run_dequantized():
    blocks = Scheme.parse("fp8-block").weight
    floats = Scheme.parse("mxfp4a16").weight
    assert blocks is not None
    assert floats is not None
    scale = torch.rand(3, 3).repeat_interleave(128, 0)[:300] + 0.5
    weights = [
        Affine(torch.randn(300, 260).to(torch.float8_e4m3fn), scale, None, blocks, torch.float32),
        Affine(
            torch.randint(0, 16, (300, 260), dtype=torch.uint8),
            torch.full((300, 9), 0.5),
            None,
            floats,
            torch.float8_e8m0fnu,
        ),
    ]
    x = torch.randn(2, 260)
    for weight in weights:
        layer = WeightOnlyLinear.from_weight(weight, None, device=torch.device("cpu"), dtype=torch.float32)
        assert layer.choice.implementation == "reference"
        assert worst(layer(x), x @ weight.dequantize().T) < 1e-6


def test_the_layer_keeps_codes_packed():
    for bits, size in ((2, 64 * 256 // 4), (3, 64 * 256 * 3 // 8), (4, 64 * 256 // 2), (8, 64 * 256)):
        weight = random_weight(64, 256, spec_of(bits, 128))
        layer = WeightOnlyLinear.from_weight(weight, None, device=torch.device("cpu"), dtype=torch.float32)
        assert layer.weight.numel() * layer.weight.element_size() == size
        assert pack_tiles(weight)[0].numel() == size


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "implementation", "reason"),
    [
        (spec_of(4, 128), H200, torch.bfloat16, "triton", ""),
        (spec_of(3, 32, False), H200, torch.float16, "triton", ""),
        (spec_of(8, None), H200, torch.float16, "triton", ""),
        (spec_of(4, 128), H200, torch.float32, "reference", "float32 activations"),
        (spec_of(4, 48), H200, torch.float16, "reference", "groups of 48"),
        (spec_of(4, 128), Device("cuda", "V100", 70, True), torch.float16, "reference", "compute capability 7.0"),
        (spec_of(4, 128), Device("cuda", "A100", 80, False), torch.float16, "reference", "Triton is not installed"),
        (spec_of(4, 128), Device("mps"), torch.float16, "reference", "devices of kind mps"),
        (QuantSpec("float8_e4m3fn", "per_channel", None), H200, torch.float16, "reference", "no kernel for float8"),
        (spec_of(4, 128), CPU, torch.bfloat16, "cpu", ""),
        (spec_of(2, 128), CPU, torch.bfloat16, "cpu", "held in 4 bits"),
        (spec_of(8, None), CPU, torch.bfloat16, "cpu", ""),
        (spec_of(8, 128), CPU, torch.bfloat16, "reference", "one scale per output channel"),
        (spec_of(4, 128), CPU, torch.float32, "reference", "bfloat16"),
    ],
)
def test_choice(spec, device, dtype, implementation, reason):
    found = choose(spec, 64, 256, device, dtype)
    assert found.implementation == implementation
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)


def arguments() -> dict:
    packed, scale, zero = pack_tiles(random_weight(16, 256, spec_of(4, 128, False)))
    x, bias = torch.randn(2, 256), torch.randn(16)
    return {"x": x, "packed": packed, "scale": scale, "zero_point": zero, "bias": bias, "bits": 4, "group": 128}


@pytest.mark.parametrize(
    ("name", "change", "where"),
    [
        ("x", lambda x: x.int(), "activations"),
        ("x", lambda x: x[0], "activations"),
        ("x", lambda x: x.T.contiguous().T, "activations"),
        ("x", lambda x: x[:, :128].contiguous(), "packed weights"),
        ("packed", lambda p: p.int(), "packed weights"),
        ("packed", lambda p: p[:, :, ::2], "packed weights"),
        ("scale", lambda s: s[:1], "scales"),
        ("scale", lambda s: s.double(), "scales"),
        ("zero_point", lambda z: z.int(), "zero points"),
        ("zero_point", lambda z: z.T.contiguous().T, "zero points"),
        ("bias", lambda b: b.half(), "bias"),
        ("bits", lambda _: 5, None),
        ("bits", lambda _: 8, "packed weights"),
        ("group", lambda _: 48, None),
        ("group", lambda _: 0, None),
        ("group", lambda _: 64, "scales"),
    ],
)
def test_bad_input_is_refused(name, change, where):
    given = arguments()
    assert OPERATOR(**given, layout="tiles").shape == (2, 16)
    given[name] = change(given[name])
    with pytest.raises(InputError) as caught:
        OPERATOR(**given, layout="tiles")
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("name", "where"), [("packed", "packed weights"), ("zero_point", "zero points"), ("bias", "bias")]
)
def test_tensors_on_two_devices_are_refused(name, where):
    given = arguments()
    given[name] = given[name].to("meta")
    with pytest.raises(InputError, match="two devices") as caught:
        weight_only._check(**given, layout="tiles")
    assert caught.value.where == where


def test_shapes_are_known_without_computing():
    given = {key: v.to("meta") if isinstance(v, torch.Tensor) else v for key, v in arguments().items()}
    found = OPERATOR(**given, layout="tiles")
    assert found.shape == (2, 16)
    assert found.dtype == torch.float32


def test_operator_is_declared_rightly():
    given = arguments()
    torch.library.opcheck(OPERATOR.default, (*given.values(), "tiles"), test_utils=("test_schema", "test_faketensor"))


def test_layer_goes_through_the_operator_in_bfloat16():
    weight = random_weight(16, 128, spec_of(4, 64, False), torch.bfloat16)
    layer = WeightOnlyLinear.from_weight(weight, None, device=torch.device("cpu"), dtype=torch.bfloat16)
    traced = torch.export.export(layer, (torch.randn(2, 128).bfloat16(),))
    assert any("weight_only_linear" in str(node.target) for node in traced.graph.nodes)
    assert "int4 g64 asymmetric" in repr(layer)
