"""The Triton RMS norm against its reference, interpreted or on a GPU, and its machine code."""

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.rows import triton_rms_norm as module
from qcompiler.lowering.kernels.rows.rms_norm import rms_norm_reference
from qcompiler.lowering.kernels.rows.triton_quantize_rows import RowConfig
from tests.lowering.kernels.launch.ahead_of_time import inspect

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a step of the dtype: sums are taken in another order, and the interpreter truncates bfloat16."""
    assert (found.dtype, found.shape, found.is_contiguous()) == (expected.dtype, expected.shape, True)
    steps = 8 if found.dtype == torch.float32 else 1.01
    torch.testing.assert_close(found.float(), expected.float(), rtol=steps * torch.finfo(found.dtype).eps, atol=1e-6)


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * torch.logspace(-3, 3, shape[-2])[:, None]).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [None, RowConfig(64, 2)])
def test_rows(dtype, config):
    for shape in ((2, 5, 77), (3, 1), (4, 256)):
        x, weight = rows(dtype, *shape), torch.rand(shape[-1], device=DEVICE) + 0.5
        assert_near(module.launch(x, weight, 1e-6, config=config), rms_norm_reference(x, weight, 1e-6))


def test_rows_that_lie_apart_are_read_where_they_are():
    whole, weight = rows(torch.float16, 6, 100), torch.rand(40, device=DEVICE)
    parts = whole[:, 7:47]
    assert_near(module.launch(parts, weight, 1e-6), rms_norm_reference(parts, weight, 1e-6))
    heads = rows(torch.float32, 6, 120).view(2, 3, 3, 40).transpose(1, 2)
    assert_near(module.launch(heads, weight, 1e-6), rms_norm_reference(heads, weight, 1e-6))
    turned = rows(torch.float32, 40, 6).t()
    assert_near(module.launch(turned, weight, 1e-6), rms_norm_reference(turned, weight, 1e-6))


def test_zeros_and_no_rows():
    weight = torch.rand(40, device=DEVICE)
    assert not module.launch(torch.zeros(3, 40, device=DEVICE), weight, 1e-6).any()
    assert module.launch(torch.zeros(0, 40, device=DEVICE), weight, 1e-6).shape == (0, 40)


@pytest.mark.parametrize("width", [1, 33, 4096, 16384, 16385, 1 << 17])
def test_configurations(width):
    for config in module.configs(width):
        assert config.block >= min(width, 4096)
        assert config.block <= 16384


def compiled(match: str = "", *, capabilities: tuple[int, ...] = (80, 90)) -> list[dict]:
    found = inspect("rows.triton_rms_norm", match, capabilities=capabilities)
    assert {entry["name"]: entry["failures"] for entry in found if entry["failures"]} == {}
    return found


def test_default_configurations_compile_without_spills():
    found = compiled("bf16-default", capabilities=(90,))
    assert {entry["name"] for entry in found} == {"rows-4096-8-bf16-default", "loop-4096-8-bf16-default"}
    assert all(entry["opcodes"]["LDG"] <= 8 for entry in found)  # eight elements at a time


@pytest.mark.slow
def test_all_configurations_compile_without_spills():
    names = {entry["name"].removesuffix("-default") for entry in compiled()}
    for width in (*(1 << power for power in range(5, 15)), 40_000):
        for config in module.configs(width):
            kind = "rows" if width <= config.block else "loop"
            assert f"{kind}-{config.block}-{config.warps}-bf16" in names


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_random_rows_on_a_gpu(seed):
    random = torch.Generator().manual_seed(seed)
    count, width = (int(torch.randint(1, top, (), generator=random)) for top in (600, 40000))
    dtype = DTYPES[seed % 3]
    x, weight = rows(dtype, count, width), torch.rand(width, device=DEVICE)
    expected = rms_norm_reference(x, weight, 1e-5)
    first = torch.ops.qcompiler_kernels.rms_norm(x, weight, 1e-5)
    assert_near(first, expected)
    poison = torch.full_like(x, float("nan"))
    del poison
    assert torch.equal(module.launch(x, weight, 1e-5), first)
