"""What the ONNX target says of schemes before anything is calibrated."""

import re

import pytest

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.spec import Scheme
from qcompiler.target import check_schemes


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
