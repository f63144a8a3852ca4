"""The Triton kernel of gated activations against its reference, interpreted or on a GPU, and its machine code."""

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.rows import triton_gated as module
from qcompiler.lowering.kernels.rows.gated import ACTIVATIONS, gated_reference
from tests.lowering.kernels.launch.ahead_of_time import inspect

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAST_FLOAT = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a step of the dtype, which the interpreter truncates bfloat16 to, and of float32 within its functions.

    The error function is added to one: of a gate that is nearly shut, few digits are left, here as in PyTorch.
    """
    assert (found.dtype, found.shape, found.is_contiguous()) == (expected.dtype, expected.shape, True)
    rtol = max(1e-5, 1.01 * torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found.float(), expected.float(), rtol=rtol, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_one_matrix_and_tensors_of_their_own(activation, dtype):
    for width in (5, 300):
        both = (3 * torch.randn(2, 3, 2 * width)).to(DEVICE, dtype)
        gate, up = both.chunk(2, -1)
        assert_near(module.launch(gate, up, activation), gated_reference(gate, up, activation))
        gate, up = gate.contiguous(), up.contiguous()
        assert_near(module.launch(gate, up, activation), gated_reference(gate, up, activation))


def test_columns_are_copied_and_nothing_is_nothing():
    gate, up = torch.randn(2, 40, 6, device=DEVICE).transpose(1, 2)
    assert_near(module.launch(gate, up, "silu"), gated_reference(gate, up, "silu"))
    assert module.launch(gate[:0], up[:0], "silu").shape == (0, 40)
    assert module.launch(gate[0, 0], up[0, 0], "silu").shape == ()


@PAST_FLOAT
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_that_are_wide_open_or_shut(activation):
    gate = torch.tensor([-1e4, -200.0, -100.0, -30.0, 0.0, 30.0, 100.0, 200.0, 1e4, float("nan")], device=DEVICE)
    up = torch.ones_like(gate)
    assert_near(module.launch(gate, up, activation), gated_reference(gate, up, activation))


def test_large_programs(monkeypatch):
    monkeypatch.setattr(module, "_MANY", 1000)
    gate, up = torch.randn(2, 2, 1100, device=DEVICE).half()
    assert_near(module.launch(gate, up, "gelu"), gated_reference(gate, up, "gelu"))


def compiled(match: str = "") -> list[dict]:
    found = inspect("rows.triton_gated", match)
    assert {entry["name"]: entry["failures"] for entry in found if entry["failures"]} == {}
    return found


@pytest.mark.slow
def test_default_configurations_compile_without_spills():
    found = compiled("default")
    assert {entry["name"] for entry in found} == {f"{name}-256-bf16-default" for name in ACTIVATIONS}
    assert all(entry["opcodes"]["LDG"] == 2 for entry in found)  # eight elements at a time


@pytest.mark.slow
def test_all_configurations_compile_without_spills():
    assert len({entry["name"] for entry in compiled()}) == 18


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(9))
def test_random_shapes_on_a_gpu(seed):
    random = torch.Generator().manual_seed(seed)
    count, width = (int(torch.randint(1, top, (), generator=random)) for top in (300, 15000))
    both = (3 * torch.randn(count, 2 * width, device=DEVICE)).to(DTYPES[seed % 3])
    gate, up = both.chunk(2, -1)
    for activation in ACTIVATIONS:
        expected = gated_reference(gate, up, activation)
        first = torch.ops.qcompiler_kernels.gated(gate, up, activation)
        assert_near(first, expected)
        poison = torch.full_like(first, float("nan"))
        del poison
        assert torch.equal(module.launch(gate, up, activation), first)
