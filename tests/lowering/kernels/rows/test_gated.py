"""Gated activations as an operator: on the CPU, for tracing, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.rows.gated import ACTIVATIONS

_ours = torch.ops.qcompiler_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_product_rounded_once(activation, dtype):
    gate, up = (4 * torch.randn(2, 3, 5, 40)).to(dtype)
    written_out = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }[activation]
    found = _ours.gated(gate, up, activation)
    assert found.dtype == dtype
    expected = written_out(gate.double()) * up.double()
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_shapes_when_traced():
    given = (torch.randn(3, 8), torch.randn(3, 8), "silu")
    torch.library.opcheck(_ours.gated, given, test_utils=("test_faketensor",))
    assert _ours.gated(torch.empty(0, 8), torch.empty(0, 8), "gelu").shape == (0, 8)


@pytest.mark.parametrize(
    ("gate", "up", "activation", "message"),
    [
        (torch.ones(3), torch.ones(3), "relu", "activation"),
        (torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.int8), "silu", "dtype"),
        (torch.ones(3, 2), torch.ones(3, 1), "silu", "differ"),
        (torch.ones(3), torch.ones(3).half(), "silu", "differ"),
    ],
)
def test_refusals(gate, up, activation, message):
    with pytest.raises(InputError, match=message):
        _ours.gated(gate, up, activation)
