import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics import arithmetic, fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import Granularity, QuantSpec

GROUPS: dict[Granularity, int | None] = {"per_group": 16, "per_channel": None, "per_tensor": None}
SPECS = [
    QuantSpec(f"int{bits}", granularity, group, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity, group in GROUPS.items()
    for symmetric in (True, False)
]
SCALE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

specs = st.builds(
    lambda bits, group, symmetric: Scheme.parse(f"w{bits}a16", group_size=group, symmetric=symmetric).weight,
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 1, 3, 8, 16, 100]),
    st.booleans(),
)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Normal values with outliers, shifted, of any magnitude; some groups are all zero."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, width, generator=generator) ** draw(st.sampled_from([1, 3]))
    x = (x + draw(st.sampled_from([0.0, 2.0, -5.0]))) * 10.0 ** draw(st.integers(-3, 2))
    x[:, draw(st.integers(0, width)) :] = 0
    return x


def naive_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    codes = torch.empty(x.shape, dtype=spec.code_dtype)
    group = spec.group_size or x.shape[1]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            at = (min(i, len(scale) - 1), j // group)
            quotient = (x[i, j] / scale[at]).item()
            code = round(quotient) + (0 if zero is None else int(zero[at]))  # Python rounds half to even
            codes[i, j] = min(max(code, spec.quant_min), spec.quant_max)
    return codes


def squared_error(x: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, importance: Tensor) -> Tensor:
    """float64 ``[rows or 1, groups]``."""
    error = (numerics.fake_quantize(x, *qparams, spec).double() - x.double()).square() * importance.double()
    if spec.granularity == "per_tensor":
        return error.sum().reshape(1, 1)
    return torch.stack([part.sum(-1) for part in error.split(spec.group_of(x.shape[1]), dim=-1)], dim=-1)


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


@settings(max_examples=150, deadline=None)
@given(matrices(), specs, st.sampled_from(SCALE_DTYPES))
def test_min_max_covers(x, spec, scale_dtype):
    scale, zero = numerics.min_max_qparams(x, spec, scale_dtype)
    group = spec.group_of(x.shape[1])
    assert scale.dtype == torch.float32
    assert scale.shape == (x.shape[0], math.ceil(x.shape[1] / group))
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(scale, scale.to(scale_dtype).float())
    assert (zero is None) == spec.symmetric
    if zero is not None:
        assert zero.dtype == torch.uint8
        assert zero.shape == scale.shape
        assert zero.max() <= spec.quant_max
    # Half a step everywhere; and the ends move by what the scale (and the zero point, half a code) was rounded by.
    step = numerics.expand_groups(scale, x.shape[1], group)
    rounding = torch.finfo(scale_dtype).eps * step + (2.0**-25 if scale_dtype == torch.float16 else 0)
    limit = step * (0.5 if spec.symmetric else 1.0) + 2**spec.bits * rounding
    assert ((numerics.fake_quantize(x, scale, zero, spec) - x).abs() <= limit).all()


def test_min_max_reference_values():
    spec = QuantSpec("int4", "per_channel", None)
    x = torch.tensor([[-7.5, 3.0], [0.75, -0.3]])
    assert numerics.min_max_qparams(x, spec, torch.float32)[0].flatten().tolist() == pytest.approx([1.0, 0.1])
    scale, zero = numerics.min_max_qparams(
        torch.tensor([[-0.5, 1.0], [2.0, 3.0], [-3.0, -1.0]]),
        QuantSpec("int4", "per_channel", None, symmetric=False),
        torch.float32,
    )
    assert scale.flatten().tolist() == pytest.approx([0.1, 0.2, 0.2])  # the range always holds zero
    assert zero is not None
    assert zero.flatten().tolist() == [5, 0, 15]


def test_zero_is_exact():
    x = torch.tensor([[0.0, 1.3, 2.9, -0.7]])
    for spec in SPECS:
        assert numerics.fake_quantize(x, *numerics.min_max_qparams(x, spec, torch.float16), spec)[0, 0] == 0


@pytest.mark.parametrize("choose", [numerics.min_max_qparams, numerics.mse_qparams])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_all_zero_groups(choose, spec):
    x = torch.zeros(2, 32)
    scale, zero = choose(x, spec, torch.float16)
    assert (scale == 1).all()
    assert (numerics.fake_quantize(x, scale, zero, spec) == 0).all()


@pytest.mark.parametrize("choose", [numerics.min_max_qparams, numerics.mse_qparams])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-12, 1e-7, 1e5, 1e30, 3e38])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scales_stay_positive_and_finite(choose, symmetric, magnitude, scale_dtype):
    x = torch.linspace(-1, 1, 64).reshape(2, 32) * magnitude
    spec = QuantSpec("int4", "per_channel", None, symmetric)
    scale, zero = choose(x, spec, scale_dtype)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert numerics.fake_quantize(x, scale, zero, spec).isfinite().all()


def test_small_weights_keep_their_resolution_in_float16():
    x = torch.randn(4, 64) * 1e-4  # the scale, 2e-6, is subnormal
    spec = QuantSpec("int8", "per_channel", None)
    found = numerics.fake_quantize(x, *numerics.min_max_qparams(x, spec, torch.float16), spec)
    assert numerics.sqnr_db(x, found) > 35


def test_round_scale():
    given_scales = torch.tensor([0.0, -1.0, 1e-30, 0.1, 1e30, math.inf, math.nan])
    rounded = numerics.round_scale(given_scales, torch.float16)
    assert rounded.tolist() == [1.0, 1.0, 2.0**-24, torch.tensor(0.1).half().item(), 65504.0, 65504.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(matrices(), specs, st.sampled_from(SCALE_DTYPES), st.booleans())
def test_search_is_never_worse_than_min_max(x, spec, scale_dtype, weighted):
    importance = torch.rand(x.shape[1]) ** 4 if weighted else torch.ones(x.shape[1])
    found = numerics.mse_qparams(x, spec, scale_dtype, importance=importance if weighted else None)
    full = numerics.min_max_qparams(x, spec, scale_dtype)
    assert torch.equal(found[0], found[0].to(scale_dtype).float())
    assert found[0].shape == full[0].shape
    least, most = (squared_error(x, qparams, spec, importance) for qparams in (found, full))
    slack = 1e-12 * (importance * x.square()).sum()  # rounding in float32
    assert (least <= most * (1 + 1e-4) + slack).all()


def test_search_keeps_the_full_range_where_rounding_spoils_the_found_scale():
    spec, importance = QuantSpec("int8", "per_group", 16), torch.ones(256)
    x = torch.randn(64, 256)  # without the comparison, bfloat16 scales make one group in twenty worse
    found, full = (choose(x, spec, torch.bfloat16) for choose in (numerics.mse_qparams, numerics.min_max_qparams))
    least, most = (squared_error(x, qparams, spec, importance) for qparams in (found, full))
    assert (least <= most * (1 + 1e-4)).all()
    assert (least < most * 0.99).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
@pytest.mark.parametrize(("bits", "tolerance", "gain"), [(2, 1.02, 1.5), (3, 1.02, 1.2), (4, 1.02, 1.05), (8, 1.04, 1)])
def test_search_comes_near_exhaustive_search(bits, tolerance, gain, granularity, symmetric, weighted):
    spec = QuantSpec(f"int{bits}", granularity, 128 if granularity == "per_group" else None, symmetric)
    x = torch.randn(8, 512)
    importance = torch.rand(512) if weighted else torch.ones(512)
    found = numerics.mse_qparams(x, spec, torch.float32, importance=importance if weighted else None)
    full, zero = numerics.min_max_qparams(x, spec, torch.float32)
    grid = [squared_error(x, (full * keep, zero), spec, importance) for keep in torch.linspace(0.2, 1.0, 200)]
    best = torch.stack(grid).amin(0).sum()
    error = squared_error(x, found, spec, importance).sum()
    assert error <= tolerance * best
    assert squared_error(x, (full, zero), spec, importance).sum() >= gain * error


def test_padding_of_a_short_last_group_does_not_count():
    spec = QuantSpec("int3", "per_group", 16)
    x = torch.randn(8, 20)
    found, _ = numerics.mse_qparams(x, spec, torch.float32)
    alone, _ = numerics.mse_qparams(x[:, 16:], QuantSpec("int3", "per_channel", None), torch.float32)
    torch.testing.assert_close(found[:, 1:], alone)


def test_columns_without_importance_do_not_count():
    spec = QuantSpec("int4", "per_channel", None)
    x = torch.randn(4, 64)
    x[:, 0] = 9.0
    importance = torch.ones(64)
    importance[0] = 0
    scale, _ = numerics.mse_qparams(x, spec, torch.float32, importance=importance)
    assert (scale < 0.5 * numerics.min_max_qparams(x, spec, torch.float32)[0]).all()


def test_inputs_are_left_alone():
    x, importance = torch.randn(4, 40, dtype=torch.float64), torch.rand(40)
    copies = x.clone(), importance.clone()
    for spec in SPECS:
        codes = numerics.quantize(x, *numerics.mse_qparams(x, spec, torch.float32, importance=importance), spec)
        numerics.sqnr_db(x, codes)
        numerics.pack_bits(codes, spec.bits)
    assert torch.equal(x, copies[0])
    assert torch.equal(importance, copies[1])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_pack_round_trip(bits, signed, width, rows, seed):
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + (1 << bits), (rows, 2, width), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = numerics.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2, math.ceil(width * bits / 8))
    assert packed.is_contiguous()
    for row, stored in zip(codes.reshape(-1, width).tolist(), packed.reshape(-1, packed.shape[-1]), strict=True):
        stream = sum((code % (1 << bits)) << (bits * i) for i, code in enumerate(row))
        assert bytes(stored.tolist()) == stream.to_bytes(len(stored), "little")
    assert torch.equal(numerics.unpack_bits(packed, bits, width, signed=signed), codes)


def test_pack_takes_any_strides():
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
    assert torch.equal(numerics.pack_bits(codes.T, 4), numerics.pack_bits(codes.T.contiguous(), 4))


@pytest.mark.parametrize(("dtype", "signed"), [("INT4", True), ("UINT4", False), ("INT2", True), ("UINT2", False)])
def test_pack_agrees_with_onnx(dtype, signed):
    onnx = pytest.importorskip("onnx")
    bits = int(dtype[-1])
    low = -(1 << (bits - 1)) if signed else 0
    codes = torch.randint(low, low + (1 << bits), (16,), dtype=torch.int8 if signed else torch.uint8)
    packed = bytes(numerics.pack_bits(codes, bits).tolist())
    tensor = onnx.helper.make_tensor("codes", getattr(onnx.TensorProto, dtype), [16], packed, raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype("int32").tolist() == codes.tolist()


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert numerics.sqnr_db(reference, reference + 0.5) == pytest.approx(10 * math.log10(25 / 0.5))
    assert numerics.sqnr_db(reference, reference) == math.inf
    assert numerics.sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    large = torch.randn(600, 1000)  # longer than one slice
    noisy = large + 0.1 * torch.randn(600, 1000)
    expected = 10 * math.log10(large.double().square().sum() / (large.double() - noisy.double()).square().sum())
    assert numerics.sqnr_db(large, noisy) == pytest.approx(expected, abs=1e-9)


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


# --- squares ----------------------------------------------------------------------------------------------------------

SHAPES = [(16, 24), (13, 21), (8, 5), (3, 20), (1, 1)]  # squares of 8, whole and not


def square_spec(dtype: str = "float8_e4m3fn") -> QuantSpec:
    return QuantSpec(dtype, "per_block", 8)


def square_sums(values: Tensor) -> Tensor:
    """float64 ``[blocks down, blocks along]``."""
    return torch.stack(
        [torch.stack([part.double().sum() for part in strip.split(8, 1)]) for strip in values.split(8, 0)]
    )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_equal_plain_python(shape, dtype):
    spec, x = square_spec(dtype), torch.randn(shape) ** 3 - 0.5
    scale, zero = numerics.min_max_qparams(x, spec, torch.float32)
    assert zero is None
    assert scale.shape == (shape[0], -(-shape[1] // 8))
    found = numerics.fake_quantize(x, scale, None, spec)
    for i in range(shape[0]):
        for j in range(shape[1]):
            top, left = i // 8 * 8, j // 8 * 8
            expected = x[top : top + 8, left : left + 8].abs().max() / spec.quant_max
            assert scale[i, j // 8] == expected
            code = (x[i, j] / expected).clamp(-spec.quant_max, spec.quant_max).to(spec.code_dtype)
            assert found[i, j] == code.float() * expected


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_searched_scales_of_squares(shape, importance, monkeypatch):
    """Never worse than the full range, and that of each square alone, as one tensor."""
    monkeypatch.setattr(arithmetic, "_SLICE_ELEMENTS", 200)
    spec, x = square_spec("float8_e5m2"), torch.randn(shape)
    cost = torch.rand(shape[1]) + 0.1 if importance else torch.ones(shape[1])
    found, _ = numerics.mse_qparams(x, spec, torch.float32, importance=cost if importance else None)
    full, _ = numerics.min_max_qparams(x, spec, torch.float32)
    errors = [square_sums((numerics.fake_quantize(x, s, None, spec) - x).square() * cost) for s in (found, full)]
    assert bool((errors[0] <= errors[1]).all())
    alone = QuantSpec("float8_e5m2", "per_tensor", None)
    for top in range(0, shape[0], 8):
        for left in range(0, shape[1], 8):
            part, columns = x[top : top + 8, left : left + 8], slice(left, left + 8)
            expected, _ = numerics.mse_qparams(
                part, alone, torch.float32, importance=cost[columns] if importance else None
            )
            assert torch.allclose(found[top : top + 8, left // 8], expected.flatten(), rtol=1e-4)


def test_scales_of_squares_by_the_gram_matrix():
    spec, x, inputs = square_spec("float8_e5m2"), torch.randn(13, 21), torch.randn(80, 21) @ torch.randn(21, 21)
    gram = inputs.T @ inputs

    def errors(scale: Tensor) -> Tensor:
        wrong = numerics.fake_quantize(x, scale, None, spec) - x
        blocks = torch.block_diag(*(gram[s : s + 8, s : s + 8] for s in range(0, 21, 8)))
        return square_sums((wrong @ blocks) * wrong)

    found, _ = numerics.gram_qparams(x, spec, torch.float32, gram)
    full, _ = numerics.min_max_qparams(x, spec, torch.float32)
    assert bool((errors(found) <= errors(full) * (1 + 1e-5)).all())
    assert errors(found).sum() < 0.95 * errors(full).sum()
    assert torch.equal(found[::8].repeat_interleave(8, 0)[:13], found)
