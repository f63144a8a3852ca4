"""The canonical operators against arithmetic written out, under fake tensors and with gradients."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler import numerics
from qcompiler.ir.ops import CANONICAL
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec

ops = torch.ops.qcompiler


def naive_attention(q, k, v, mask, scale, causal, window=None, softcap=None):
    """One query and one key at a time; double precision."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            shared = h * k.shape[1] // q.shape[1]
            for s in range(q.shape[2]):
                position = k.shape[2] - q.shape[2] + s
                logits = []
                for t in range(k.shape[2]):
                    logit = float(q[b, h, s].double() @ k[b, shared, t].double()) * scale
                    logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
                    hidden = causal and t > position
                    hidden |= causal and window is not None and t <= position - window
                    if mask is not None:
                        value = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[b, h, s, t]
                        hidden |= not bool(value) if mask.dtype == torch.bool else False
                        logit += 0.0 if mask.dtype == torch.bool else float(value)
                    logits.append(float("-inf") if hidden else logit)
                weights = torch.tensor(logits, dtype=torch.float64)
                if weights.isfinite().any():
                    out[b, h, s] = torch.softmax(weights, 0) @ v[b, shared].double()
    return out.float()


def inputs(queries, keys, heads=4, shared=2):
    return torch.randn(2, heads, queries, 8), torch.randn(2, shared, keys, 8), torch.randn(2, shared, keys, 6)


def padding(keys):
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., :2] = False
    return mask


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5)])
@pytest.mark.parametrize("mask", [None, "bool", "float", "everything"])
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(True, None, None), (True, 2, None), (True, None, 0.7), (True, 3, 2.0), (False, None, None), (False, None, 0.7)],
)
def test_attention(queries, keys, mask, causal, window, softcap):
    q, k, v = inputs(queries, keys)
    tensor = {
        None: None,
        "bool": padding(keys),
        "float": torch.randn(2, 4, queries, keys),
        "everything": torch.ones(2, 1, 1, keys, dtype=torch.bool),
    }[mask]
    args = (q, k, v, tensor, 0.4, causal, window, softcap)
    torch.testing.assert_close(ops.attention(*args), naive_attention(*args), rtol=0, atol=5e-6)


def test_attention_to_nothing_is_zero():
    q, k, v = inputs(2, 3)
    nothing = torch.zeros(2, 1, 1, 3, dtype=torch.bool)
    for softcap in (None, 1.0):
        assert ops.attention(q, k, v, nothing, 0.4, False, None, softcap).abs().max() == 0


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(eps):
    x, w = torch.randn(2, 3, 5), torch.randn(5)
    expected = torch.stack([row / math.sqrt(float((row.double() ** 2).mean()) + eps) * w for row in x.reshape(-1, 5)])
    torch.testing.assert_close(ops.rms_norm(x, w, eps), expected.reshape(x.shape))
    assert ops.rms_norm(x.bfloat16(), w.bfloat16(), eps).dtype == torch.bfloat16


def test_layer_norm():
    x, w, b = torch.randn(2, 5), torch.randn(5), torch.randn(5)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-3), expected * w + b)
    torch.testing.assert_close(ops.layer_norm(x, None, None, 1e-3), expected)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_pairs(interleaved):
    x, angle = torch.randn(1, 2, 3, 4), torch.randn(3, 2)
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    cos, sin, expected = torch.empty(3, 4), torch.empty(3, 4), torch.empty_like(x)
    for i, (a, b) in enumerate(pairs):
        cos[:, [a, b]], sin[:, [a, b]] = angle[:, i : i + 1].cos(), angle[:, i : i + 1].sin()
        turned = torch.polar(torch.ones(3), angle[:, i]) * torch.complex(x[..., a], x[..., b])
        expected[..., a], expected[..., b] = turned.real, turned.imag
    torch.testing.assert_close(ops.rotary(x, cos, sin, interleaved), expected)


def test_kv_append_and_linear():
    past, new = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)
    present = ops.kv_append(past, new)
    assert present.shape == (1, 2, 5, 4)
    assert torch.equal(present[:, :, 3:], new)
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    torch.testing.assert_close(ops.linear(x, w, b), x @ w.T + b)
    torch.testing.assert_close(ops.linear(x, w), x @ w.T)


LAYOUTS = [
    ("per_tensor", None, lambda scale: scale.reshape(()), 0, 0),
    ("per_channel", None, lambda scale: scale[:, 0], 0, 0),
    ("per_group", 4, lambda scale: scale, 1, 4),
    ("per_group", 5, lambda scale: scale, 1, 5),  # the last group is short
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "group", "layout", "axis", "block"), LAYOUTS)
def test_quantize_and_dequantize_are_the_reference_arithmetic(granularity, group, layout, axis, block, symmetric):
    spec = QuantSpec("int8", granularity, group, symmetric)
    x = torch.randn(3, 12)
    scale, zero_point = numerics.min_max_qparams(x, spec, torch.float32)
    arranged = None if zero_point is None else layout(zero_point)
    dtype = torch.int8 if symmetric else torch.uint8
    codes = ops.quantize(x, layout(scale), arranged, axis, block, dtype)
    assert torch.equal(codes, numerics.quantize(x, scale, zero_point, spec))
    values = ops.dequantize(codes, layout(scale), arranged, axis, block, torch.float32)
    torch.testing.assert_close(values, numerics.dequantize(codes, scale, zero_point, spec), rtol=0, atol=0)


def test_quantize_saturates_and_rounds_half_to_even():
    x = torch.tensor([-1e9, -1.5, -0.5, 0.5, 1.5, 2.5, 1e9])
    assert ops.quantize(x, torch.tensor(1.0), None, 0, 0, torch.int8).tolist() == [-128, -2, 0, 0, 2, 2, 127]
    zero_point = torch.tensor(3, dtype=torch.uint8)
    assert ops.quantize(x, torch.tensor(1.0), zero_point, 0, 0, torch.uint8).tolist() == [0, 1, 3, 3, 5, 5, 255]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float_codes_saturate_and_round_half_to_even(dtype):
    spec = QuantSpec(str(dtype).removeprefix("torch."), "per_tensor", None)
    x = torch.tensor([-math.inf, -1e9, -17.0, 0.0, 2.0**-10, 1.5 * 2.0**-10, 9.0, 17.0, 19.0, 449.0, 1e9, math.inf])
    codes = ops.quantize(x, torch.tensor(1.0), None, 0, 0, dtype)
    assert codes.dtype == dtype
    if dtype == torch.float8_e4m3fn:
        expected = [-448.0, -448.0, -16.0, 0.0, 0.0, 2.0**-9, 9.0, 16.0, 20.0, 448.0, 448.0, 448.0]
    else:
        small, largest = [2.0**-10, 1.5 * 2.0**-10], 57344.0
        expected = [-largest, -largest, -16.0, 0.0, *small, 8.0, 16.0, 20.0, 448.0, largest, largest]
    assert codes.float().tolist() == expected
    assert torch.equal(ops.dequantize(codes, torch.tensor(0.5), None, 0, 0, torch.float32), codes.float() * 0.5)
    y = torch.randn(3, 12) * 100
    scale, _ = numerics.min_max_qparams(y, spec, torch.float32)
    found = ops.quantize(y, scale.reshape(()), None, 0, 0, dtype)
    assert torch.equal(found.float(), numerics.quantize(y, scale, None, spec).float())


@pytest.mark.parametrize("axis", [None, -1, 1])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_ranges_of_the_values_themselves(dtype, axis):
    x = torch.randn(2, 3, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None] + 0.7
    x[0, 0] = 0
    scale, zero = ops.choose_qparams(x, dtype, axis)
    slices = x.reshape(1, -1) if axis is None else x.movedim(axis, -1).reshape(-1, x.shape[axis])
    assert scale.shape == zero.shape == (() if axis is None else x.amax(axis, keepdim=True).shape)
    assert (scale.dtype, zero.dtype) == (torch.float32, dtype)
    for row, s, z in zip(slices, scale.flatten(), zero.flatten(), strict=True):
        if dtype == torch.uint8:
            low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
            expected = max((high - low) / 255, 2.0**-23)
            assert int(z) == round(-low / float(s))
        else:
            largest = {torch.int8: 127.5, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}[dtype]
            expected = max(float(row.abs().max()) / largest, 2.0**-23)
            assert float(z) == 0
        assert float(s) == pytest.approx(expected, rel=1e-6)
    block = 0 if axis is None else x.shape[axis]
    point = zero if dtype == torch.uint8 else None
    codes = ops.quantize(x, scale, point, axis or 0, block, dtype)
    back = ops.dequantize(codes, scale, point, axis or 0, block, torch.float32)
    step = scale if dtype in (torch.int8, torch.uint8) else scale * torch.finfo(dtype).max * torch.finfo(dtype).eps
    assert bool(((back - x).abs() <= step * 0.5001).all())


def test_zeros_have_a_positive_scale_and_stay_zeros():
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        scale, zero = ops.choose_qparams(torch.zeros(2, 4), dtype, -1)
        assert bool((scale > 0).all())
        assert bool((scale.half() > 0).all())
        codes = ops.quantize(torch.zeros(2, 4), scale, zero if dtype == torch.uint8 else None, -1, 4, dtype)
        assert bool((codes.float() == zero.float()).all())


def test_dequantize_counts_in_the_scale_s_dtype():
    codes, scale = torch.tensor([7, -8], dtype=torch.int8), torch.tensor(0.1, dtype=torch.float16)
    values = ops.dequantize(codes, scale, None, 0, 0, torch.float32)
    assert values.dtype == torch.float32
    assert torch.equal(values, (codes.half() * scale).float())


def test_gradients_and_tracing():
    q, k, v = (t.double().requires_grad_() for t in inputs(3, 4))
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, None, 0.4, True, 2, 1.5), (q, k, v))
    x, w = torch.randn(2, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.rms_norm(x, w, 1e-3).sum(), x)
    assert gradient.abs().max() > 0
    traced = make_fx(lambda *t: ops.attention(*t, None, 0.4, True), tracing_mode="fake")(*inputs(3, 4))
    assert traced(*inputs(3, 4)).shape == (2, 4, 3, 6)

    def rounded(x):
        scale, zero = ops.choose_qparams(x, torch.uint8, -1)
        codes = ops.quantize(x, scale, zero, -1, 5, torch.uint8)
        return ops.dequantize(codes, scale, zero, -1, 5, torch.float32)

    x = torch.randn(2, 3, 5)
    assert torch.equal(make_fx(rounded, tracing_mode="fake")(x)(x), rounded(x))


def test_every_operator_is_defined():
    for name in CANONICAL:
        assert getattr(ops, name).default._schema.name == f"qcompiler::{name}"


def test_experts_work_on_the_rows_sent_to_them():
    x, experts = torch.randn(5, 3), torch.tensor([2, 0, 2, 1, 7])
    rows = [ops.take_expert(x, experts, index) for index in range(4)]
    assert [len(part) for part in rows] == [1, 1, 2, 0]
    assert torch.equal(rows[2], x[[0, 2]])
    merged = ops.merge_experts(rows, experts)
    assert torch.equal(merged[:4], x[:4])
    assert torch.equal(merged[4], torch.zeros(3))  # no such expert


def test_gradients_pass_through_experts():
    x = torch.randn(4, 3, requires_grad=True)
    experts = torch.tensor([1, 0, 1, 0])
    rows = [(index + 1) * ops.take_expert(x, experts, index) for index in range(2)]
    ops.merge_experts(rows, experts).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [2.0, 1.0, 2.0, 1.0]


def test_codes_are_places_in_the_table_of_their_row():
    codes = torch.randint(8, (5, 7), dtype=torch.uint8)
    table = torch.randn(5, 8, requires_grad=True)
    found = ops.codebook_dequantize(codes, table)
    assert found.tolist() == [[float(table.detach()[i, int(codes[i, j])]) for j in range(7)] for i in range(5)]
    found.sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[float((codes[i] == level).sum()) for level in range(8)] for i in range(5)]


def test_a_sparse_matrix_is_added():
    w = torch.randn(4, 6)
    values, columns = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([5, 0, 5], dtype=torch.int32)
    offsets = torch.tensor([0, 1, 1, 3, 3], dtype=torch.int32)
    kept = w.clone()
    expected = torch.zeros(4, 6)
    expected[0, 5], expected[2, 0], expected[2, 5] = 1, 2, 4
    assert torch.equal(ops.sparse_add(w, values, columns, offsets), w + expected)
    assert torch.equal(w, kept)
    nothing = torch.zeros(5, dtype=torch.int32)
    assert torch.equal(ops.sparse_add(w, values[:0], columns[:0], nothing), w)
    traced = make_fx(ops.sparse_add, tracing_mode="fake")(w, values, columns, offsets)
    assert torch.equal(traced(w, values, columns, offsets), w + expected)


@pytest.mark.parametrize("block", [4, 12, 24])
def test_hadamard_is_orthogonal_in_every_block(block):
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    turned = ops.hadamard(x, block)
    matrix = ops.hadamard(torch.eye(block, dtype=torch.float64), block)
    assert torch.allclose(matrix @ matrix.T, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, block**-0.5), rtol=0, atol=1e-12)
    expected = torch.cat([part @ matrix for part in x.split(block, dim=-1)], dim=-1)
    assert torch.allclose(turned, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda value: ops.hadamard(value, block), x)


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_codes_stay_in_their_range_and_clip(bits):
    x = torch.randn(5, 64)
    scale, _ = ops.choose_qparams(x, torch.int8, -1, bits, 0.8)
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) * 0.8 / (2 ** (bits - 1) - 0.5))
    codes = ops.quantize(x, scale, None, -1, 64, torch.int8, bits)
    assert torch.equal(codes.float(), torch.round(x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    scale, zero = ops.choose_qparams(x, torch.uint8, -1, bits)
    codes = ops.quantize(x, scale, zero, -1, 64, torch.uint8, bits)
    assert codes.aminmax() == (0, 2**bits - 1)
    assert (ops.dequantize(codes, scale, zero, -1, 64, torch.float32) - x).abs().max() <= scale.max() * 1.001


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.int8, 8), (torch.int8, 4), (torch.uint8, 4), (torch.uint8, 8), (torch.float8_e4m3fn, 8)]
)
def test_ranges_of_blocks(dtype, bits, block):
    x = torch.randn(2, 3, 8)
    scale, zero = ops.choose_block_qparams(x, dtype, block, bits)
    assert scale.dtype == torch.float16
    assert scale.shape == zero.shape == (2, 3, 8 // block)
    for place in [(0, 0, 0), (1, 2, 8 // block - 1)]:
        values = x[place[0], place[1], place[2] * block : (place[2] + 1) * block]
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        largest = float(values.abs().max())
        if dtype == torch.uint8:
            wanted = torch.tensor((high - low) / (2**bits - 1)).half()
            assert int(zero[place]) == min(max(round(-low / float(wanted)), 0), 2**bits - 1)
        else:
            wanted = torch.tensor(largest / (448 if dtype == torch.float8_e4m3fn else 2 ** (bits - 1) - 1)).half()
            assert int(zero[place]) == 0
        assert scale[place] == wanted


def test_ranges_of_blocks_without_an_end():
    scale, _ = ops.choose_block_qparams(torch.tensor([[0.0, 0.0, 1e30, 1.0]]), torch.int8, 2)
    assert scale.tolist() == [[2.0**-23, 65504.0]]


def test_nibbles_are_packed_low_first():
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert ops.pack_nibbles(codes).tolist() == [[0 | 15 << 4, 8 | 7 << 4]]
    assert torch.equal(ops.unpack_nibbles(ops.pack_nibbles(codes), True), codes)
    unsigned = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    assert ops.pack_nibbles(unsigned)[0].tolist() == [1 << 4, 2 | 3 << 4, 4 | 5 << 4, 6 | 7 << 4]
    assert torch.equal(ops.unpack_nibbles(ops.pack_nibbles(unsigned), False), unsigned)


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp4-ceil"])
def test_four_bit_floats_are_the_reference_arithmetic(scheme, width):
    spec = Scheme.parse(scheme).activation
    block = spec.group_of(width)
    x = torch.randn(2, 3, width) * 3
    rows = x.reshape(6, width)
    factor = numerics.scale_factor(x, spec)
    expected, _ = numerics.min_max_qparams(rows, spec, torch.float32)
    scale = ops.fp4_scale(x, factor, block, spec.exponent == "floor")
    assert scale.shape == (2, 3, -(-width // block))
    assert scale.dtype == (torch.float8_e4m3fn if spec.has_factor else torch.uint8)
    codes = ops.fp4_quantize(x, scale, factor, block)
    assert torch.equal(codes.reshape(6, width), numerics.quantize(rows, expected, None, spec))
    for stored in (scale, scale.float()) if spec.has_factor else (scale,):
        values = ops.fp4_dequantize(codes, stored, factor, block)
        assert torch.equal(values.reshape(6, width), numerics.fake_quantize(rows, expected, None, spec))


def test_larger_activations_than_the_factor_was_made_for_are_clamped():
    x, factor = torch.full((1, 16), 100.0), torch.tensor(1.0 / 2688)  # for magnitudes up to 1
    scale = ops.fp4_scale(x, factor, 16, False)
    assert ops.fp4_dequantize(ops.fp4_quantize(x, scale, factor, 16), scale, factor, 16) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["fp8-dyngroup", "w8a8-dyngroup"])
def test_ranges_of_tokens_and_groups(name):
    """Each 128 channels of each token by themselves, the last 44 too."""
    spec = Scheme.parse(name).activation
    assert spec is not None
    x = torch.randn(2, 3, 300) * torch.logspace(-2, 2, 300)
    scale, zero = ops.choose_qparams(x, *spec.range_options(300))
    assert (scale.shape, zero.shape) == ((2, 3, 3), (2, 3, 3))
    codes = ops.quantize(x, scale, None, *spec.input_place(300), spec.code_dtype)
    rounded = ops.dequantize(codes, scale, None, *spec.input_place(300), torch.float32)
    for batch in range(2):
        for token in range(3):
            for group, start in enumerate((0, 128, 256)):
                piece = x[batch, token, start : start + 128]
                step = piece.abs().max() / (448 if name.startswith("fp8") else 127.5)
                assert scale[batch, token, group] == step
                wanted = (piece / step).to(torch.float8_e4m3fn).float() if name.startswith("fp8") else None
                if wanted is None:
                    wanted = (piece / step).round().clamp(-128, 127)
                torch.testing.assert_close(rounded[batch, token, start : start + 128], wanted * step, rtol=0, atol=0)
