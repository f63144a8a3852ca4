"""The RMS norm as an operator: on the CPU, for tracing, and what it refuses."""

import pytest
import torch

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.rows.rms_norm import rms_norm_reference

_ours = torch.ops.qcompiler_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_canonical_operator(dtype):
    x, weight = torch.randn(2, 3, 40).to(dtype), torch.rand(40)
    found = _ours.rms_norm(x, weight, 1e-5)
    assert torch.equal(found, torch.ops.qcompiler.rms_norm(x, weight, 1e-5))
    assert found.dtype == dtype
    wide = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(found.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_weight_of_few_bits_is_not_multiplied_in_them():
    x, weight = torch.randn(5, 40).bfloat16(), torch.rand(40).bfloat16()
    assert torch.equal(_ours.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight.float(), 1e-5))
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), rms_norm_reference(x, weight.float(), 1e-5))


def test_shapes_when_traced():
    torch.library.opcheck(_ours.rms_norm, (torch.randn(3, 8), torch.rand(8), 1e-6), test_utils=("test_faketensor",))
    assert _ours.rms_norm(torch.empty(0, 8), torch.rand(8), 1e-6).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(3, 8, dtype=torch.int8), torch.ones(8), "no rows"),
        (torch.ones(3, 0), torch.ones(0), "no rows"),
        (torch.ones(()), torch.ones(1), "no rows"),
        (torch.ones(3, 8), torch.ones(4), "weight"),
        (torch.ones(3, 8), torch.ones(8, dtype=torch.int64), "weight"),
    ],
)
def test_refusals(x, weight, message):
    with pytest.raises(InputError, match=message):
        _ours.rms_norm(x, weight, 1e-6)
