"""Attention over a quantized cache on the CPU against the reference, with garbage behind the end of the cache."""

import pytest
import torch

from qcompiler.lowering.kernels.cache import cpu as decode_attention_cpu
from qcompiler.lowering.kernels.cache.decode_attention import decode_attention_reference
from tests.lowering.kernels.cache.filled_caches import (
    FORMATS,
    KERNELS,
    filled_cache,
    int32,
)


def compare(q, keys, values, lengths, window=None, softcap=None, tolerance=1e-5):
    given = (q, *keys.tensors, *values.tensors, int32(*lengths), keys.dtype, values.dtype, 0.17, window, softcap)
    got, want = KERNELS.decode_attention(*given), decode_attention_reference(*given)
    assert got.dtype == q.dtype
    assert got.shape == want.shape
    assert got.isfinite().all()
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    return got


@pytest.mark.parametrize(("queries", "window", "softcap"), [(1, None, None), (3, 10, None), (2, None, 20.0)])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_every_format(name, queries, window, softcap, monkeypatch):
    monkeypatch.setattr(decode_attention_cpu, "_CHUNK", 2 * 3 * 48 * 70)  # so that 150 tokens are three chunks
    spec = FORMATS.get(name)
    keys, values = (filled_cache(spec, 2, 3, 160, 48, (150,)) for _ in range(2))
    compare(torch.randn(2, 12, queries, 48), keys, values, (150,), window, softcap)


@pytest.mark.parametrize("lengths", [(0,), (1,), (2,), (40,), (0, 1, 33), (40, 7, 2)])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_every_length(lengths, window):
    keys = filled_cache(FORMATS["int4-g16-asymmetric"], 3, 2, 40, 32, lengths)
    values = filled_cache(FORMATS["int8"], 3, 2, 40, 32, lengths)
    q = torch.randn(3, 2, 3, 32)
    given = (q, *keys.tensors, *values.tensors, int32(*lengths), "int4", "int8", 0.17, window, None)
    got, want = KERNELS.decode_attention(*given), decode_attention_reference(*given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for i, length in enumerate(lengths * (3 // len(lengths))):
        unseen = max(0, 3 - length)
        assert not got[i, :, :unseen].any()
        assert got[i, :, unseen:].any(-1).all()


def test_keys_and_values_of_other_formats_and_widths():
    keys = filled_cache(FORMATS["fp8"], 1, 2, 20, 64, (17,))
    values = filled_cache(None, 1, 2, 20, 24, (17,), torch.bfloat16)
    out = compare(torch.randn(1, 8, 2, 64), keys, values, (17,))
    assert out.shape == (1, 8, 2, 24)


def test_sixteen_bit_queries_are_computed_in_float32():
    keys = filled_cache(FORMATS["int8"], 1, 2, 20, 64, (17,))
    q = torch.randn(1, 8, 1, 64).to(torch.bfloat16)
    compare(q, keys, keys, (17,), tolerance=4e-3)


@pytest.mark.parametrize("name", ["fp8", "fp8-static"])
def test_a_value_that_is_not_a_number_stays_visible(name):
    new = torch.randn(1, 1, 4, 32)
    new[0, 0, 2, 5] = torch.nan
    cache = filled_cache(FORMATS[name], 1, 1, 4, 32, (0,))
    cache.append(new, int32(0))
    out = KERNELS.decode_attention(new[:, :, :1], *cache.tensors, *cache.tensors, int32(4), *[cache.dtype] * 2, 0.2)
    assert out.isnan().any()


def test_an_empty_batch_gives_an_empty_result():
    cache = filled_cache(FORMATS["int8"], 0, 2, 8, 32, (4,))
    out = KERNELS.decode_attention(
        torch.randn(0, 4, 1, 32), *cache.tensors, *cache.tensors, int32(4), "int8", "int8", 1.0
    )
    assert out.shape == (0, 4, 1, 32)
