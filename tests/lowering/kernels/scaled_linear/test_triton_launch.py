"""The Triton products of 8-bit codes against the reference, interpreted or on a GPU, and their machine code."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from qcompiler import numerics
from qcompiler.errors import InputError
from qcompiler.ir.qtensor import Affine
from qcompiler.lowering.kernels.launch.device import Choice
from qcompiler.lowering.kernels.scaled_linear import operator as plain
from qcompiler.lowering.kernels.scaled_linear import triton_grouped as grouped
from qcompiler.lowering.kernels.scaled_linear import triton_launch as module
from qcompiler.lowering.kernels.scaled_linear.config import Config, configs, default_config
from qcompiler.numerics.scheme import Scheme
from tests.lowering.kernels.launch.ahead_of_time import inspect
from tests.lowering.kernels.launch.as_launched import as_launched, flaws

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTEGERS = ("w8a8", "w8a8-actsym", "w8a8-dynamic", "w8a8-dynamic-actasym")
FLOATS = ("fp8", "fp8-dynamic", "fp8-e5m2", "fp8-block")
GROUPED = ("w4a8", "w4a8-g64", "w4a8-g32-dynamic", "w4a8-channel", "w4a4", "w8a8-g32", "w8a8-g128-dynamic-actasym")


def laid_out(scheme: str, outputs: int, width: int) -> plain.ScaledLinear:
    """A layer whose weight is stored as the kernels read it, with a bias, on the device of the tests."""
    found = Scheme.parse(scheme)
    assert found.weight is not None
    assert found.activation is not None
    w = torch.randn(outputs, width) * torch.rand(outputs, 1)
    scale, zero = numerics.min_max_qparams(w, found.weight, torch.float32)
    weight = Affine(numerics.quantize(w, scale, zero, found.weight), scale, zero, found.weight, torch.float32)
    layer = plain.ScaledLinear(Choice("triton"), found.weight, found.activation, torch.float16, width)
    layer._lay_out(weight, torch.device("cpu"))
    layer.register_buffer("bias", torch.randn(outputs).half())
    return layer.to(DEVICE)


def codes_of(layer: plain.ScaledLinear, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x, spec = torch.randn(*shape) + 0.2, layer.activation
    if spec.dynamic:
        scale, zero = torch.ops.qcompiler.choose_qparams(x, *spec.range_options(x.shape[-1]))
    else:
        ends = torch.stack([x.min().clamp(max=0), x.max().clamp(min=0)])
        scale, zero = numerics.range_qparams(ends[0], ends[1], spec, torch.float32)
    zero = None if spec.symmetric else zero
    axis, block = (-1, shape[-1]) if spec.dynamic else (0, 0)
    codes = torch.ops.qcompiler.quantize(x, scale, zero, axis, block, spec.code_dtype, spec.bits)
    return codes.to(DEVICE), scale.to(DEVICE), None if zero is None else zero.to(DEVICE)


def arguments(layer: plain.ScaledLinear, *shape: int) -> tuple[Any, ...]:
    rest = (layer.weight, layer.weight_scale, layer.weight_sums, layer.bias, layer.group, torch.float16)
    return (*codes_of(layer, *shape), *rest)


def check(given: tuple[Any, ...], **options) -> torch.Tensor:
    """The kernel against the reference: half a step of float16 for results, and float32 sums of another order."""
    y = module.launch(*given, **options)
    expected = plain.scaled_linear_reference(*(*given[:-1], torch.float32))
    assert y.dtype == torch.float16
    assert y.shape == expected.shape
    assert ((y.float() - expected).abs() <= expected.abs() * 2**-11 + expected.abs().max() * 2e-6).all()
    return y


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS + GROUPED)
def test_shapes_that_no_tile_divides(scheme):
    layer = laid_out(scheme, 150, 333)
    for rows in (1, 5, 20):
        check(arguments(layer, rows, 333))


@pytest.mark.parametrize("scheme", [*INTEGERS, "fp8-dynamic", "fp8-block", "w4a8", "w4a8-g64", "w4a8-channel"])
def test_split_along_k(scheme):
    layer = laid_out(scheme, 70, 1024)
    given = arguments(layer, 3, 1024)
    kind = grouped.GroupedConfig(16, 64, 4, 4, 3) if scheme.startswith("w4") else Config(8, 64, 128, 4, 4, 4)
    y = check(given, config=kind)
    assert torch.equal(y, module.launch(*given, config=kind))


@pytest.mark.parametrize("splits", [2, 8])
def test_more_parts_than_tiles(splits):
    layer = laid_out("w8a8", 40, 200)
    check(arguments(layer, 2, 200), config=Config(8, 64, 128, splits, 4, 4))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "fp8", "fp8-dynamic", "fp8-e5m2", "fp8-block"])
def test_many_rows(scheme):
    """Nine tiles of rows, so that their order matters."""
    layer = laid_out(scheme, 150, 96)
    config = Config(16, 64, 64, 1, 4, 3, swapped=False)
    check(arguments(layer, 140, 96), config=config)


@pytest.mark.parametrize("scheme", FLOATS)
def test_floats_without_a_product_of_their_own(scheme):
    """Compute capability 8.0: bytes become float16."""
    layer = laid_out(scheme, 150, 333)
    for rows in (1, 20):
        check(arguments(layer, rows, 333), capability=80)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which the interpreter computes with
@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float_as_float16(codes):
    """One product per code, NaN among those of the activation."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this device has a product of 8-bit floats")
    x = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(codes)
    x = x[~x.float().isinf()].to(DEVICE)[:, None].expand(-1, 16).clone()
    x[:, 1:] = 0
    weight, one = torch.ones(8, 16, device=DEVICE).to(codes), torch.ones(8, device=DEVICE)
    y = module.launch(x, one[:1], None, weight, one, None, None, 0, torch.float32, capability=80)
    expected = x[:, :1].float()
    assert torch.equal(y.isnan(), expected.isnan().expand(-1, 8))
    assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0).expand(-1, 8))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8", "fp8-dynamic", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_library_products(scheme, dtype):
    layer = laid_out(scheme, 64, 128)
    given = (*arguments(layer, 72, 128)[:-3], layer.bias.to(dtype), 0, dtype)
    y = module.launch(*given, config=Config(library=True))
    expected = plain.scaled_linear_reference(*given[:-1], torch.float32)
    assert (y.float() - expected).abs().max() <= expected.abs().max() * (1e-3 if dtype == torch.float16 else 1e-2)


def test_integers_are_exact():
    codes = torch.randint(-128, 128, (20, 700), dtype=torch.int8, device=DEVICE)
    weight = torch.randint(-128, 128, (70, 700), dtype=torch.int8, device=DEVICE)
    one = torch.ones(70, device=DEVICE)
    for config in (None, Config(16, 64, 128, 2, 4, 4)):
        y = module.launch(codes, one[:1], None, weight, one, None, None, 0, torch.float32, config=config)
        assert torch.equal(y.double(), (codes.double() @ weight.double().T).float().double())


def test_leading_axes_and_no_rows():
    layer = laid_out("w8a8-dynamic", 70, 64)
    assert check(arguments(layer, 2, 3, 64)).shape == (2, 3, 70)
    codes, scale, *rest = arguments(layer, 1, 64)
    assert module.launch(codes.new_empty(2, 0, 64), scale.new_empty(2, 0, 1), *rest).shape == (2, 0, 70)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8-dynamic", "w4a8-dynamic"])
def test_weights_must_lie_as_they_were_packed(scheme):
    given = list(arguments(laid_out(scheme, 64, 128), 3, 128))
    strided = given[3].t().contiguous().t()
    shifted = torch.empty(given[3].numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(given[3].shape)
    for weight in (strided, shifted.view(given[3].dtype)):
        with pytest.raises(InputError, match="contiguous"):
            module.launch(*given[:3], weight, *given[4:])


def by_bytes(first: np.ndarray, selector: int) -> np.ndarray:
    """``prmt.b32`` of a register and zero."""
    source = [(first >> np.uint32(8 * i)) & np.uint32(255) for i in range(4)] + [np.zeros_like(first)] * 4
    return sum((source[(selector >> (4 * i)) & 7] << np.uint32(8 * i) for i in range(4)), np.zeros_like(first))


def run_ptx(code: str, register: np.ndarray) -> list[np.ndarray]:
    """The few instructions that the conversions use, on arrays of 32-bit registers."""
    found = {"$1" if "$2" not in code else "$2": register, "0": np.zeros_like(register)}

    def value(name: str) -> np.ndarray:
        return np.full_like(register, int(name, 16)) if name.startswith("0x") else found[name]

    for line in code.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        parts = [part.strip() for part in operands.split(",")]
        if name == "prmt.b32":
            found[parts[0]] = by_bytes(value(parts[1]), int(parts[3], 16))
        elif name == "shr.b32":
            found[parts[0]] = value(parts[1]) >> np.uint32(int(parts[2]))
        elif name == "shl.b32":
            found[parts[0]] = value(parts[1]) << np.uint32(int(parts[2]))
        elif name == "and.b32":
            found[parts[0]] = value(parts[1]) & value(parts[2])
        elif name == "add.u32":
            found[parts[0]] = value(parts[1]) + value(parts[2])
        elif name == "lop3.b32":
            assert parts[4] == "0xea"
            found[parts[0]] = (value(parts[1]) & value(parts[2])) | value(parts[3])
        else:
            assert name in ("", ".reg"), line
    return [found["$0"], found["$1"]]


@pytest.mark.parametrize("keeps_nan", [False, True])
def test_the_instructions_that_make_halves_of_e4m3(keeps_nan):
    codes = np.random.default_rng(0).permutation(np.arange(256)).astype(np.uint8)
    code = (module._INPUT_TO_HALF if keeps_nan else module._WEIGHT_TO_HALF).value
    first, second = run_ptx(code, codes.view(np.uint32))
    halves = np.stack([first, second], -1).reshape(-1).view(np.float16).astype(np.float32) * 256
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    known = ~np.isnan(expected)
    assert np.array_equal(halves[known], expected[known])
    assert np.isnan(halves[~known]).all() == keeps_nan


def test_the_instructions_that_make_halves_of_e5m2():
    codes = np.random.default_rng(0).permutation(np.arange(256)).astype(np.uint8)
    first, second = run_ptx(module._E5M2_TO_HALF.value, codes.view(np.uint32))
    halves = np.stack([first, second], -1).reshape(-1).view(np.float16).astype(np.float32)
    expected = torch.from_numpy(codes).view(torch.float8_e5m2).float().numpy()
    assert np.array_equal(halves, expected, equal_nan=True)


def test_the_instructions_that_unpack_int4():
    packed = np.arange(256).astype(np.uint8)
    low, high = (half.view(np.int8) for half in run_ptx(grouped._UNPACK.value, packed.view(np.uint32)))
    signed = ((np.stack([packed & 15, packed >> 4]) ^ 8).astype(np.int16) - 8) * 16
    assert np.array_equal(np.stack([low, high]), signed)


def names_of(found: list[dict]) -> set[str]:
    assert {entry["name"]: entry["failures"] for entry in found if entry["failures"]} == {}
    return {entry["name"].removeprefix("default-") for entry in found}


def test_default_configurations_use_tensor_cores_and_do_not_spill():
    names = names_of(inspect("scaled_linear.triton_launch", "default", capabilities=(90,)))
    for codes in (torch.int8, torch.float8_e4m3fn):
        for rows in (1, 64):
            config = default_config(rows, 4096, 4096, codes, 90)
            assert module.case_name(codes, False, 90, config) in names
    for rows in (16, 64):
        assert grouped.case_name(grouped.default_config(rows, 65536, 4096, 128), 128, True) in names


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_configurations_use_tensor_cores_and_do_not_spill():
    names = names_of(inspect("scaled_linear.triton_launch"))
    for rows in (1, 9, 32, 64, 4096):
        for shape in ((1024, 4096), (4096, 4096), (28672, 8192), (1000, 999)):
            is_odd = shape[1] % 16 != 0
            for config in grouped.configs(rows, *shape, 128):
                assert grouped.case_name(config, 128, True, is_odd=is_odd) in names
            for group in (32, 64, 256):
                config = replace(grouped.default_config(rows, *shape, group), splits=1)
                assert grouped.case_name(config, group, False, is_odd=is_odd) in names
            for codes in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
                for capability in (80, 90):
                    for has_blocks in (False, True) if codes == torch.float8_e4m3fn else (False,):
                        for config in configs(rows, *shape, codes, capability, has_blocks=has_blocks):
                            name = module.case_name(codes, has_blocks, capability, config)
                            assert config.library or name in names


def launches(capability: int, shapes: tuple[tuple[int, ...], ...] = ((1, 1024, 4096), (16, 512, 1040))) -> None:
    """What `as_launched` compiles: a single row, split along K; a width that no tile divides."""
    for rows, outputs, width in shapes:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            x, weight = (torch.zeros(n, width, dtype=torch.uint8).view(dtype) for n in (rows, outputs))
            zero = torch.zeros(rows, 1, dtype=torch.int8) if dtype == torch.int8 else None
            sums, bias = torch.zeros(outputs), torch.zeros(outputs, dtype=torch.bfloat16)
            rest = (weight, torch.ones(outputs), sums, bias, 0, torch.bfloat16)
            module.launch(x, torch.ones(rows, 1), zero, *rest, capability=capability)
        packed = torch.zeros(outputs, 64 * -(-width // 128), dtype=torch.uint8)
        x, scales = torch.zeros(rows, width, dtype=torch.int8), torch.ones(-(-width // 128), outputs)
        module.launch(x, torch.ones(rows, 1), None, packed, scales, None, None, 128, torch.bfloat16)


def many_launches(capability: int) -> None:
    shapes = ((4096, 4096), (4096, 11008), (3584, 18944), (999, 4099), (64, 1))
    launches(capability, tuple((rows, *shape) for rows in (1, 2, 16, 64) for shape in shapes))
    launches(capability, ((1, 1, 1), (64, 1, 4096)))


def test_launches_of_a_single_row_compile():
    found = as_launched("scaled_linear.test_triton_launch")
    assert flaws(found) == []
    assert {"_kernel", "_grouped_kernel", "_finish_kernel"} == {one["kernel"] for one in found}
    assert any(one["kernel"] == "_finish_kernel" and one["integers"][0] == 1 for one in found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_launches_of_many_shapes_compile(capability):
    assert flaws(as_launched("scaled_linear.test_triton_launch", "many_launches", capability), capability) == []


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-actasym", "fp8-dynamic", "w4a8-dynamic"])
def test_scales_and_codes_that_are_parts_of_other_tensors(scheme):
    """Expanded or strided scales, codes at an odd address: copied, not read as if they were whole tensors."""
    codes, scale, zero, *rest = arguments(laid_out(scheme, 70, 128), 5, 128)
    expected = module.launch(codes, scale, zero, *rest)
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(codes.shape)
    shifted.copy_(codes.view(torch.uint8))
    wide = torch.stack([scale, torch.full_like(scale, torch.nan)], -1)[..., 0]
    assert not wide.is_contiguous()
    wide_zero = None if zero is None else torch.stack([zero, zero + 1], -1)[..., 0]
    assert torch.equal(module.launch(shifted.view(codes.dtype), wide, wide_zero, *rest), expected)
    one = scale[:1].clone()
    ends = (one.new_full((9,), torch.nan), one, one.new_full((9,), torch.nan))
    expanded = torch.cat([end.reshape(-1) for end in ends])[9:10].expand(5)[:, None]
    assert torch.equal(module.launch(codes, expanded, zero, *rest), module.launch(codes, one.repeat(5, 1), zero, *rest))


@pytest.mark.parametrize(("rows", "refuses", "calls"), [(256, False, 1), (257, False, 1), (257, True, 2)])
def test_products_that_the_library_cannot_scale_are_scaled_behind(rows, refuses, calls, monkeypatch):
    layer = laid_out("fp8-dynamic", 64, 128)
    given = (*arguments(layer, rows, 128)[:-3], layer.bias, 0, torch.bfloat16)
    product, seen = torch._scaled_mm, []

    def scaled_mm(x, weight, a, b, **options):
        seen.append(a.numel())
        if refuses and a.numel() > 1:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return product(x, weight, a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    y = module.launch(*given, config=Config(library=True))
    expected = plain.scaled_linear_reference(*given[:-1], torch.float32)
    assert (y.float() - expected).abs().max() <= expected.abs().max() * 1e-2
    assert len(seen) == calls
    assert seen[-1] == (rows if rows > 256 and not refuses else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes_on_a_gpu(seed):
    """Every scheme; repeated runs are equal, also when memory held something else before."""
    random = torch.Generator().manual_seed(seed)
    scheme = (INTEGERS + FLOATS + GROUPED)[seed % 15]
    rows, outputs, width = (int(torch.randint(1, top, (), generator=random)) for top in (200, 3000, 5000))
    if seed % 2:
        outputs, width = -(-outputs // 16) * 16, -(-width // 128) * 128
    given = arguments(laid_out(scheme, outputs, width), rows, width)
    y = check(given)
    poison = torch.full((64 << 20,), 0x7F, dtype=torch.uint8, device=DEVICE)
    del poison
    assert torch.equal(y, module.launch(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "fp8-dynamic", "w4a8-dynamic"])
@pytest.mark.parametrize("rows", [1, 65, 300])
def test_the_operator_in_a_cuda_graph_on_a_gpu(scheme, rows):
    """K and N at which cuBLAS has been seen to refuse scales per row and column, up to 256 rows of them."""
    layer = laid_out(scheme, 3072, 9216)
    given = (*arguments(layer, rows, 9216)[:-3], layer.bias.bfloat16(), layer.group, torch.bfloat16)
    run = torch.ops.qcompiler_kernels.scaled_linear
    expected = run(*given)
    wanted = plain.scaled_linear_reference(*given[:-1], torch.float32)
    assert (expected.float() - wanted).abs().max() <= wanted.abs().max() * 1e-2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(*given)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
