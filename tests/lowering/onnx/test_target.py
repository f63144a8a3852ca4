"""What the ONNX target says of schemes before anything is calibrated."""

import re

import pytest

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.numerics.scheme import Scheme
from qcompiler.protocol.target import check_schemes


@pytest.mark.parametrize(
    ("name", "width", "status", "reason"),
    [
        ("w4a16-g128", 4096, "fused", ""),
        ("w4a16-g16-asym", 4096, "fused", ""),
        ("w4a16-channel", 4096, "fused", ""),
        ("w8a16", 4096, "fused", ""),
        ("w3a16-g64", 4096, "fused", "3-bit codes are stored in 4 bits"),
        ("w2a16-g64", 4096, "fused", "2-bit codes are stored in 4 bits"),
        ("w4a16-g48", 4096, "runs", "groups of 48"),
        ("w4a16-g8", 4096, "runs", "groups of 8"),
        ("w3a16-g24", 4096, "runs", "groups of 24: .* 3-bit codes"),
        ("w4a16-g100", 64, "fused", ""),  # one group per channel
        ("w4a16-g1", 4096, "refused", "one scale per weight"),
    ],
)
def test_support(name, width, status, reason):
    support = OnnxTarget().supports(Scheme.parse(name), width)
    assert support.status == status
    assert re.search(reason, support.reason) if reason else support.reason == ""


@pytest.mark.parametrize(
    ("name", "width", "status", "reason"),
    [
        ("w8a8", 4096, "fused", ""),
        ("w8a8-tensor-asym", 4096, "fused", ""),
        ("w8a8-actsym", 4096, "fused", ""),
        ("w8a8-dyntensor", 4096, "fused", ""),
        ("w8a8-g64", 64, "fused", ""),  # one group per channel
        ("w8a8-dynamic", 4096, "runs", "one scale per token"),
        ("w8a8-g64-dynamic", 4096, "runs", "one scale per token"),
        ("w8a8-g64", 4096, "refused", "int8 weights in groups"),
        ("w8a8-dynamic-actasym", 4096, "refused", "zero points per token"),
        ("w4a8-dynamic-actasym", 4096, "runs", "one scale per token"),
        ("w4a8", 4096, "runs", "int4 weights with int8 activations"),
        ("w3a8", 4096, "runs", "3-bit codes are stored in 4 bits"),
        ("w4a8-g1", 4096, "refused", "one scale per weight"),
        ("fp8", 4096, "runs", "float8_e4m3fn: no such product"),
        ("fp8-e5m2", 4096, "runs", "float8_e5m2: no such product"),
        ("fp8-dynamic", 4096, "runs", "float8_e4m3fn"),
        ("fp8-block", 4096, "runs", "float8_e4m3fn"),
        ("fp8-block-dyngroup", 4096, "runs", "one scale per token and group"),
        ("w8a8-dyngroup", 576, "refused", "groups of 128, which do not divide 576"),
    ],
)
def test_support_of_rounded_activations(name, width, status, reason):
    support = OnnxTarget().supports(Scheme.parse(name), width)
    assert support.status == status
    assert re.search(reason, support.reason) if reason else support.reason == ""


def test_parts_of_schemes():
    fp8, w8a8 = Scheme.parse("fp8"), Scheme.parse("w8a8")
    assert "dequantized anew" in OnnxTarget().supports(Scheme(fp8.weight), 4096).reason
    assert "float8_e4m3fn and int8" in OnnxTarget().supports(Scheme(fp8.weight, w8a8.activation), 4096).reason
    assert "float weights" in OnnxTarget().supports(Scheme(None, w8a8.activation), 4096).reason


def test_integer_products_are_float32():
    support = OnnxTarget(float_dtype="float16").supports(Scheme.parse("w8a8"), 4096)
    assert (support.status, "float16" in support.reason) == ("runs", True)


def test_two_bits_have_a_type_of_their_own_from_opset_25_on():
    assert OnnxTarget(25).supports(Scheme.parse("w2a16-g64"), 4096).reason == ""


def test_a_site_left_in_float():
    assert OnnxTarget().supports(Scheme(), 4096).status == "fused"


def test_a_group_size_that_is_refused_is_an_error_before_calibration():
    schemes = {"a": Scheme.parse("w4a16"), "b": Scheme.parse("w4a16-g1")}
    with pytest.raises(TargetError, match="does not take") as caught:
        check_schemes(schemes, {"a": 256, "b": 256}, [OnnxTarget()])
    assert caught.value.where == "onnx: b"


@pytest.mark.parametrize("opset", [20, 26])
def test_opsets_that_cannot_be_written(opset):
    with pytest.raises(TargetError, match="operator set"):
        OnnxTarget(opset)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"])
def test_four_bit_floats_are_refused(name):
    support = OnnxTarget().supports(Scheme.parse(name), 4096)
    assert support.status == "refused"
    assert "4-bit floats: ONNX Runtime has no kernel" in support.reason
    activation_only = Scheme(None, Scheme.parse("nvfp4").activation)
    assert OnnxTarget().supports(activation_only, 4096).status == "refused"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4a16", "w8a8-g64", "w8a8-dynamic-actasym", "w4a16-g1"])
def test_what_is_refused_has_a_remedy_that_helps(name):
    """Some scheme that the remedy names is taken."""
    support = OnnxTarget().supports(Scheme.parse(name), 256)
    assert support.status == "refused"
    named = re.findall(r"w\d+a\d+", support.remedy)
    options = re.findall(r"-[a-z]+", support.remedy.replace("4-bit", "")) or ["-g16"]
    base = name.partition("-")[0]
    tried = named or [f"{base}{option}" for option in options]
    assert tried
    for scheme in tried:
        assert OnnxTarget().supports(Scheme.parse(scheme), 256).status != "refused", scheme
