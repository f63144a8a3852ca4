"""The kernels of attention over quantized caches against the reference, interpreted or on a GPU.

What lies behind the end of a cache is poison: scales that are not a number, codes of all kinds.
"""

import pytest
import torch

pytest.importorskip("triton")

from qcompiler.lowering.kernels.cache.config import Config
from qcompiler.lowering.kernels.cache.decode_attention import Side, decode_attention_reference
from qcompiler.lowering.kernels.cache.triton_attention import launch
from tests.lowering.kernels.cache.filled_caches import FORMATS, filled_cache, int32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Config(32, 2, 2, 1)
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 2e-2}  # of the largest result: its rounding, and that of weights


def check(
    keys: str,
    values: str,
    lengths: tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 2,
    ratio: int = 4,
    queries: int = 1,
    width: int = 64,
    value_width: int | None = None,
    capacity: int = 200,
    window: int | None = None,
    softcap: float | None = None,
    splits: int | None = 3,
    dtype: torch.dtype = torch.float16,
    config: Config | None = SMALL,
) -> torch.Tensor:
    widths = (width, value_width or width)
    sides = [
        filled_cache(FORMATS.get(name), batch, heads, capacity, w, lengths, dtype)
        for name, w in zip((keys, values), widths, strict=True)
    ]
    q = torch.randn(batch, queries, heads * ratio, width).to(dtype).transpose(1, 2)
    length = int32(*lengths)
    scale = 1.5 / width**0.5
    tensors, dtypes = (*sides[0].tensors, *sides[1].tensors), (sides[0].dtype, sides[1].dtype)
    want = decode_attention_reference(q.float(), *tensors, length, *dtypes, scale, window, softcap)
    k, v = (Side.of("kv", *side.to(DEVICE).tensors, side.dtype) for side in sides)
    given = (q.to(DEVICE), k, v, length.to(DEVICE), scale, window, softcap)
    got = launch(*given, config=config, splits=splits)
    assert got.dtype == dtype
    assert got.shape == want.shape
    if DEVICE == "cuda":
        assert torch.equal(got, launch(*given, config=config, splits=splits))
    got = got.cpu().float()
    assert got.isfinite().all()
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()
    return got


@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_every_format(name):
    check(name, name, (150,), queries=2, capacity=160)


@pytest.mark.parametrize(
    ("keys", "values"), [("fp8", "int4-g16-asymmetric"), ("int8-static", "float"), ("float", "int8-asymmetric")]
)
def test_keys_and_values_of_two_formats_and_widths(keys, values):
    check(keys, values, (70,), width=64, value_width=32, capacity=80)


@pytest.mark.parametrize(("ratio", "queries"), [(1, 1), (8, 1), (1, 16), (8, 3), (3, 5)])
def test_every_ratio_of_heads_and_number_of_queries(ratio, queries):
    check("int8", "int8", (50,), ratio=ratio, queries=queries, batch=1)
    check("int8", "float", (50,), ratio=ratio, queries=queries, width=64, config=Config(64, 4, 2, 1), batch=1)


@pytest.mark.parametrize("lengths", [(0,), (1,), (31,), (33,), (64,), (0, 97), (64, 2)])
@pytest.mark.parametrize("splits", [1, 4])
def test_every_length(lengths, splits):
    got = check("int4", "fp8", lengths, queries=3, capacity=100, splits=splits, width=32)
    for i, length in enumerate(lengths * (2 // len(lengths))):
        unseen = max(0, 3 - length)
        assert not got[i, :, :unseen].any()
        assert got[i, :, unseen:].any(-1).all()


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", ["int8", "int4-g16-asymmetric"])
def test_every_width(name, width):
    check(name, name, (75,), width=width, batch=1, heads=1, capacity=80)


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (40, None), (500, None), (None, 10.0), (33, 3.0)])
def test_windows_and_soft_caps(window, softcap):
    check("int8", "int4-asymmetric", (150, 90), queries=3, window=window, softcap=softcap)


@pytest.mark.parametrize("splits", [1, 2, 7, 20])
def test_shares_of_the_tokens(splits):
    check("int8", "int8", (150,), splits=splits, batch=1)


@pytest.mark.parametrize("size", [1e6, 1e-7])
@pytest.mark.parametrize("name", ["int8", "int4-static"])
def test_queries_beyond_the_range_of_float16(name, size):
    cache = filled_cache(FORMATS[name], 1, 1, 64, 32, (60,))
    q = (torch.randn(1, 2, 1, 32) * size).to(torch.bfloat16)
    scale = 0.2 / size
    want = decode_attention_reference(
        q.float(), *cache.tensors, *cache.tensors, int32(60), cache.dtype, cache.dtype, scale
    )
    side = Side.of("kv", *cache.to(DEVICE).tensors, cache.dtype)
    got = launch(q.to(DEVICE), side, side, int32(60).to(DEVICE), scale, None, None, config=SMALL, splits=2)
    assert (got.cpu().float() - want).abs().max() <= TOLERANCE[torch.bfloat16] * want.abs().max()


def test_bfloat16():
    check("int4-g16-asymmetric", "int8", (90,), dtype=torch.bfloat16)
    check("float", "float", (90,), dtype=torch.bfloat16)


def test_values_that_differ_a_million_times_keep_their_precision():
    """Weights times scales would leave the range of float16."""
    length = 64
    k = filled_cache(FORMATS["int8"], 1, 1, length, 32, (length,))
    v = filled_cache(FORMATS["int8"], 1, 1, length, 32, (0,))
    sizes = torch.full((1, 1, length, 1), 1e-5)
    v.append(torch.randn(1, 1, length, 32) * sizes, int32(0))
    q = torch.randn(1, 1, 1, 32).half()
    want = decode_attention_reference(q.float(), *k.tensors, *v.tensors, int32(length), "int8", "int8", 0.1)
    sides = [Side.of("kv", *side.to(DEVICE).tensors, "int8") for side in (k, v)]
    got = launch(q.to(DEVICE), *sides, int32(length).to(DEVICE), 0.1, None, None, config=SMALL, splits=2)
    # The result itself is a subnormal float16, whose steps are 2^-24.
    assert (got.cpu().float() - want).abs().max() <= 2.0**-24
    assert got.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_a_key_that_is_not_a_number_stays_visible():
    k = filled_cache(FORMATS["fp8"], 1, 1, 40, 32, (0,))
    new = torch.randn(1, 1, 40, 32)
    new[0, 0, 7, 3] = torch.nan
    k.append(new, int32(0))
    v = filled_cache(FORMATS["int8"], 1, 1, 40, 32, (40,))
    q = torch.randn(1, 4, 1, 32, device=DEVICE).half()
    for pair in ((k, v), (v, k)):
        sides = [Side.of("kv", *side.to(DEVICE).tensors, side.dtype) for side in pair]
        got = launch(q, *sides, int32(40).to(DEVICE), 0.1, None, None, config=SMALL, splits=2)
        assert got.isnan().any(-1).all()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_that_is_not_a_number_stays_visible(splits):
    """All its scores are none then, which the maximum of a row leaves out."""
    cache = filled_cache(FORMATS["int8"], 1, 1, 100, 32, (100,))
    side = Side.of("kv", *cache.to(DEVICE).tensors, "int8")
    q = torch.randn(1, 3, 1, 32).half()
    q[0, 1, 0, 5] = torch.nan
    got = launch(q.to(DEVICE), side, side, int32(100).to(DEVICE), 0.1, None, None, config=SMALL, splits=splits)
    assert got.isnan().all(-1).flatten().tolist() == [False, True, False]
    assert not got[:, ::2].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_long_caches_on_a_gpu(name, dtype):
    for width, ratio, queries in ((128, 4, 1), (64, 8, 1), (80, 1, 3), (256, 2, 1), (128, 8, 4)):
        shape = {"width": width, "ratio": ratio, "queries": queries, "capacity": 3000, "dtype": dtype}
        check(name, name, (2500,), **shape, splits=None, config=None)
        check(name, name, (2999, 17), **shape, splits=None, config=None, window=700, softcap=20.0)
