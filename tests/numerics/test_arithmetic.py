import math

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import arithmetic, fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.numerics.made_up import GROUPS, SPECS, naive_quantize, squared_error

specs = st.builds(
    lambda bits, group, symmetric: Scheme.parse(f"w{bits}a16", group_size=group, symmetric=symmetric).weight,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 1, 3, 8, 16, 100]),
    st.booleans(),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("width", [48, 41])  # the second leaves a short last group
def test_quantize_equals_naive_loop(spec, width):
    x = torch.randn(5, width)
    scale, zero = numerics.min_max_qparams(x, spec, torch.float32)
    scale = scale * 0.7  # so that some codes are clamped
    codes = numerics.quantize(x, scale, zero, spec)
    assert codes.dtype == spec.code_dtype
    assert torch.equal(codes, naive_quantize(x, scale, zero, spec))
    assert codes.min() == spec.quant_min or codes.max() == spec.quant_max


def test_rounds_half_to_even():
    spec = QuantSpec("int4", "per_tensor", None)
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert numerics.quantize(x, torch.ones(1, 1), None, spec).tolist() == [[-2, -2, 0, 0, 2, 2]]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_equals_naive_loop(spec):
    x = torch.randn(4, 41)
    scale, zero = numerics.min_max_qparams(x, spec, torch.float32)
    codes = numerics.quantize(x, scale, zero, spec)
    group = spec.group_size or 41
    expected = torch.empty(4, 41)
    for i in range(4):
        for j in range(41):
            at = (min(i, len(scale) - 1), j // group)
            expected[i, j] = (int(codes[i, j]) - (0 if zero is None else int(zero[at]))) * scale[at]
    assert torch.equal(numerics.dequantize(codes, scale, zero, spec), expected)


def test_slices_change_nothing(monkeypatch):
    x, importance = torch.randn(9, 40), torch.rand(40)
    for spec in SPECS:
        whole = numerics.mse_qparams(x, spec, torch.float16, importance=importance)
        codes = numerics.quantize(x, *whole, spec)
        with monkeypatch.context() as patch:
            patch.setattr(arithmetic, "_SLICE_ELEMENTS", 100)
            sliced = numerics.mse_qparams(x, spec, torch.float16, importance=importance)
            assert torch.equal(sliced[0], whole[0])
            assert torch.equal(numerics.quantize(x, *whole, spec), codes)
            assert torch.equal(numerics.dequantize(codes, *whole, spec), (numerics.fake_quantize(x, *whole, spec)))


def test_round_scale():
    given_scales = torch.tensor([0.0, -1.0, 1e-30, 0.1, 1e30, math.inf, math.nan])
    rounded = numerics.round_scale(given_scales, torch.float16)
    assert rounded.tolist() == [1.0, 1.0, 2.0**-24, torch.tensor(0.1).half().item(), 65504.0, 65504.0, 1.0]


def test_inputs_are_left_alone():
    x, importance = torch.randn(4, 40, dtype=torch.float64), torch.rand(40)
    copies = x.clone(), importance.clone()
    for spec in SPECS:
        codes = numerics.quantize(x, *numerics.mse_qparams(x, spec, torch.float32, importance=importance), spec)
        numerics.sqnr_db(x, codes)
        numerics.pack_bits(codes, spec.bits)
    assert torch.equal(x, copies[0])
    assert torch.equal(importance, copies[1])


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert numerics.sqnr_db(reference, reference + 0.5) == pytest.approx(10 * math.log10(25 / 0.5))
    assert numerics.sqnr_db(reference, reference) == math.inf
    assert numerics.sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    large = torch.randn(600, 1000)  # longer than one slice
    noisy = large + 0.1 * torch.randn(600, 1000)
    expected = 10 * math.log10(large.double().square().sum() / (large.double() - noisy.double()).square().sum())
    assert numerics.sqnr_db(large, noisy) == pytest.approx(expected, abs=1e-9)


def test_gram_error():
    x, error = torch.randn(20, 6), torch.randn(4, 6)
    assert numerics.gram_error(error, x.T @ x) == pytest.approx(float((x @ error.T).square().sum()), rel=1e-5)
    assert numerics.gram_error(torch.zeros(4, 6), x.T @ x) == 0


# --- float codes ------------------------------------------------------------------------------------------------------

FLOAT_SPECS = [
    QuantSpec(dtype, granularity, group)
    for dtype in ("float8_e4m3fn", "float8_e5m2")
    for granularity, group in GROUPS.items()
]


def nearest_float(value: float, spec: QuantSpec) -> float:
    """The finite number of the format nearest to a value; of two, the one with an even last bit."""
    table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(spec.code_dtype)
    finite = [(float(v), byte) for byte, v in enumerate(table.float()) if math.isfinite(v)]
    return min(finite, key=lambda entry: (abs(entry[0] - value), entry[1] % 2))[0]


@pytest.mark.parametrize("spec", FLOAT_SPECS, ids=str)
def test_float_codes_are_the_nearest_numbers(spec):
    x = torch.randn(3, 41) * torch.logspace(-4, 2, 41)
    scale, zero = numerics.min_max_qparams(x, spec, torch.float32)
    assert zero is None
    scale = scale * 0.8  # some values lie beyond the largest code
    codes = numerics.quantize(x, scale, None, spec)
    assert codes.dtype == spec.code_dtype
    width = spec.group_of(41)
    wide = numerics.expand_groups(scale, 41, width).expand(3, 41)
    expected = [[nearest_float(float(v), spec) for v in row] for row in x / wide]
    assert codes.float().tolist() == expected
    assert float(codes.float().abs().max()) == spec.quant_max
    values = numerics.dequantize(codes, scale, None, spec)
    assert torch.equal(values, codes.float() * wide)


@pytest.mark.parametrize("spec", FLOAT_SPECS, ids=str)
@pytest.mark.parametrize("choose", [numerics.min_max_qparams, numerics.mse_qparams])
def test_scales_of_float_codes(choose, spec):
    x = torch.randn(4, 48)
    x[0, :16] = 0
    scale, zero = choose(x, spec, torch.bfloat16)
    assert zero is None
    assert torch.equal(scale.bfloat16().float(), scale)
    if choose is numerics.min_max_qparams:
        groups = x.reshape(4, -1, spec.group_of(48)).abs().amax(-1)
        largest = groups.max().reshape(1, 1) if spec.granularity == "per_tensor" else groups
        expected = torch.where(largest > 0, largest / spec.quant_max, 1.0)
        torch.testing.assert_close(scale, expected, rtol=2**-8, atol=0)
        error = (numerics.fake_quantize(x, scale, None, spec) - x).abs()
        step = torch.finfo(spec.code_dtype).eps * largest.max()
        assert float(error.max()) <= step
    else:
        full = numerics.min_max_qparams(x, spec, torch.bfloat16)
        ones = torch.ones(48)
        assert (squared_error(x, (scale, None), spec, ones) <= squared_error(x, full, spec, ones)).all()
        gain = squared_error(x, full, spec, ones).sum() / squared_error(x, (scale, None), spec, ones).sum()
        assert gain > (1.0 if spec.granularity == "per_tensor" else 1.05)


def test_one_number_of_a_float_format_is_exact():
    spec = QuantSpec("float8_e4m3fn", "per_tensor", None)
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()[None]
    one = torch.ones(1, 1)
    assert torch.equal(
        numerics.fake_quantize(torch.cat([numbers, -numbers]), one, None, spec), torch.cat([numbers, -numbers])
    )
    assert torch.equal(numerics.round_codes(numbers, spec), numbers)
    assert numerics.round_codes(torch.tensor([1e4, -1e4]), spec).tolist() == [448, -448]
    integers = QuantSpec("int8", "per_tensor", None)
    assert numerics.round_codes(torch.tensor([0.5, 1.5, 300.0]), integers).tolist() == [0, 2, 127]


# --- 4-bit floats -----------------------------------------------------------------------------------------------------

FP4 = ["nvfp4a16", "mxfp4a16-ceil", "mxfp4a16-floor"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def single(value: float) -> float:
    """Rounded to float32, as every step of the format is."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def naive_fp4(x: Tensor, scheme: str) -> tuple[list[list[float]], list[list[float]]]:
    """Scale and rounded value, block after block in plain Python; the scales of E4M3 found by trying all of them."""
    is_nv, block = scheme.startswith("nv"), 16 if scheme.startswith("nv") else 32
    e4m3 = [(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][1:127]
    factor = single(x.abs().max().item() / 2688)
    scales: list[list[float]] = []
    values: list[list[float]] = []
    for row in x.tolist():
        scales.append([])
        values.append([])
        for start in range(0, len(row), block):
            part = row[start : start + block]
            largest = max(abs(value) for value in part)
            if is_nv:
                wanted = single(single(largest / 6) / factor)
                near = min(range(126), key=lambda i: (abs(e4m3[i] - wanted), (i + 1) % 2))  # byte i + 1: even wins
                scale = single(e4m3[near] * factor)
            elif scheme.endswith("floor"):
                scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1.0
            else:
                scale = 2.0 ** math.ceil(math.log2(largest / 6)) if largest else 1.0
            scales[-1].append(scale)
            for value in part:
                size = single(abs(value) / scale)
                code = min(range(8), key=lambda c: (abs(E2M1[c] - size), c % 2))
                values[-1].append(math.copysign(single(E2M1[code] * scale), value))
    return scales, values


@pytest.mark.parametrize("width", [96, 72, 8])
@pytest.mark.parametrize("scheme", FP4)
def test_four_bit_floats_equal_plain_python(scheme, width):
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    x = torch.randn(5, width) ** 3 * torch.logspace(-3, 2, 5)[:, None]
    x[1, :32] = 0
    scale, zero = numerics.min_max_qparams(x, spec, spec.scale_torch_dtype(x.dtype))
    expected_scale, expected = naive_fp4(x, scheme)
    assert zero is None
    assert torch.equal(scale, torch.tensor(expected_scale))
    assert torch.equal(numerics.fake_quantize(x, scale, None, spec), torch.tensor(expected))


@pytest.mark.parametrize("scheme", FP4)
def test_scales_of_four_bit_floats_are_the_best_of_their_neighbours(scheme, monkeypatch):
    """Against all scales as near as half as much again or three fifths, or a power of two; in slices of a few rows."""
    monkeypatch.setattr(arithmetic, "_SLICE_ELEMENTS", 200)
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    x, importance = torch.randn(6, 72), torch.rand(72) + 0.1
    dtype = spec.scale_torch_dtype(x.dtype)
    factor = numerics.scale_factor(x, spec)
    near, _ = numerics.min_max_qparams(x, spec, dtype)
    near_byte = (near if factor is None else near / factor).to(dtype).view(torch.uint8).int()
    lowest, highest = (-6, 5) if spec.has_factor else (-1, 1)
    found = numerics.mse_qparams(x, spec, dtype, importance=importance)
    least = squared_error(x, (near, None), spec, importance)
    assert bool((squared_error(x, found, spec, importance) <= least).all())
    for byte in range(1, 127) if spec.has_factor else range(110, 140):
        stored = torch.full_like(near, byte, dtype=torch.uint8)
        one = fp4.decode_scale(stored.view(torch.float8_e4m3fn) if spec.has_factor else stored, factor)
        allowed = (byte - near_byte >= lowest) & (byte - near_byte <= highest)
        tried = squared_error(x, (one, None), spec, importance)
        least = torch.where(allowed & (tried < least), tried, least)
    assert torch.allclose(squared_error(x, found, spec, importance), least, rtol=1e-5)


@pytest.mark.parametrize("scheme", FP4)
def test_scales_of_four_bit_floats_by_the_gram_matrix(scheme):
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    x, inputs = torch.randn(16, 72), torch.randn(200, 72) @ torch.randn(72, 72)
    gram = inputs.T @ inputs
    dtype = spec.scale_torch_dtype(x.dtype)

    def block_errors(qparams: tuple[Tensor, Tensor | None]) -> Tensor:
        wrong = numerics.fake_quantize(x, *qparams, spec) - x
        group = spec.group_of(72)
        starts = range(0, 72, group)
        parts = [(wrong[:, s : s + group], gram[s : s + group, s : s + group]) for s in starts]
        return torch.stack([((part @ block) * part).sum(-1) for part, block in parts], -1)

    full = block_errors(numerics.min_max_qparams(x, spec, dtype))
    found = block_errors(numerics.gram_qparams(x, spec, dtype, gram))
    assert bool((found <= full * (1 + 1e-5)).all())
    by_mse = block_errors(numerics.mse_qparams(x, spec, dtype)).sum()
    assert found.sum() < 0.97 * full.sum()
    assert found.sum() < by_mse
