import json

import pytest
import torch

from qcompiler.errors import RecipeError
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec


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


def activation(dtype, granularity="per_tensor", symmetric=True, dynamic=False):
    return QuantSpec(dtype, granularity, None, symmetric, dynamic=dynamic)


@pytest.mark.parametrize(
    ("name", "weight", "expected"),
    [
        ("w8a8", QuantSpec("int8", "per_channel", None), activation("int8", symmetric=False)),
        ("w8a8-actsym", QuantSpec("int8", "per_channel", None), activation("int8")),
        ("w8a8-dynamic", QuantSpec("int8", "per_channel", None), activation("int8", "per_token", dynamic=True)),
        ("w8a8-dynamic-actasym", QuantSpec("int8", "per_channel", None), activation("int8", "per_token", False, True)),
        ("w8a8-dyntensor", QuantSpec("int8", "per_channel", None), activation("int8", "per_tensor", False, True)),
        ("w8a8-tensor-asym", QuantSpec("int8", "per_tensor", None, False), activation("int8", symmetric=False)),
        ("w4a8-g32-dynamic", QuantSpec("int4", "per_group", 32), activation("int8", "per_token", dynamic=True)),
        ("w4a4", QuantSpec(), activation("int4", "per_token", dynamic=True)),
        ("w4a4-channel-actasym", QuantSpec("int4", "per_channel", None), activation("int4", "per_token", False, True)),
        ("w4a4-dyntensor-actsym", QuantSpec(), activation("int4", dynamic=True)),
        ("w4a4-clip90", QuantSpec(), QuantSpec("int4", "per_token", None, clip=0.9)),
        ("fp8", QuantSpec("float8_e4m3fn", "per_channel", None), activation("float8_e4m3fn")),
        ("fp8-tensor", QuantSpec("float8_e4m3fn", "per_tensor", None), activation("float8_e4m3fn")),
        ("fp8-g128", QuantSpec("float8_e4m3fn", "per_group", 128), activation("float8_e4m3fn")),
        ("fp8-e5m2", QuantSpec("float8_e5m2", "per_channel", None), activation("float8_e5m2")),
        (
            "fp8-dynamic",
            QuantSpec("float8_e4m3fn", "per_channel", None),
            activation("float8_e4m3fn", "per_token", dynamic=True),
        ),
        ("w8a16", QuantSpec("int8", "per_channel", None), None),
    ],
)
def test_names_of_schemes_with_activations(name, weight, expected):
    scheme = Scheme.parse(name)
    assert (scheme.weight, scheme.activation) == (weight, expected)


def test_options_are_those_of_weights():
    scheme = Scheme.parse("w8a8", group_size=64, symmetric=False, scale_dtype="float16")
    assert scheme.weight == QuantSpec("int8", "per_group", 64, False, "float16")
    assert scheme.activation == Scheme.parse("w8a8").activation


@pytest.mark.parametrize(
    "name",
    ["w4a16-dynamic", "w8a16-actsym", "w8a8-e5m2", "fp8-sym", "fp8-asym", "fp8-actasym", "w8a8-dynamic-dyntensor",
     "w8a8-actsym-actasym", "fp8-e5m2-e5m2", "w8a4", "fp8-g64-tensor", "w8a16-lut", "w4a8-lut", "fp8-lut",
     "w3a16-lut-sym", "w3a16-lut-asym", "w3a16-lut-g64", "w3a16-channel-lut"],
)  # fmt: skip
def test_names_with_options_that_have_no_meaning_there(name):
    with pytest.raises(RecipeError):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "name",
    ["", "w4", "w5a16", "w4a5", "w04a16", "W4A16", "w4a16-", "w4a16-g", "w4a16-g0", "w4a16-row", "w4a16-g64-g128",
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
        {"dtype": "float8_e4m3fn", "symmetric": False},
        {"dtype": "float8_e4m3"},
        {"dynamic": True},  # in groups
        {"granularity": "per_channel", "group_size": None, "dynamic": True},
        {"granularity": "per_token"},  # with the default group size
        {"codebook": True},  # in groups
        {"dtype": "int8", "granularity": "per_channel", "group_size": None, "codebook": True},
        {"granularity": "per_channel", "group_size": None, "codebook": True, "symmetric": False},
    ],
)
def test_combinations_that_mean_nothing(fields):
    with pytest.raises(RecipeError):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    "parts",
    [
        {"weight": QuantSpec("int8", "per_token", None)},
        {"weight": QuantSpec("int8", "per_tensor", None, dynamic=True)},
        {"activation": QuantSpec("int4", "per_tensor", None)},
        {"activation": QuantSpec("int8", "per_channel", None)},
        {"activation": QuantSpec("int8", "per_group", 32)},
    ],
)
def test_formats_that_weights_or_activations_cannot_take(parts):
    with pytest.raises(RecipeError):
        Scheme(**parts)


def test_one_scale_per_token_is_dynamic():
    assert QuantSpec("int8", "per_token", None).dynamic
    assert not QuantSpec("int8", "per_tensor", None).dynamic


@pytest.mark.parametrize(("dtype", "largest"), [("float8_e4m3fn", 448), ("float8_e5m2", 57344)])
def test_float_codes(dtype, largest):
    spec = QuantSpec(dtype, "per_tensor", None)
    assert (spec.is_float, spec.bits, spec.quant_min, spec.quant_max) == (True, 8, -largest, largest)
    assert spec.code_dtype == getattr(torch, dtype)
    assert torch.finfo(spec.code_dtype).max == largest
    assert spec.stored_dtype == dtype


def test_stored_dtype():
    assert (QuantSpec("int4").stored_dtype, QuantSpec("int4", symmetric=False).stored_dtype) == ("int4", "uint4")


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


ROUND_TRIPS = ["w8a8", "w8a8-dyntensor", "fp8-dynamic", "fp8-e5m2", "w3a16-lut"]


@pytest.mark.parametrize(
    "scheme",
    [Scheme(), Scheme.parse("w3a16-g48-asym", scale_dtype="float16"), *map(Scheme.parse, ROUND_TRIPS)],
)
def test_json_round_trip(scheme):
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_schemes_written_before_there_were_activations():
    fields = Scheme.parse("w4a16").to_dict()
    del fields["activation"]
    del fields["weight"]["dynamic"], fields["weight"]["codebook"]
    assert Scheme.from_dict(fields) == Scheme.parse("w4a16")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks(bits):
    spec = Scheme.parse(f"w{bits}a16-lut", group_size=64, scale_dtype="float16").weight
    assert spec == QuantSpec(f"int{bits}", "per_channel", None, scale_dtype="float16", codebook=True)
    assert (spec.code_dtype, spec.stored_dtype, spec.bits) == (torch.uint8, f"uint{bits}", bits)
    assert str(spec) == f"int{bits} codebook per_channel"


@pytest.mark.parametrize("end", ["quant_min", "quant_max"])
def test_a_codebook_has_no_grid(end):
    spec = Scheme.parse("w3a16-lut").weight
    with pytest.raises(RecipeError, match="codebook") as caught:
        getattr(spec, end)
    assert "SqueezeLLM" in str(caught.value)


def test_text():
    assert str(QuantSpec()) == "int4 g128 symmetric"
    assert str(QuantSpec("int8", "per_channel", None, False)) == "int8 per_channel asymmetric"
    assert str(Scheme.parse("w8a8-dynamic").activation) == "int8 per_token symmetric dynamic"
    assert str(Scheme.parse("fp8").weight) == "float8_e4m3fn per_channel"
    assert str(Scheme.parse("w8a8")) == "int8 per_channel symmetric, activation int8 per_tensor asymmetric"
    assert (str(Scheme.parse("w4a16")), str(Scheme())) == ("int4 g128 symmetric", "float")


def test_clipped_ranges():
    spec = Scheme.parse("w4a4-clip90").activation
    assert spec is not None
    assert str(spec) == "int4 per_token symmetric dynamic clipped to 0.9"
    assert QuantSpec(**spec.to_dict()) == spec
    assert (spec.narrow_bits(), spec.range_options(64)) == ((4,), (torch.int8, -1, 4, 0.9))
    assert QuantSpec("int8", "per_token", None).range_options(64) == (torch.int8, -1)
    for clip in (0, 1.01):
        with pytest.raises(RecipeError, match="clipped"):
            QuantSpec("int4", "per_token", None, clip=clip)
    with pytest.raises(RecipeError, match="clipped"):
        QuantSpec("int8", "per_tensor", None, clip=0.9)
    for name in ("w4a16-clip90", "w8a8-clip90"):
        with pytest.raises(RecipeError, match="no meaning"):
            Scheme.parse(name)


@pytest.mark.parametrize(
    ("name", "group", "scale_dtype", "exponent"),
    [
        ("nvfp4", 16, "float8_e4m3fn", "floor"),
        ("mxfp4", 32, "float8_e8m0fnu", "floor"),
        ("mxfp4-floor", 32, "float8_e8m0fnu", "floor"),
        ("mxfp4-ceil", 32, "float8_e8m0fnu", "ceil"),
    ],
)
def test_names_of_four_bit_floats(name, group, scale_dtype, exponent):
    both = Scheme.parse(name, group_size=64, scale_dtype="float16")  # the format says both
    weight = QuantSpec("float4_e2m1", "per_group", group, scale_dtype=scale_dtype, exponent=exponent)
    assert both.weight == weight
    assert both.activation == QuantSpec(**{**weight.to_dict(), "dynamic": name != "nvfp4"})
    assert Scheme.parse(name.replace("fp4", "fp4a16")) == Scheme(weight)
    assert Scheme.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    assert (weight.bits, weight.quant_min, weight.quant_max) == (4, -6, 6)
    assert (weight.code_dtype, weight.stored_dtype, weight.is_float) == (torch.uint8, "uint4", True)
    assert weight.scale_torch_dtype(torch.bfloat16) == getattr(torch, scale_dtype)
    assert weight.has_factor is (name == "nvfp4")


@pytest.mark.parametrize(
    "name", ["nvfp4-floor", "nvfp4a16-ceil", "nvfp4a8", "mxfp4a4", "mxfp4-", "fp4", "nvfp4-dynamic", "mxfp4-round"]
)
def test_what_is_no_scheme_of_four_bit_floats(name):
    with pytest.raises(RecipeError):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float4_e2m1"},
        {"dtype": "float4_e2m1", "scale_dtype": "float16"},
        {"dtype": "float4_e2m1", "granularity": "per_channel", "group_size": None, "scale_dtype": "float8_e4m3fn"},
        {"dtype": "float4_e2m1", "scale_dtype": "float8_e4m3fn", "symmetric": False},
        {"scale_dtype": "float8_e4m3fn"},  # of integers
        {"exponent": "round"},
    ],
)
def test_four_bit_floats_that_mean_nothing(fields):
    with pytest.raises(RecipeError):
        QuantSpec(**fields)


@pytest.mark.parametrize(("name", "dynamic"), [("nvfp4a16", True), ("mxfp4a16", False)])
def test_what_is_calibrated_of_four_bit_floats_is_the_factor(name, dynamic):
    weight = Scheme.parse(name).weight
    with pytest.raises(RecipeError, match="the factor of NVFP4"):
        Scheme(None, QuantSpec(**{**weight.to_dict(), "dynamic": dynamic}))


def test_text_of_four_bit_floats():
    assert str(Scheme.parse("nvfp4a16")) == "float4_e2m1 g16 E4M3 scales"
    assert str(Scheme.parse("mxfp4-floor").activation) == "float4_e2m1 g32 E8M0 scales (floor) dynamic"


@pytest.mark.parametrize(("name", "dynamic"), [("fp8-block", False), ("fp8-block-dynamic", True)])
def test_blocks(name, dynamic):
    scheme = Scheme.parse(name, group_size=64)
    assert scheme.weight == QuantSpec("float8_e4m3fn", "per_block", 128)
    assert scheme.activation.dynamic is dynamic
    assert scheme.weight.scale_torch_dtype(torch.bfloat16) == torch.float32
    assert str(scheme.weight) == "float8_e4m3fn 128x128 blocks"
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize("name", ["w4a16-block", "w8a8-block", "fp8-block-g128", "fp8-block-channel"])
def test_names_of_blocks_that_mean_nothing(name):
    with pytest.raises(RecipeError):
        Scheme.parse(name)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "int8", "granularity": "per_block"},
        {"dtype": "float8_e4m3fn", "granularity": "per_block", "group_size": None},
        {"dtype": "float4_e2m1", "granularity": "per_block", "scale_dtype": "float8_e4m3fn"},
        {"dtype": "float8_e4m3fn", "granularity": "per_block", "dynamic": True},
    ],
)
def test_blocks_that_mean_nothing(fields):
    with pytest.raises(RecipeError):
        QuantSpec(**fields)


@pytest.mark.parametrize("name", ["fp8-dyngroup", "w4a8-dyngroup"])
def test_inputs_in_groups(name: str) -> None:
    spec = Scheme.parse(name).activation
    assert spec is not None
    assert (spec.granularity, spec.group_size, spec.symmetric, spec.dynamic) == ("per_group", 128, True, True)
    assert QuantSpec(**spec.to_dict()) == spec
    assert spec.input_place(576) == (-1, 128)
    assert spec.input_place(64) == (-1, 64)
    assert spec.range_options(576) == (spec.code_dtype, -1, 8, 1.0, 128)


@pytest.mark.parametrize(
    "name", ["w4a4-dyngroup", "w8a8-dyngroup-actasym", "w8a8-dyngroup-clip90", "w8a16-dyngroup", "fp8-dynamic-dyngroup"]
)
def test_inputs_in_groups_of_no_meaning(name: str) -> None:
    with pytest.raises(RecipeError):
        Scheme.parse(name)


def test_static_groups_of_inputs_are_refused() -> None:
    with pytest.raises(RecipeError, match="activations share scales otherwise"):
        Scheme(None, QuantSpec("int8", "per_group", 128))
