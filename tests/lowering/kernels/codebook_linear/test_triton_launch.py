"""The codebook layer in Triton against the reference, interpreted or on a GPU, and its machine code."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qcompiler.errors import InputError, TargetError
from qcompiler.ir.qtensor import Codebook, Csr
from qcompiler.lowering.kernels.codebook_linear import triton_launch as module
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear, codebook_linear_reference
from qcompiler.lowering.kernels.codebook_linear.triton_launch import Config
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.numerics.spec import QuantSpec
from tests.lowering.kernels.launch.ahead_of_time import inspect
from tests.lowering.kernels.launch.as_launched import as_launched, flaws

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the largest result: one rounding of it
WRITTEN = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # sums of table and sparse matrix are rounded too


def arguments(
    rows: int, out: int, width: int, bits: int, dtype: torch.dtype, *, share: float = 0.03, bias: bool = True
) -> tuple[Any, ...]:
    """What the operator takes; every third row has nothing apart, and the second nearly all."""
    codes = torch.randint(0, 1 << bits, (out, width), dtype=torch.uint8)
    table = torch.randn(out, 1 << bits).sort(-1).values.to(dtype)
    sparse = None
    if share:
        apart = torch.rand(out, width) < share
        apart[::3] = False
        apart[1:2] = torch.rand(width) < 0.9
        offsets = torch.zeros(out + 1, dtype=torch.int32)
        offsets[1:] = apart.sum(-1).cumsum(0)
        sparse = Csr(torch.randn(int(apart.sum())).to(dtype), apart.nonzero()[:, 1].int(), offsets)
    spec = QuantSpec(f"int{bits}", "per_channel", None, codebook=True)
    weight = Codebook(codes, table, sparse, spec)
    offset = torch.randn(out).to(dtype) if bias else None
    layer = CodebookLinear.from_weight(weight, offset, device=DEVICE, dtype=dtype)
    x = torch.randn(rows, width).to(DEVICE, dtype)
    return x, layer.codes, layer.table, layer.bias, layer.values, layer.columns, layer.row_offsets, out


def error(got: Tensor, given: tuple) -> float:
    x, *rest = given
    wanted = codebook_linear_reference(x, *rest).double()
    assert got.shape == wanted.shape
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ragged_shapes_of_few_rows(bits: int, dtype: torch.dtype) -> None:
    for rows, out, width in ((1, 37, 300), (3, 70, 600), (9, 16, 256)):
        given = arguments(rows, out, width, bits, dtype)
        assert error(module.launch(*given), given) < TOLERANCE[dtype]


TILES = {(c.rows, c.out, c.swap): c for capability in (80, 90) for c in module._tiles(capability)}


@pytest.mark.parametrize("config", TILES.values(), ids=str)
def test_every_shape_of_a_block(config: Config) -> None:
    """More rows of input and of the weight than a block has, and a last split with less to do than the other."""
    given = arguments(config.rows + 3, config.out + 5, 700, 3, torch.float16)
    assert error(module.launch(*given, config=replace(config, split=2)), given) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_sparse_matrix(bits: int, bias: bool) -> None:
    given = arguments(2, 40, 520, bits, torch.float16, share=0, bias=bias)
    for split in (1, 3):
        assert error(module.launch(*given, config=Config(8, split=split)), given) < TOLERANCE[torch.float16]


def test_more_splits_than_blocks_of_channels() -> None:
    given = arguments(1, 32, 600, 4, torch.float16)
    assert error(module.launch(*given, config=Config(8, split=8)), given) < TOLERANCE[torch.float16]
    assert module._pieces(8, 3) == (3, 1)
    assert module._pieces(4, 5) == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_many_rows_write_the_weight_out(bits: int, dtype: torch.dtype) -> None:
    given = arguments(130, 70, 300, bits, dtype)
    assert module.default_config(130, 70, 300, bits) == Config(rows=0)
    assert error(module.launch(*given), given) < WRITTEN[dtype]


def test_results_do_not_depend_on_what_was_there() -> None:
    given = arguments(2, 40, 520, 4, torch.float16)
    first = module.launch(*given)
    poison = [torch.full((2, 2, 40), torch.nan, device=DEVICE) for _ in range(4)]
    del poison
    assert torch.equal(first, module.launch(*given))


def test_leading_dimensions_and_none() -> None:
    x, *rest = arguments(6, 20, 256, 4, torch.float16)
    flat = module.launch(x, *rest)
    assert torch.equal(module.launch(x.view(2, 3, 256), *rest), flat.view(2, 3, 20))
    assert torch.equal(module.launch(x[0], *rest), module.launch(x[:1], *rest)[0])
    assert module.launch(x[:0], *rest).shape == (0, 20)


def test_inputs_at_odd_addresses() -> None:
    x, *rest = arguments(2, 20, 256, 4, torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 16
    assert torch.equal(module.launch(shifted, *rest), module.launch(x, *rest))


def test_whole_blocks_of_channels_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    run = module._run

    def recorded(kernel: Any, grid: Any, tensors: tuple[Tensor, ...], *rest: Any) -> None:
        read.append(tensors[0].data_ptr())
        run(kernel, grid, tensors, *rest)

    monkeypatch.setattr(module, "_run", recorded)
    given = arguments(2, 20, 512, 4, torch.float16)
    assert error(module.launch(*given), given) < TOLERANCE[torch.float16]
    assert read == [given[0].data_ptr()]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codes, table, bias, *rest = arguments(2, 20, 256, 4, torch.float16)
    with pytest.raises(InputError, match="cannot take"):
        module.launch(x, codes.transpose(0, 1), table, bias, *rest)
    with pytest.raises(InputError, match="cannot take"):
        module.launch(x.bfloat16(), codes, table, bias, *rest)
    with pytest.raises(InputError, match="no kernel"):
        module.launch(x.float(), codes, table.repeat(2, 1), None, *rest)
    with pytest.raises(InputError, match="cannot take"):
        module.launch(x[:, ::2], codes, table, bias, *rest)
    old = Device("cuda", "an old one", 75, True)
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: old))
    with pytest.raises(TargetError, match="too old"):
        module.require_device(DEVICE)


def test_the_search_space_begins_with_the_default_and_holds_nothing_twice() -> None:
    for capability in (80, 90):
        for rows in (1, 3, 8, 9, 16, 17, 64, 65, 128, 129, 2000):
            found = module.configs(rows, 4096, 4096, 4, capability=capability)
            assert found[0] == module.default_config(rows, 4096, 4096, 4, capability=capability)
            assert len(set(found)) == len(found)
            assert (found == (Config(rows=0),)) == (rows > 256)
            assert all(config.split == 1 for config in module.configs(rows, 4096, 200, 4, capability=capability))


def test_defaults_fill_a_large_device() -> None:
    assert module.default_config(1, 4096, 4096, 4) == Config(rows=8, split=8)
    assert module.default_config(1, 8192, 8192, 4) == Config(rows=8, split=5)
    assert module.default_config(1, 200000, 4096, 4) == Config(rows=8, split=1)
    assert module.default_config(64, 8192, 8192, 4).rows == 64
    assert module.default_config(17, 8192, 8192, 4, capability=80).rows == 32


def cases() -> list[str]:
    return [case.name for case in module.ahead_of_time()]


def failures(found: list[dict]) -> dict[str, list[str]]:
    return {f"{entry['name']} sm_{entry['capability']}": entry["failures"] for entry in found if entry["failures"]}


def test_default_configurations_compile_to_what_they_should() -> None:
    found = inspect("codebook_linear.triton_launch", "default", capabilities=(90,))
    assert failures(found) == {}
    names = {entry["name"] for entry in found}
    assert names == {name for name in cases() if "default" in name and "sm80" not in name}
    four = {entry["name"]: entry for entry in found}["multiply-default-4-8x32-2x4-sm90"]
    assert four["instructions_per_weight"] < 3.6
    assert not {"I2F", "F2F", "F2FP", "SHFL", "LDG"} & set(four["loop"])


@pytest.mark.slow
def test_all_configurations_compile_to_what_they_should() -> None:
    found = inspect("codebook_linear.triton_launch")
    assert failures(found) == {}
    assert {entry["name"] for entry in found} == set(cases())


def test_every_configuration_that_can_be_launched_is_compiled() -> None:
    names = cases()
    assert len(set(names)) == len(names)
    for capability in (80, 90):
        for rows in (*range(1, 140), 256, 1000):
            for config in module.configs(rows, 512, 4096, 4, capability=capability):
                kind = "x".join(map(str, (config.rows, config.out))) + ("" if config.swap else "p")
                shape = f"{kind}-{config.warps}x{config.stages}-sm{capability}"
                assert not config.rows or all(any(f"-{b}-{shape}" in name for name in names) for b in (2, 3, 4))


def launches(capability: int, rows: tuple[int, ...] = (1,), bits: tuple[int, ...] = (4,)) -> None:
    """What `as_launched` compiles: a single row of input, with and without a sparse matrix, and one channel alone."""
    Device.of = classmethod(lambda cls, device: Device("cuda", "a GPU", capability, True))  # type: ignore[assignment, method-assign]
    for b in bits:
        for count in rows:
            for out, width in ((4096, 4096), (1, 300)):
                blocks, nothing = -(-out // 16), (None, None, None)
                codes = torch.zeros(blocks, -(-width // 256), b, 16, 32, dtype=torch.uint8)
                table = torch.zeros((1 << b) // 2, blocks * 16, dtype=torch.int32)
                columns, offsets = torch.zeros(16, dtype=torch.int16), torch.zeros(out + 1, dtype=torch.int32)
                x, bias = torch.zeros(count, width, dtype=torch.float16), torch.zeros(out, dtype=torch.float16)
                sparse = (torch.zeros(16, dtype=torch.float16), columns, offsets)
                given: list[tuple[Any, ...]] = [(bias, *parts, out) for parts in (sparse, nothing)]
                for rest in given:
                    module.launch(x, codes, table, *rest)


def many_launches(capability: int) -> None:
    launches(capability, (1, 8, 16, 20, 32, 48, 64, 200), (2, 3, 4))


def test_launches_of_a_single_row_compile() -> None:
    found = as_launched("codebook_linear.test_triton_launch")
    assert flaws(found) == []
    assert {"multiply", "finish"} == {one["kernel"] for one in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_launches_of_many_shapes_compile(capability: int) -> None:
    assert flaws(as_launched("codebook_linear.test_triton_launch", "many_launches", capability), capability) == []


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_on_a_gpu(seed: int) -> None:
    """All configurations, twice over memory that held something else: right, and the same to the bit."""
    torch.manual_seed(seed)
    rows, out, width = (int(torch.randint(1, top, ())) for top in (200, 3000, 6000))
    bits, dtype = (2, 3, 4)[seed % 3], (torch.float16, torch.bfloat16)[seed % 2]
    given = arguments(rows, out, width, bits, dtype, share=(0.005, 0)[seed % 5 == 0], bias=seed % 4 > 0)
    for config in module.configs(rows, out, width, bits, capability=Device.of(DEVICE).capability):
        first = module.launch(*given, config=config)
        assert error(first, given) < WRITTEN[dtype]
        poison = [torch.full((rows, out), torch.nan, device=DEVICE) for _ in range(4)]
        del poison
        assert torch.equal(first, module.launch(*given, config=config))


@pytest.mark.gpu
def test_the_operator_and_a_cuda_graph_on_a_gpu() -> None:
    given = arguments(1, 512, 1024, 4, torch.bfloat16)
    run = torch.ops.qcompiler_kernels.codebook_linear
    expected = run(*given)
    assert error(expected, given) < TOLERANCE[torch.bfloat16]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(*given)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
