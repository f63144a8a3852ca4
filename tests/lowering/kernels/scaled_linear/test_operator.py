"""Linear layers of 8-bit activations: layouts, the CPU operator and the module against dequantized arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from qcompiler import numerics
from qcompiler.errors import InputError, TargetError
from qcompiler.ir.qtensor import Affine
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.lowering.kernels.scaled_linear import operator as scaled_linear
from qcompiler.lowering.kernels.scaled_linear.layout import check
from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear, choose
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec

kernels = torch.ops.qcompiler_kernels
CPU = torch.device("cpu")
H100 = Device("cuda", "H100", 90, has_triton=True)


def quantized(spec: QuantSpec, outputs: int, width: int) -> Affine:
    w = torch.randn(outputs, width) * torch.rand(outputs, 1)
    scale, zero = numerics.min_max_qparams(w, spec, torch.float32)
    return Affine(numerics.quantize(w, scale, zero, spec), scale, zero, spec, torch.float32)


def codes_of(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale and zero point that a graph computes for an activation."""
    if spec.dynamic:
        scale, zero = torch.ops.qcompiler.choose_qparams(x, *spec.range_options(x.shape[-1]))
    else:
        ends = torch.tensor([x.min().clamp(max=0), x.max().clamp(min=0)])
        scale, zero = numerics.range_qparams(ends[0], ends[1], spec, torch.float32)
    zero = None if spec.symmetric else zero
    axis, block = spec.input_place(x.shape[-1])
    return torch.ops.qcompiler.quantize(x, scale, zero, axis, block, spec.code_dtype, spec.bits), scale, zero


def dequantized(codes, scale, zero, weight: Affine, bias) -> torch.Tensor:
    x = codes.float() - (0 if zero is None else zero.float())
    return F.linear(x * scale, weight.dequantize(), bias)


FUSED = (
    "w8a8",
    "w8a8-actsym",
    "w8a8-dynamic",
    "w8a8-dyntensor",
    "w8a8-dynamic-actasym",
    "w8a8-tensor",
    "w8a8-dynamic-clip90",
)
DEQUANTIZED = (
    "fp8",
    "fp8-dynamic",
    "fp8-block",
    "fp8-e5m2",
    "fp8-tensor",
    "w4a8",
    "w8a8-g32",
    "w4a4",
    "w8a8-asym",
    "w2a8-dynamic",
)


@pytest.mark.parametrize("scheme", FUSED + DEQUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_cpu(scheme, dtype):
    found = Scheme.parse(scheme)
    weight, bias = quantized(found.weight, 150, 200), torch.randn(150).bfloat16().float()
    layer = ScaledLinear.from_weight(weight, bias, activation=found.activation, device=CPU, dtype=dtype)
    assert layer.choice.implementation == ("cpu" if scheme in FUSED else "reference")
    for shape in ((1, 200), (2, 3, 200), (33, 200)):
        inputs = codes_of(torch.randn(shape) + 0.2, found.activation)
        y, expected = layer(*inputs), dequantized(*inputs, weight, bias)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 150)
        limit = 2e-6 if dtype == torch.float32 else 8e-3
        assert (y.float() - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("has_vnni", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_integers_are_exact(has_vnni, rows, monkeypatch):
    monkeypatch.setattr(scaled_linear, "_has_vnni", lambda: has_vnni and torch.cpu._is_vnni_supported())
    spec = Scheme.parse("w8a8-dynamic")
    weight = quantized(spec.weight, 64, 512)
    weight.codes[:] = torch.randint(-128, 128, (64, 512))
    weight.scale[:] = 1.0
    layer = ScaledLinear.from_weight(weight, None, activation=spec.activation, device=CPU, dtype=torch.float32)
    codes = torch.randint(-128, 128, (rows, 512), dtype=torch.int8)
    y = layer(codes, torch.ones(rows, 1))
    assert torch.equal(y, (codes.double() @ weight.codes.double().T).float())


def test_signed_codes_with_a_zero_point():
    found = Scheme.parse("w8a8")
    weight = quantized(found.weight, 24, 40)
    layer = ScaledLinear.from_weight(weight, None, activation=found.activation, device=CPU, dtype=torch.float32)
    codes, scale, zero = codes_of(torch.randn(6, 40) + 0.5, found.activation)
    signed = (codes.int() - 128).to(torch.int8), scale, (zero.int() - 128).to(torch.int8)
    assert torch.allclose(layer(*signed), layer(codes, scale, zero), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", FUSED + DEQUANTIZED[:-2])
def test_the_operator_and_its_reference_take_what_is_laid_out_for_cuda(scheme):
    """Packed as for a GPU; the CPU reads it back."""
    found = Scheme.parse(scheme)
    weight = quantized(found.weight, 150, 200)
    choice = choose(found.weight, found.activation, 150, 200, H100, torch.float16)
    layer = ScaledLinear(choice, found.weight, found.activation, torch.float32, 200)
    layer._lay_out(weight, CPU)
    layer.register_buffer("bias", None)
    inputs = codes_of(torch.randn(7, 200) + 0.2, found.activation)
    arguments = (*inputs, layer.weight, layer.weight_scale, layer.weight_sums, None, layer.group, torch.float32)
    expected = dequantized(*inputs, weight, None)
    for y in (scaled_linear.scaled_linear_reference(*arguments), layer(*inputs)):
        assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_no_rows():
    found = Scheme.parse("w8a8-dynamic")
    layer = ScaledLinear.from_weight(
        quantized(found.weight, 24, 40), None, activation=found.activation, device=CPU, dtype=torch.bfloat16
    )
    assert layer(torch.empty(2, 0, 40, dtype=torch.int8), torch.empty(2, 0, 1)).shape == (2, 0, 24)


def test_a_layer_can_be_copied():
    found = Scheme.parse("w8a8-dynamic")
    layer = ScaledLinear.from_weight(
        quantized(found.weight, 24, 40), torch.randn(24), activation=found.activation, device=CPU, dtype=torch.float32
    )
    codes, scale, _ = codes_of(torch.randn(6, 40), found.activation)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(codes, scale), layer(codes, scale))
    if layer._packed is not None:
        assert copied._packed is not None
        assert copied._packed.is_mkldnn


@pytest.mark.parametrize("has_vnni", [True, False])
def test_a_state_holds_the_weight(has_vnni, monkeypatch):
    if has_vnni and not scaled_linear._has_vnni():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(scaled_linear, "_has_vnni", lambda: has_vnni)
    found = Scheme.parse("w8a8-dynamic")
    first, second = (
        ScaledLinear.from_weight(
            quantized(found.weight, 24, 40), None, activation=found.activation, device=CPU, dtype=torch.float32
        )
        for _ in range(2)
    )
    codes, scale = torch.randint(-128, 128, (3, 40), dtype=torch.int8), torch.rand(3, 1)
    zero = torch.randint(-9, 9, (3, 1), dtype=torch.int8)
    expected = first(codes, scale, zero)
    assert not torch.equal(second(codes, scale, zero), expected)
    state = torch.nn.ModuleList([first]).state_dict()
    assert state["0.weight"].dtype == torch.int8
    torch.nn.ModuleList([second]).load_state_dict(state)
    assert torch.equal(second(codes, scale, zero), expected)
    del state["0.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        torch.nn.ModuleList([second]).load_state_dict(state)


def test_shapes_without_values():
    with FakeTensorMode():
        y = kernels.scaled_linear(
            torch.empty(2, 3, 40, dtype=torch.int8),
            torch.empty(2, 3, 1),
            None,
            torch.empty(24, 40, dtype=torch.int8),
            torch.empty(24),
            None,
            None,
            0,
            torch.bfloat16,
        )
    assert (y.shape, y.dtype) == ((2, 3, 24), torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "device", "dtype", "says"),
    [
        ("w8a8", Device("cuda", "T4", 75, has_triton=True), torch.float16, "7.5 is below 8.0"),
        ("w8a8", Device("cuda", "H100", 90, has_triton=False), torch.float16, "Triton is not installed"),
        ("w8a8", H100, torch.float32, "float32"),
        ("w8a8-asym", H100, torch.float16, "zero point"),
        ("w4a8-g16", H100, torch.float16, "groups of 16"),
        ("w2a8", H100, torch.float16, "int2"),
        ("nvfp4", H100, torch.float16, "4-bit floats"),
        ("fp8", Device("cpu"), torch.bfloat16, "dequantized to bfloat16 once"),
        ("fp8", Device("cpu"), torch.float32, "dequantized to float32 once"),
        ("w4a8", Device("cpu"), torch.bfloat16, "no CPU operator for int4 g128"),
        ("w8a8", Device("mps"), torch.float16, "no kernels for mps"),
    ],
)
def test_why_there_is_no_kernel(scheme, device, dtype, says):
    found = Scheme.parse(scheme)
    choice = choose(found.weight, found.activation, 64, 64, device, dtype)
    assert choice.implementation == "reference"
    assert says in choice.reason


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize("scheme", FUSED + DEQUANTIZED[:-2])
def test_kernels_on_cuda(scheme, capability):
    found = Scheme.parse(scheme)
    device = Device("cuda", "GPU", capability, has_triton=True)
    assert choose(found.weight, found.activation, 64, 64, device, torch.bfloat16).implementation == "triton"


def test_formats_that_do_not_go_together():
    int8, fp8, e5m2 = (Scheme.parse(name) for name in ("w8a8", "fp8", "fp8-e5m2"))
    assert "float8" in choose(int8.weight, fp8.activation, 64, 64, H100, torch.float16).reason
    assert "e5m2" in choose(fp8.weight, e5m2.activation, 64, 64, H100, torch.float16).reason


def test_four_bit_float_activations_are_refused():
    with pytest.raises(TargetError, match="one code and a scale"):
        ScaledLinear.from_weight(
            quantized(Scheme.parse("w8a8").weight, 8, 16),
            None,
            activation=Scheme.parse("nvfp4").activation,
            device=CPU,
            dtype=torch.float32,
        )


def arguments(**changes):
    found = {
        "codes": torch.zeros(3, 40, dtype=torch.int8),
        "scale": torch.ones(3, 1),
        "zero_point": None,
        "weight": torch.zeros(24, 40, dtype=torch.int8),
        "weight_scale": torch.ones(24),
        "weight_sums": torch.zeros(24),
        "bias": None,
        "group": 0,
        "dtype": torch.float32,
    }
    return (found | changes).values()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"codes": torch.zeros(3, 41, dtype=torch.int8)}, "do not fit"),
        ({"codes": torch.zeros(3, 40)}, "do not go together"),
        ({"codes": torch.zeros(3, 40).to(torch.float8_e4m3fn)}, "do not go together"),
        ({"codes": torch.zeros(3, 40, dtype=torch.uint8)}, "need a zero point"),
        ({"scale": torch.ones(2)}, "one scale per row"),
        ({"scale": torch.ones(3, 1).half()}, "scales are float32"),
        ({"zero_point": torch.zeros(3, 1)}, "of its dtype"),
        ({"zero_point": torch.zeros(3, 1, dtype=torch.int8), "weight_sums": None}, "sums of the weight's rows"),
        ({"weight_scale": torch.ones(23)}, "another shape"),
        ({"weight_sums": torch.ones(23)}, "one sum per output"),
        ({"weight_sums": torch.ones(24).half()}, "one sum per output"),
        ({"group": 32}, "another shape"),
        ({"bias": torch.ones(23)}, "one bias"),
        ({"dtype": torch.int32}, "no dtype of results"),
    ],
)
def test_arguments_that_do_not_fit(changes, says):
    with pytest.raises(InputError, match=says):
        kernels.scaled_linear(*arguments(**changes))


def test_tensors_on_different_devices():
    for name in ("scale", "weight_sums"):
        with pytest.raises(InputError, match="different devices"):
            check(*arguments(**{name: torch.ones(1 if name == "scale" else 24, device="meta")}))


def test_two_kinds_of_floats():
    codes, weight = torch.zeros(3, 40).to(torch.float8_e4m3fn), torch.zeros(24, 40).to(torch.float8_e5m2)
    with pytest.raises(InputError, match="two kinds"):
        kernels.scaled_linear(*arguments(codes=codes, weight=weight))


def test_the_reference_module_checks_its_input():
    found = Scheme.parse("w4a8")
    layer = ScaledLinear.from_weight(
        quantized(found.weight, 24, 40), None, activation=found.activation, device=CPU, dtype=torch.float32
    )
    with pytest.raises(InputError, match="do not fit"):
        layer(torch.zeros(2, 41, dtype=torch.int8), torch.ones(2, 1))
