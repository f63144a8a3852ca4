import json

import pytest
import torch

from qcompiler.errors import RecipeError
from qcompiler.spec import QuantSpec, Scheme


@pytest.mark.parametrize(
    ("name", "options", "dtype", "granularity", "group", "symmetric"),
    [
        ("w4a16", {}, "int4", "per_group", 128, True),
        ("w3a16", {}, "int3", "per_group", 128, True),
        ("w2a16-asym", {}, "int2", "per_group", 128, False),
        ("w8a16", {}, "int8", "per_channel", None, True),
        ("w8a16-g64", {}, "int8", "per_group", 64, True),
        ("w4a16-channel", {}, "int4", "per_channel", None, True),
        ("w8a16-tensor-asym", {}, "int8", "per_tensor", None, False),
        ("w4a16", {"group_size": 32}, "int4", "per_group", 32, True),
        ("w4a16", {"group_size": -1}, "int4", "per_channel", None, True),
        ("w4a16-g64", {"group_size": 32}, "int4", "per_group", 64, True),  # the name decides
        ("w4a16-sym", {"symmetric": False}, "int4", "per_group", 128, True),
        ("w4a16", {"symmetric": False}, "int4", "per_group", 128, False),
    ],
)
def test_scheme_names(name, options, dtype, granularity, group, symmetric):
    assert Scheme.parse(name, **options).weight == QuantSpec(dtype, granularity, group, symmetric)


@pytest.mark.parametrize(
    "name",
    ["", "w4", "w5a16", "w4a4", "w04a16", "W4A16", "w4a16-", "w4a16-g", "w4a16-g0", "w4a16-row", "w4a16-g64-g128",
     "w4a16-g64-channel", "w4a16-sym-asym", " w4a16", 4],
)  # fmt: skip
def test_what_is_no_scheme(name):
    with pytest.raises(RecipeError):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int5"},
        {"granularity": "per_row"},
        {"granularity": "per_channel"},  # with the default group size
        {"group_size": None},
        {"group_size": 0},
        {"group_size": -1},
        {"scale_dtype": "float64"},
    ],
)
def test_combinations_that_mean_nothing(fields):
    with pytest.raises(RecipeError):
        QuantSpec(**fields)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_code_range(bits):
    signed, unsigned = QuantSpec(f"int{bits}"), QuantSpec(f"int{bits}", symmetric=False)
    assert (signed.quant_min, signed.quant_max) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert (unsigned.quant_min, unsigned.quant_max) == (0, 2**bits - 1)
    assert signed.bits == bits
    assert (signed.code_dtype, unsigned.code_dtype) == (torch.int8, torch.uint8)


def test_group_never_exceeds_the_width():
    assert QuantSpec().group_of(300) == 128
    assert QuantSpec().group_of(96) == 96
    assert QuantSpec("int8", "per_channel", None).group_of(96) == 96


def test_scales_take_the_weight_s_dtype_where_that_can_hold_scales():
    assert QuantSpec().scale_torch_dtype(torch.bfloat16) == torch.bfloat16
    assert QuantSpec().scale_torch_dtype(torch.float64) == torch.float32
    assert QuantSpec().scale_torch_dtype(torch.float8_e4m3fn) == torch.float32
    assert QuantSpec(scale_dtype="float16").scale_torch_dtype(torch.bfloat16) == torch.float16


@pytest.mark.parametrize("scheme", [Scheme(), Scheme.parse("w3a16-g48-asym", scale_dtype="float16")])
def test_json_round_trip(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_text():
    assert str(QuantSpec()) == "int4 g128 symmetric"
    assert str(QuantSpec("int8", "per_channel", None, False)) == "int8 per_channel asymmetric"
