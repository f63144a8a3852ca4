"""Weight-only kernels: interpreted against the reference, compiled for GPUs that are not here, and on one that is."""

import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.errors import InputError
from qcompiler.lowering.kernels.weight_only import triton_launch as weight_only_triton
from qcompiler.lowering.kernels.weight_only.config import (
    Config,
    configs,
    default_config,
    fits,
    shapes_for,
)
from qcompiler.lowering.kernels.weight_only.layout import Layout
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear, pack_tiles, weight_only_linear_reference
from qcompiler.lowering.kernels.weight_only.triton_launch import dequantize, launch
from tests.lowering.kernels.launch.ahead_of_time import inspect
from tests.lowering.kernels.launch.as_launched import as_launched, flaws
from tests.lowering.kernels.weight_only.weight_only_cases import random_weight, spec_of, worst

ROOT = Path(__file__).resolve().parents[4]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
# Of the result in float16 and bfloat16, and of scaled weights. Interpreted, bfloat16 is rounded towards zero.
ROUNDING = {FLOAT16: 2.0**-10, BFLOAT16: 2.0**-6}

DEEP = Config(8, 32, depth=2, warps=2)
DEEP_SPLIT = Config(4, 32, split=2, depth=4)
SWAPPED = Config(8, 64, split=2, swap=True, warps=2)
PLAIN = Config(16, 64)
SCALED = Config(16, 64, split=2, prescale=True)


def check(bits, group, symmetric, dtype, config, *, rows=3, out=72, width=416, bias=True, scale_dtype=torch.float32):
    """One launch against the reference."""
    weight = random_weight(out, width, spec_of(bits, group, symmetric), scale_dtype)
    packed, scale, zero = (None if t is None else t.to(DEVICE) for t in pack_tiles(weight))
    x = torch.randn(rows, width).to(DEVICE, dtype)
    added = torch.randn(out).to(DEVICE, dtype) if bias else None
    arguments = (x, packed, scale, zero, added, bits, group or width)
    found = launch(*arguments, config)
    assert found.dtype == dtype
    assert found.shape == (rows, out)
    assert worst(found, weight_only_linear_reference(*arguments)) < ROUNDING[dtype]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_formats(bits, group, symmetric):
    """The last tile is not whole, and neither is the last block of output channels or the last piece."""
    check(bits, group, symmetric, FLOAT16, DEEP)
    check(bits, group, symmetric, FLOAT16, SWAPPED)


@pytest.mark.parametrize("config", [PLAIN, SCALED, SWAPPED, DEEP_SPLIT], ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 96), (8, None), (2, 128)])
def test_variants(bits, group, config):
    check(bits, group, False, BFLOAT16, config)
    check(bits, group, True, BFLOAT16, config, rows=17, width=256, bias=False)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, FLOAT16, BFLOAT16])
def test_scales_of_any_dtype(scale_dtype, dtype):
    for config in (DEEP, SCALED):
        check(4, 32, True, dtype, config, width=128, scale_dtype=scale_dtype)


@pytest.mark.parametrize(
    ("rows", "out", "width", "group"),
    [(1, 1, 32, None), (2, 3, 40, None), (5, 64, 100, None), (1, 16, 8, None), (3, 17, 160, 128), (2, 65, 128, 96)],
)
def test_odd_shapes(rows, out, width, group):
    for config in (DEEP_SPLIT, SCALED):
        check(4, group, False, FLOAT16, config, rows=rows, out=out, width=width)


def test_more_pieces_than_tiles():
    check(4, 64, True, FLOAT16, Config(16, 64, split=16), width=256)
    check(4, 64, True, FLOAT16, Config(4, 32, split=16, depth=8, warps=8), width=256)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized(bits):
    for group, symmetric, dtype in (
        (32, False, FLOAT16),
        (None, True, BFLOAT16),
        (128, True, FLOAT16),
        (None, False, FLOAT16),
    ):
        weight = random_weight(70, 416, spec_of(bits, group, symmetric))
        packed, scale, zero = (None if t is None else t.to(DEVICE) for t in pack_tiles(weight))
        found = dequantize(packed, scale, zero, bits, group or 416, 416, dtype)
        assert found.dtype == dtype
        error = (found.float().cpu() - weight.dequantize()).abs() / weight.dequantize().abs().clamp(min=1e-6)
        assert error.max() <= torch.finfo(dtype).eps
    check(bits, 64, False, FLOAT16, Config(0), rows=9)


@pytest.mark.parametrize("rows", [1, 12])
def test_what_is_launched_without_being_told(rows):
    check(4, 128, True, BFLOAT16, None, rows=rows, width=512)


def test_no_rows_give_no_rows():
    check_empty = launch(*operands(torch.empty(0, 256, dtype=FLOAT16, device=DEVICE)), 4, 64)
    assert check_empty.shape == (0, 32)


def operands(x):
    packed, scale, zero = (t.to(DEVICE) for t in pack_tiles(random_weight(32, 256, spec_of(4, 64, False))))
    return x, packed, scale, zero, None


@pytest.mark.parametrize("config", [DEEP_SPLIT, SWAPPED, Config(0)], ids=str)
def test_activations_and_biases_that_are_parts_of_other_tensors(config):
    """Activations at an odd address, biases that are strided or one number: copied, not read as if they were whole."""
    x, packed, scale, zero, _ = operands(torch.randn(3, 256).to(DEVICE, FLOAT16))
    bias = torch.randn(32).to(DEVICE, FLOAT16)
    shifted = torch.cat([bias[:1], x.reshape(-1)])[1:].view(3, 256)
    assert shifted.data_ptr() % 16
    strided = torch.stack([bias, torch.full_like(bias, torch.nan)], -1)[:, 0]
    expected = launch(x, packed, scale, zero, bias, 4, 64, config)
    assert torch.equal(launch(shifted, packed, scale, zero, strided, 4, 64, config), expected)
    expected = launch(x, packed, scale, zero, bias[:1].repeat(32), 4, 64, config)
    one = torch.cat([bias[:1], torch.full_like(bias, torch.nan)])[:1].expand(32)
    assert torch.equal(launch(x, packed, scale, zero, one, 4, 64, config), expected)


@pytest.mark.parametrize("position", range(1, 4))
def test_weights_that_are_misaligned_are_refused(position):
    given = list(operands(torch.randn(2, 256).to(DEVICE, FLOAT16)))
    shifted = torch.empty(given[position].numel() + 1, dtype=given[position].dtype, device=DEVICE)[1:]
    given[position] = shifted.view(given[position].shape)
    with pytest.raises(InputError, match="misaligned"):
        launch(*given, 4, 64)


def test_results_do_not_depend_on_what_memory_held(monkeypatch):
    """Partial sums, output and unused rows of blocks: nothing is read before it is written."""
    given = operands(torch.randn(3, 256).to(DEVICE, FLOAT16))
    expected = {config: launch(*given, 4, 64, config) for config in (DEEP_SPLIT, SWAPPED)}
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real(*size, **options).fill_(float("nan")))
    for config, result in expected.items():
        assert torch.equal(launch(*given, 4, 64, config), result)


def compiled(match: str, *capabilities: int) -> dict[str, list[str]]:
    """Names of the cases that were compiled ahead of time, each with what is wrong with it."""
    found = inspect("weight_only.triton_launch", match, capabilities=capabilities)
    return {f"{one['name']} on {one['capability']}": one["failures"] for one in found}


def expected_cases(kind: str, *capabilities: int) -> int:
    cases = [case for case in weight_only_triton.ahead_of_time() if case.name.startswith(kind)]
    return sum(len(case.mma.keys() & set(capabilities)) for case in cases)


def test_usual_cases_compile_within_their_budgets():
    found = compiled("usual", 90)
    assert len(found) == expected_cases("usual", 90) > 15
    assert {name: failures for name, failures in found.items() if failures} == {}


@pytest.mark.slow
def test_usual_cases_compile_for_an_older_device():
    found = compiled("usual", 80)
    assert len(found) == expected_cases("usual", 80) > 15
    assert {name: failures for name, failures in found.items() if failures} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_cases_compile_within_their_budgets():
    found = compiled("other", 80, 90)
    assert len(found) == expected_cases("other", 80, 90) > 250
    assert {name: failures for name, failures in found.items() if failures} == {}


def test_every_configuration_that_can_be_launched_is_compiled():
    names = [case.name for case in weight_only_triton.ahead_of_time()]
    assert len(set(names)) == len(names)
    for capability in (80, 90):
        for bits in (2, 3, 4, 8):
            for config in shapes_for(capability):
                mark = f" {weight_only_triton._config_name(config)} sm_{capability}"
                found = [name for name in names if name.endswith(mark) and f" w{bits} " in name]
                assert len(found) >= 24 or not fits(config, Layout.of(bits, 4096, 4096), capability)


Form = tuple[int, int | None, bool, bool, torch.dtype]  # bits, group, symmetric, biased, dtype
FORMS: tuple[Form, ...] = (
    (4, 128, True, True, BFLOAT16),
    (4, 128, False, False, FLOAT16),
    (8, None, True, False, FLOAT16),
    (3, None, False, True, BFLOAT16),
    (2, 128, False, True, FLOAT16),
)
# rows, output channels, input channels, which of FORMS. A single row, channel or input; sizes that no tile divides.
FEW_LAUNCHES = (
    (1, 1024, 4096, 0),
    (3, 1, 416, 3),
    (16, 1000, 1040, 1),
    (64, 512, 1000, 2),
    (128, 70, 4096, 0),
    (256, 72, 416, 4),
    (2048, 50, 1, 1),
)


def launches(capability: int, cases: tuple[tuple[int, int, int, int], ...] = FEW_LAUNCHES) -> None:
    """What `as_launched` compiles."""
    for rows, out, width, form in cases:
        launch_zeros(capability, rows, out, width, FORMS[form])


def many_launches(capability: int) -> None:
    """Every number of rows with every format; of the shapes, each with some."""
    shapes = ((1024, 4096), (1, 416), (1000, 1000), (4099, 1), (70, 1040))
    forms = itertools.product((2, 3, 4, 8), (128, None), (True, False), (True, False), (FLOAT16, BFLOAT16))
    for i, form in enumerate(forms):
        for j, rows in enumerate((1, 3, 16, 64, 128, 256, 2048)):
            launch_zeros(capability, rows, *shapes[(i + j) % len(shapes)], form)


def launch_zeros(capability: int, rows: int, out: int, width: int, form: Form) -> None:
    bits, group, symmetric, biased, dtype = form
    group = group or width
    layout = Layout.of(bits, group, width)
    packed = torch.zeros(layout.tiles(width), out, layout.tile_bytes, dtype=torch.uint8)
    scale = torch.zeros(-(-width // group), out, dtype=torch.float32 if biased else dtype)
    bias = torch.zeros(out, dtype=dtype) if biased else None
    zero = None if symmetric else torch.zeros(scale.shape, dtype=torch.uint8)
    config = default_config(rows, out, width, bits, capability=capability)
    launch(torch.zeros(rows, width, dtype=dtype), packed, scale, zero, bias, bits, group, config)


def test_launches_compile():
    found = as_launched("weight_only.test_triton_launch")
    assert flaws(found) == []
    assert {"multiply", "multiply_few", "reduce", "dequantize"} == {one["kernel"] for one in found}
    assert any(one["kernel"] == "multiply_few" and one["integers"][0] == 1 for one in found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_launches_of_many_shapes_compile(capability):
    assert flaws(as_launched("weight_only.test_triton_launch", "many_launches", capability), capability) == []


# ---- on a GPU


def graph_equal(first, second) -> bool:
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_shapes_on_a_gpu(bits, dtype):
    generator = torch.Generator().manual_seed(bits)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for _ in range(40):
        group = draw(32, 64, 96, 128, 256, None)
        rows, out, width = draw(1, 2, 5, 16, 17, 64, 130, 400), draw(8, 72, 200, 1024, 4097), draw(64, 416, 1024, 4096)
        space = configs(rows, out, width, bits, capability=10 * torch.cuda.get_device_capability()[0])
        check(
            bits,
            group,
            draw(True, False),
            dtype,
            draw(None, *space),
            rows=rows,
            out=out,
            width=width,
            bias=draw(True, False),
        )


@pytest.mark.gpu
def test_every_configuration_on_a_gpu():
    major, minor = torch.cuda.get_device_capability()
    for bits, group, symmetric in ((4, 128, True), (4, 32, False), (8, None, True), (3, 128, False), (2, 64, True)):
        for rows in (1, 7, 16, 40, 300):
            for config in configs(rows, 1000, 2048, bits, capability=10 * major + minor):
                check(bits, group, symmetric, BFLOAT16, config, rows=rows, out=1000, width=2048)


@pytest.mark.gpu
def test_repeated_runs_are_equal_on_a_gpu():
    for rows in (1, 16, 64, 300):
        given = operands_of(rows)
        first = launch(*given, 4, 128)
        poison = torch.full((1 << 24,), float("nan"), device=DEVICE)
        del poison
        assert all(graph_equal(launch(*given, 4, 128), first) for _ in range(20))


def operands_of(rows):
    packed, scale, zero = (t.to(DEVICE) for t in pack_tiles(random_weight(1000, 4096, spec_of(4, 128, False))))
    return torch.randn(rows, 4096).to(DEVICE, BFLOAT16), packed, scale, zero, None


@pytest.mark.gpu
def test_the_layer_replays_in_a_graph():
    weight = random_weight(1024, 2048, spec_of(4, 128), BFLOAT16)
    layer = WeightOnlyLinear.from_weight(weight, torch.randn(1024), device=DEVICE, dtype=BFLOAT16)
    assert layer.choice.implementation == "triton"
    x = torch.randn(2, 2048).to(DEVICE, BFLOAT16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randn(2, 2048))
    graph.replay()
    torch.cuda.synchronize()
    assert graph_equal(y, layer(x))
