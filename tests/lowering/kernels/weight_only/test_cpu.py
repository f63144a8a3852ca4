"""PyTorch's low-bit operators on the CPU against dequantized weights."""

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.weight_only import cpu as weight_only_cpu
from tests.lowering.kernels.weight_only.weight_only_cases import random_weight, spec_of, worst

BFLOAT16 = torch.bfloat16
ROUNDING = 2.0**-7  # of the result, of the scales and of the operators' own arithmetic, each 2^-9


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_4_bit_operator(bits, group, symmetric, rows):
    out, width = 48, 768
    weight = random_weight(out, width, spec_of(bits, group, symmetric), BFLOAT16)
    x = torch.randn(rows, width).bfloat16()
    layout, packed_group, packed, scale = weight_only_cpu.pack(weight)
    assert layout == "int4pack"
    weight_only_cpu.check(x, packed, scale, None, packed_group, layout)
    found = weight_only_cpu.launch(x, packed, scale, None, packed_group, layout)
    assert found.dtype == BFLOAT16
    assert worst(found, x.float() @ weight.dequantize().T) < ROUNDING


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("out", "width"), [(64, 256), (33, 16), (7, 48)])
def test_8_bit_operator(out, width, rows):
    weight = random_weight(out, width, spec_of(8, None), BFLOAT16)
    x, bias = torch.randn(rows, width).bfloat16(), torch.randn(out).bfloat16()
    layout, group, packed, scale = weight_only_cpu.pack(weight)
    assert layout == "int8pack"
    found = weight_only_cpu.launch(x, packed, scale, bias, group, layout)
    assert worst(found, x.float() @ weight.dequantize().T + bias) < ROUNDING


def test_a_short_last_group_is_split():
    spec = spec_of(4, 128)
    assert weight_only_cpu.obstacle(4, True, 128, 16, 160, BFLOAT16) == ""
    weight = random_weight(16, 160, spec, BFLOAT16)
    layout, group, packed, scale = weight_only_cpu.pack(weight)
    assert (group, scale.shape) == (32, (5, 16, 2))
    x = torch.randn(2, 160).bfloat16()
    found = weight_only_cpu.launch(x, packed, scale, None, group, layout)
    assert worst(found, x.float() @ weight.dequantize().T) < ROUNDING


@pytest.mark.parametrize("layout", ["int4pack", "int8pack"])
def test_no_rows_give_no_rows(layout):
    weight = random_weight(16, 64, spec_of(4 if layout == "int4pack" else 8, None), BFLOAT16)
    name, group, packed, scale = weight_only_cpu.pack(weight)
    assert name == layout
    found = weight_only_cpu.launch(torch.empty(0, 64, dtype=BFLOAT16), packed, scale, None, group, layout)
    assert found.shape == (0, 16)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "out", "width", "dtype", "reason"),
    [
        (4, True, 128, 64, 256, torch.float32, "bfloat16"),
        (4, True, 128, 64, 256, torch.float16, "bfloat16"),
        (4, True, 128, 20, 256, BFLOAT16, "20 output channels"),
        (4, True, 48, 64, 256, BFLOAT16, "groups of 48"),
        (4, True, 128, 64, 100, BFLOAT16, "100 input channels"),
        (8, False, 256, 64, 256, BFLOAT16, "symmetric"),
        (8, True, 128, 64, 256, BFLOAT16, "one scale per output channel"),
        (8, True, 100, 64, 100, BFLOAT16, "100 input channels"),
    ],
)
def test_what_the_operators_do_not_take_is_said(bits, symmetric, group, out, width, dtype, reason):
    assert reason in weight_only_cpu.obstacle(bits, symmetric, group, out, width, dtype)


def test_what_they_take():
    assert weight_only_cpu.obstacle(4, False, 128, 64, 256, BFLOAT16) == ""
    assert weight_only_cpu.obstacle(3, True, 256, 64, 256, BFLOAT16) == ""
    assert weight_only_cpu.obstacle(8, True, 256, 63, 256, BFLOAT16) == ""


@pytest.mark.parametrize("change", ["group", "dtype", "shape", "scale", "layout", "zero"])
def test_tensors_that_would_be_misread_are_refused(change):
    layout, group, packed, scale = weight_only_cpu.pack(random_weight(16, 64, spec_of(4, 32), BFLOAT16))
    x, zero = torch.randn(2, 64).bfloat16(), None
    weight_only_cpu.check(x, packed, scale, zero, group, layout)
    if change == "group":
        group = 64
    elif change == "dtype":
        x = x.float()
    elif change == "shape":
        packed = packed[:, :-1]
    elif change == "scale":
        scale = scale.float()
    elif change == "layout":
        layout = "int5pack"
    else:
        zero = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(InputError):
        weight_only_cpu.check(x, packed, scale, zero, group, layout)
