"""The Triton quantizers against their references, interpreted or on a GPU, and their machine code."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.rows import quantize_rows as plain
from qcompiler.lowering.kernels.rows import triton_quantize_rows as module
from tests.lowering.kernels.launch.as_launched import as_launched, flaws

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
PAST_FLOAT = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with
MODULE = "qcompiler.lowering.kernels.rows.triton_quantize_rows"


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of very different size, one of them zeros."""
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 1, :] = 0
    return x.to(DEVICE, dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many codes apart two tensors of codes are; 8-bit floats lie in order by their bytes, sign aside."""
    return (a.view(torch.int8).int() - b.view(torch.int8).int()).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", CODES)
def test_rows(dtype, codes):
    for shape in ((2, 5, 77), (3, 1), (4, 256)):
        x = rows(dtype, *shape)
        got, scale, zero = module.launch(x, codes)
        expected, expected_scale = plain.quantize_rows_reference(x, codes)
        assert zero is None
        assert same(scale, expected_scale)
        assert same(got, expected)


@pytest.mark.parametrize(("clip", "bits"), [(0.8, 8), (0.9, 4)])
def test_clip_and_bits(clip, bits):
    x = rows(torch.float32, 6, 40)
    got, scale, _ = module.launch(x, torch.int8, clip=clip, bits=bits)
    expected, expected_scale = plain.quantize_rows_reference(x, torch.int8, clip, bits)
    assert same(scale, expected_scale)
    assert same(got, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_rows(bits):
    x = rows(torch.float16, 6, 40) + 0.3
    for mine, reference in zip(
        module.launch(x, torch.uint8, bits=bits), plain.quantize_rows_affine_reference(x, 1.0, bits), strict=True
    ):
        assert same(mine, reference)


@pytest.mark.parametrize("codes", CODES)
def test_rows_longer_than_a_block(codes):
    x = rows(torch.float16, 3, 300)
    config = module.RowConfig(128, 4)
    got, scale, _ = module.launch(x, codes, config=config)
    expected, expected_scale = plain.quantize_rows_reference(x, codes)
    assert same(scale, expected_scale)
    assert same(got, expected)
    for mine, reference in zip(
        module.launch(x, torch.uint8, config=config), plain.quantize_rows_affine_reference(x), strict=True
    ):
        assert same(mine, reference)


@PAST_FLOAT
def test_every_bfloat16_to_every_code():
    """Ties, subnormal numbers, both signs, numbers too large and infinity."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    x = x[~x.isnan()]
    one = torch.ones((), device=DEVICE)
    for codes in CODES:
        assert same(module.launch_static(x, one, None, codes), plain.quantize_static_reference(x, one, codes))
    thirds = torch.tensor(1 / 3, device=DEVICE)
    for codes in CODES:
        assert same(module.launch_static(x, thirds, None, codes), plain.quantize_static_reference(x, thirds, codes))


@PAST_FLOAT
def test_nan_stays():
    x = torch.tensor([1.0, float("nan")], device=DEVICE)
    for codes in CODES[1:]:
        got = module.launch_static(x, torch.ones((), device=DEVICE), None, codes)
        assert got.float().isnan().tolist() == [False, True]
    x = torch.randn(3, 16, device=DEVICE)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for config in (None, module.RowConfig(8, 1)):
        for codes in (*CODES, torch.uint8):
            _, scale, _ = module.launch(x, codes, config=config)
            assert scale[:, 0].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("zero", [None, (97, torch.uint8), (-31, torch.int8)])
def test_static(zero):
    x, scale = rows(torch.float16, 5, 333), torch.tensor(0.37, device=DEVICE)
    dtype = torch.int8 if zero is None else zero[1]
    zero_point = None if zero is None else torch.tensor(*zero[:1], dtype=zero[1], device=DEVICE)
    got = module.launch_static(x, scale, zero_point, dtype)
    assert same(got, plain.quantize_static_reference(x, scale, dtype, zero_point))


@pytest.mark.parametrize("config", [None, module.RowConfig(64, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_and_quantize(config, dtype):
    """A sum in another order may tip a value to the next code, as may bfloat16, which the interpreter truncates."""
    x, weight = rows(dtype, 7, 150), (torch.rand(150) + 0.5).to(DEVICE, dtype)
    allowed = 0.02 if dtype != torch.bfloat16 or DEVICE.type == "cuda" else 0.3
    for codes in CODES:
        got, scale, _ = module.launch(x, codes, norm=(weight, 1e-6), config=config)
        expected, expected_scale = plain.rms_norm_quantize_rows_reference(x, weight, 1e-6, codes)
        assert torch.allclose(scale, expected_scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
        apart = steps(got, expected)
        assert apart.max() <= 1
        assert apart.float().mean() <= allowed
    static = torch.tensor(0.03, device=DEVICE)
    got = module.launch_static(x, static, None, torch.int8, norm=(weight, 1e-6), config=config)
    apart = steps(got, plain.rms_norm_quantize_static_reference(x, weight, 1e-6, static, torch.int8))
    assert apart.max() <= 1
    assert apart.float().mean() <= allowed


def test_no_rows_and_views():
    codes, scale, _ = module.launch(torch.empty(0, 16, device=DEVICE), torch.int8)
    assert (codes.shape, scale.shape) == ((0, 16), (0, 1))
    assert module.launch_static(
        torch.empty(0, 16, device=DEVICE), torch.ones((), device=DEVICE), None, torch.int8
    ).shape == (0, 16)
    x = rows(torch.float32, 8, 5).t()
    assert same(module.launch(x, torch.int8)[0], plain.quantize_rows_reference(x, torch.int8)[0])


@pytest.mark.parametrize("width", [1, 31, 33, 4096, 5000, 32768, 32769, 1 << 20])
def test_configurations(width):
    found = module.configs(width)
    assert found[0] == module.default_config(width)
    for config in found:
        assert config.block & (config.block - 1) == 0
        assert config.block >= min(width, 4096)
        assert 1 <= config.warps <= 16


def machine_code(*options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qcompiler.lowering.kernels.launch.machine_code", MODULE, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_machine_code(found: list[dict]) -> None:
    assert {entry["name"]: entry["failures"] for entry in found if entry["failures"]} == {}
    names = {entry["name"] for entry in found}
    assert {"elements-default-e4m3", "rows-default-4096-8-e4m3-bf16-norm", "loop-default-4096-8-int8-fp16"} <= names


@pytest.mark.slow
def test_default_configurations_compile_without_spills():
    check_machine_code(machine_code("--match", "default", "--capability", "90"))


@pytest.mark.slow
def test_all_configurations_compile_without_spills():
    found = machine_code()
    check_machine_code(found)
    names = " ".join(entry["name"] for entry in found)
    for width in (*(1 << power for power in range(5, 16)), 40000):
        for config in module.configs(width):
            kind = "rows" if width <= config.block else "loop"
            assert any(f"{kind}{middle}-{config.block}-{config.warps}-" in names for middle in ("", "-default"))


def launches(capability: int, widths: tuple[int, ...] = (1, 4096)) -> None:
    """What `as_launched` compiles: the weight of a norm is float32, whatever the values are."""
    for width in widths:
        x, weight = torch.zeros(1, width, dtype=torch.bfloat16), torch.zeros(width)
        one = torch.ones(())
        for codes in (torch.int8, torch.float8_e4m3fn):
            for config in module.configs(width) if len(widths) > 2 else (None,):
                module.launch(x, codes, config=config)
                module.launch(x, codes, norm=(weight, 1e-6), config=config)
                module.launch(x, torch.uint8, config=config)
            module.launch_static(x, one, None, codes, norm=(weight, 1e-6))
            module.launch_static(x, one, None, codes)
        module.launch_static(x, one, torch.zeros((), dtype=torch.int8), torch.int8, norm=(weight, 1e-6))


def many_launches(capability: int) -> None:
    launches(capability, (64, 2048, 3584, 5120, 8192, 11008, 14336, 18944, 32768, 40000))


def test_launches_of_a_single_row_compile():
    found = as_launched("rows.test_triton_quantize_rows")
    assert flaws(found) == []
    assert [1] in [one["integers"] for one in found]
    assert not any(one["fused"] for one in found)  # products are rounded before they are added, as the reference's are


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_launches_of_many_widths_compile(capability):
    assert flaws(as_launched("rows.test_triton_quantize_rows", "many_launches", capability), capability) == []


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_random_rows_on_a_gpu(seed):
    """Both kernels on random shapes; results are the same when the memory they go to held something else before."""
    random = torch.Generator().manual_seed(seed)
    count, width = (int(torch.randint(1, top, (), generator=random)) for top in (600, 40000))
    dtype = (torch.float16, torch.bfloat16)[seed % 2]
    x, weight = rows(dtype, count + 1, width), torch.rand(width, device=DEVICE).to(dtype)
    for codes in CODES:
        first = module.launch(x, codes)
        expected, scale = plain.quantize_rows_reference(x, codes)
        assert same(first[1], scale)
        assert same(first[0], expected)
        poison = torch.full(x.shape, 0x55, dtype=torch.uint8, device=DEVICE)
        del poison
        assert same(module.launch(x, codes)[0], expected)
        got, _, _ = module.launch(x, codes, norm=(weight, 1e-5))
        apart = steps(got, plain.rms_norm_quantize_rows_reference(x, weight, 1e-5, codes)[0])
        assert apart.max() <= 1
        assert apart.float().mean() < 0.02
