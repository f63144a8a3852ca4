"""Which module a linear layer becomes, and rotations at run time."""

import pytest
import torch

from qcompiler import numerics
from qcompiler.ir.qtensor import Affine, Codebook
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear
from qcompiler.lowering.kernels.module.forms import Rounding
from qcompiler.lowering.kernels.module.site_modules import Hadamard, make_site_module
from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def affine(spec: QuantSpec, rows: int = 32, columns: int = 64) -> Affine:
    weight = torch.randn(rows, columns)
    scale, zero = numerics.min_max_qparams(weight, spec, torch.float32)
    return Affine(numerics.quantize(weight, scale, zero, spec), scale, zero, spec, torch.float32)


def rounded(scheme: str) -> Rounding:
    spec = Scheme.parse(scheme).activation
    assert spec is not None
    node = torch.fx.Graph().placeholder("x")
    return Rounding(node, node, node, None, None, spec)


def weight_of(scheme: str) -> Affine:
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    return affine(spec)


@pytest.mark.parametrize(
    ("scheme", "activation", "dtype", "kind", "implementation"),
    [
        ("w4a16-g32", None, BF16, WeightOnlyLinear, "cpu"),
        ("w4a16-g32", None, torch.float32, None, "reference"),
        ("w4a16-g5", None, BF16, None, "reference"),
        ("w8a8-dynamic", "w8a8-dynamic", BF16, ScaledLinear, "cpu"),
        ("w8a8-dynamic", "w8a8-dynamic", torch.float32, ScaledLinear, "cpu"),
        ("fp8", "fp8", BF16, ScaledLinear, "reference"),  # exact in bfloat16: codes are what it takes
        ("w4a8-g32", "w8a8-dynamic", BF16, WeightOnlyLinear, "cpu"),
        ("w4a8-g32", "w8a8-dynamic", torch.float32, None, "reference"),
        ("w8a16", "fp8", BF16, WeightOnlyLinear, "cpu"),
    ],
)
def test_layers(scheme, activation, dtype, kind, implementation):
    rounding = None if activation is None else rounded(activation)
    made = make_site_module(weight_of(scheme), torch.randn(32), rounding, device=CPU, dtype=dtype)
    assert type(made.module) is (type(None) if kind is None else kind)
    assert made.choice.implementation == implementation
    assert made.takes_codes is (kind is ScaledLinear)
    assert made.choice.reason or implementation == "cpu"


def test_weights_without_a_form_and_codebooks():
    assert make_site_module(None, None, None, device=CPU, dtype=BF16).module is None
    spec = QuantSpec("int3", "per_channel", None, codebook=True)
    weight = Codebook(torch.randint(8, (32, 64), dtype=torch.uint8), torch.randn(32, 8), None, spec)
    assert isinstance(make_site_module(weight, None, None, device=CPU, dtype=BF16).module, CodebookLinear)


@pytest.mark.parametrize("block", [1, 2, 12, 28, 64, 256])
def test_rotations_equal_the_operator(block):
    x = torch.randn(3, 5, 2 * block)
    assert torch.equal(Hadamard(block, CPU)(x), torch.ops.qcompiler.hadamard(x, block))
