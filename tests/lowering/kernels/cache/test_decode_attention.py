"""Attention over a quantized cache: the reference against the graph's operators, the CPU against the reference."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompiler.errors import InputError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.kernels.cache import decode_attention
from qcompiler.lowering.kernels.cache.decode_attention import Side, choose, decode_attention_reference
from qcompiler.lowering.kernels.launch.device import Device
from tests.lowering.kernels.cache.filled_caches import (
    FORMATS,
    KERNELS,
    filled_cache,
    int32,
)

ops = torch.ops.qcompiler


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_is_what_the_graph_computes(name):
    spec, length = FORMATS[name], 11
    keys, values = (filled_cache(spec, 2, 2, 16, 32, (length,)) for _ in range(2))
    q = torch.randn(2, 4, 3, 32)
    got = decode_attention_reference(
        q, *keys.tensors, *values.tensors, int32(length), keys.dtype, values.dtype, 0.2, 6, 15.0
    )
    floats = []
    for cache in (keys, values):
        codes = cache.codes[:, :, :length]
        codes = ops.unpack_nibbles(codes, spec.symmetric) if spec.is_packed else codes
        cut = slice(None) if spec.scales == "static" else slice(length)
        scale = cache.scale if spec.scales == "static" else cache.scale[:, :, cut].float()
        zero = cache.zero if cache.zero is None or spec.scales == "static" else cache.zero[:, :, cut]
        floats.append(ops.dequantize(codes, scale, zero, *spec.place(32), torch.float32))
    want = ops.attention(q, *floats, None, 0.2, True, 6, 15.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_what_is_recognised_of_a_cache():
    codes = torch.zeros(2, 3, 8, 32, dtype=torch.int8)
    token, grouped = (torch.ones(2, 3, 8, groups, dtype=torch.float16) for groups in (1, 4))
    stored = torch.ones(1, 3, 1, 32)
    assert Side.of("k", codes, token, None, "int8").spec == CacheFormat("int8", "per_token", 32)
    assert Side.of("k", codes, grouped, None, "int8").spec == CacheFormat("int8", "per_token", 8)
    assert Side.of("k", codes, stored, None, "int8").spec == CacheFormat("int8", "static")
    packed = Side.of("k", codes.view(torch.uint8), grouped, torch.zeros_like(grouped, dtype=torch.uint8), "int4")
    assert (packed.spec, packed.width, packed.groups) == (CacheFormat("int4", "per_token", 16, False), 64, 4)
    floats = Side.of("v", codes.to(torch.float16), None, None, "float16")
    assert (floats.spec, floats.width, floats.groups) == (None, 32, 0)
    one = Side.of("v", torch.zeros(1, 3, 8, 32).to(torch.float8_e4m3fn), torch.tensor(0.5), None, "float8_e4m3fn")
    assert (one.spec, one.groups) == (CacheFormat("float8_e4m3fn", "static"), 0)
    for form, scale in (("static", torch.ones(1, 3, 1, 32)), ("per_token", torch.ones(1, 3, 1, 32).half())):
        found = Side.of("k", codes[:1, :, :1], scale, None, "int8").spec  # room for one token
        assert (found.scales, found.symmetric) == (form, True)
    with pytest.raises(InputError, match="does not fit"):
        Side.of("k", codes, torch.ones(32), None, "int8")


def arguments(**change):
    given = {
        "q": torch.randn(2, 6, 1, 32),
        "k_codes": torch.zeros(2, 3, 8, 32, dtype=torch.int8),
        "k_scale": torch.ones(2, 3, 8, 2, dtype=torch.float16),
        "k_zero": None,
        "v_codes": torch.zeros(2, 3, 8, 32, dtype=torch.int8),
        "v_scale": torch.ones(2, 3, 8, 1, dtype=torch.float16),
        "v_zero": None,
        "length": int32(5),
        "k_dtype": "int8",
        "v_dtype": "int8",
        "sm_scale": 0.1,
    }
    return given | change


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"q": torch.randn(2, 6, 32)}, "q"),
        ({"q": torch.ones(2, 6, 1, 32, dtype=torch.int8)}, "q"),
        ({"q": torch.randn(2, 7, 1, 32)}, "q"),
        ({"q": torch.randn(2, 6, 1, 16)}, "q"),
        ({"q": torch.randn(2, 6, 17, 32)}, "q"),
        ({"q": torch.randn(2, 6, 32, 2).transpose(2, 3)}, "q"),
        ({"k_codes": torch.zeros(2, 3, 8, dtype=torch.int8)}, "k_codes"),
        ({"k_codes": torch.zeros(2, 3, 8, 32, dtype=torch.uint8)}, "k_codes"),
        ({"k_scale": None}, "k_scale"),
        ({"k_scale": torch.ones(2, 3, 8, 5, dtype=torch.float16)}, "k_scale"),
        ({"k_scale": torch.ones(2, 3, 8, 2)}, "k_scale"),
        ({"k_scale": torch.ones(1, 3, 1, 16)}, "k_scale"),
        ({"k_zero": torch.zeros(2, 3, 8, 2, dtype=torch.uint8)}, "k_codes"),
        ({"v_codes": torch.zeros(2, 3, 9, 32, dtype=torch.int8), "v_scale": torch.ones(1, 3, 1, 32)}, "v_codes"),
        ({"v_dtype": "float16", "v_codes": torch.zeros(2, 3, 8, 32).half()}, "v_scale"),
        ({"v_dtype": "int5"}, "dtype"),
        ({"length": torch.tensor([5])}, "length"),
        ({"length": int32(5, 5, 5)}, "length"),
        ({"length": int32(9)}, "length"),
        ({"length": int32(5, -1)}, "length"),
        ({"length": torch.zeros(1, dtype=torch.int32, device="meta")}, "length"),
        ({"window": 0}, "window"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, where):
    KERNELS.decode_attention(**arguments())
    with pytest.raises(InputError) as caught:
        decode_attention._decode_attention_cpu(**arguments(**change))
    assert caught.value.where == where


def test_shapes_without_data():
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed = torch.zeros(2, 3, 8, 20, dtype=torch.uint8)
        change = {"v_codes": packed, "v_dtype": "int4", "q": torch.empty(2, 6, 4, 32, dtype=torch.bfloat16)}
        out = KERNELS.decode_attention(**arguments(**change))
    assert (out.shape, out.dtype) == ((2, 6, 4, 40), torch.bfloat16)


def test_what_is_chosen_for_a_device():
    int8, half = CacheFormat("int8"), torch.float16
    hopper = Device("cuda", "", 90, True)
    assert choose(int8, int8, 128, Device("cpu"), torch.float32).implementation == "cpu"
    assert choose(int8, None, 128, hopper, torch.bfloat16).implementation == "triton"
    refused = {
        "float32": choose(int8, int8, 128, hopper, torch.float32),
        "300 channels": choose(int8, int8, 300, hopper, half),
        "5 channels": choose(int8, CacheFormat("int4", group_size=5), 80, hopper, half),
        "Triton": choose(int8, int8, 128, Device("cuda", "", 90, False), half),
        "75": choose(int8, int8, 128, Device("cuda", "", 75, True), half),
        "30 channels": choose(int8, CacheFormat("int4"), 30, hopper, half),
        "groups of 40": choose(CacheFormat("int8", group_size=40), int8, 80, hopper, half),
        "groups of 2": choose(CacheFormat("int4", group_size=2), int8, 80, hopper, half),
        "xpu": choose(int8, int8, 128, Device("xpu"), half),
    }
    for reason, choice in refused.items():
        assert choice.implementation == "reference"
        assert reason in choice.reason


def test_groups_that_split_a_byte_take_the_reference():
    cache = filled_cache(CacheFormat("int4", group_size=5), 1, 2, 8, 30, (6,))
    q = torch.randn(1, 2, 1, 30)
    given = (q, *cache.tensors, *cache.tensors, int32(6), "int4", "int4", 0.3)
    assert torch.equal(KERNELS.decode_attention(*given), decode_attention_reference(*given))


@pytest.mark.parametrize("name", ["int8-static", "int4-asymmetric", "float"])
def test_results_lie_as_tracing_expects_them(name):
    """Queries come transposed; compiled code takes strides from the shape function."""
    cache = filled_cache(FORMATS.get(name), 2, 2, 12, 32, (9,))
    q = torch.randn(2, 3, 4, 32).half().transpose(1, 2)
    given = (q, *cache.tensors, *cache.tensors, int32(9), cache.dtype, cache.dtype, 0.2)
    assert decode_attention_reference(*given).is_contiguous()
    assert decode_attention_reference(q.float(), *given[1:]).is_contiguous()
    torch.library.opcheck(KERNELS.decode_attention.default, given)
