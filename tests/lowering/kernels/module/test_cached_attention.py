"""Attention over buffers, whichever way it is computed."""

import pytest
import torch

from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.kernels.cache.append import append_quantized_reference, append_static_reference
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention, dequantized

CPU = torch.device("cpu")
B, H, CAPACITY, D = 2, 2, 48, 8
FORMATS = [None, CacheFormat("int8"), CacheFormat("int4", group_size=4, symmetric=False), CacheFormat("float8_e4m3fn")]
FORMATS += [CacheFormat("int8", "static")]


def filled(spec, values, dtype=torch.float32):
    """Codes, scale and zero point of a cache with these values, garbage behind them."""
    start = torch.zeros(1, dtype=torch.int32)
    if spec is None:
        codes = torch.full((B, H, CAPACITY, D), float("nan"), dtype=dtype)
        append_static_reference(values, codes, None, None, start, str(dtype).removeprefix("torch."))
        return codes, None, None
    codes = torch.full((B, H, CAPACITY, D // 2 if spec.is_packed else D), 85, dtype=torch.uint8)
    codes = codes.view(getattr(torch, spec.port_dtype))
    if spec.scales == "static":
        scale = torch.full((1, H, 1, D), 0.03)
        append_static_reference(values, codes, scale, None, start, spec.dtype)
        return codes, scale, None
    block = spec.block(D)
    scale = torch.full((B, H, CAPACITY, D // block), float("nan"), dtype=torch.float16)
    zero = None if spec.symmetric else torch.full(scale.shape, 99, dtype=torch.uint8)
    append_quantized_reference(values, codes, scale, zero, start, spec.dtype, block, spec.symmetric)
    return codes, scale, zero


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 16, 17, 40])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 2.0)])
def test_few_and_many_queries_give_what_the_graph_gives(spec, queries, window, softcap):
    total = 40
    k, v = torch.randn(2, B, H, total, D)
    q = torch.randn(B, 2 * H, queries, D)
    sides = [filled(spec, t) for t in (k, v)]
    options = {"scale": D**-0.5, "window": window, "softcap": softcap}
    layer = CachedAttention(spec, spec, (D, D), **options, device=CPU, dtype=torch.float32)
    found = layer(q, torch.tensor([total], dtype=torch.int32), total, *sides[0], *sides[1])
    used = [[t if t is None or t.shape[2] != CAPACITY else t[:, :, :total] for t in side] for side in sides]
    k_dq, v_dq = (dequantized(spec, *side, torch.float32) for side in used)
    expected = torch.ops.qcompiler.attention(q, k_dq, v_dq, None, D**-0.5, True, window, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (k_dq - k).abs().max() < 0.6


def test_keys_and_values_of_different_formats_and_widths():
    k, v = torch.randn(B, H, 20, D), torch.randn(B, H, 20, D)
    formats = CacheFormat("int8"), None
    layer = CachedAttention(*formats, (D, D), scale=1.0, window=None, softcap=None, device=CPU, dtype=torch.bfloat16)
    sides = filled(formats[0], k), filled(None, v, torch.bfloat16)
    for queries in (2, 20):
        q = torch.randn(B, H, queries, D).bfloat16()
        found = layer(q, torch.tensor([20], dtype=torch.int32), 20, *sides[0], *sides[1])
        expected = torch.ops.qcompiler.attention(q.float(), k, v, None, 1.0, True)
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() < 0.1
