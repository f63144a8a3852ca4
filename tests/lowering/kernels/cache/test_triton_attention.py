"""Launching attention over quantized caches: configurations, shares, alignment; machine code of all of them."""

import pytest
import torch

pytest.importorskip("triton")

from qcompiler.errors import InputError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.kernels.cache import triton_attention as decode_attention_triton
from qcompiler.lowering.kernels.cache import triton_attention_split as decode_attention_split_triton
from qcompiler.lowering.kernels.cache.config import Config, Tile, configs, default_config, kind_of
from qcompiler.lowering.kernels.cache.decode_attention import Side, decode_attention_reference
from qcompiler.lowering.kernels.cache.triton_attention import launch
from qcompiler.lowering.kernels.launch import tuning
from tests.lowering.kernels.cache.filled_caches import (
    FORMATS,
    KERNELS,
    filled_cache,
    int32,
)
from tests.lowering.kernels.launch.ahead_of_time import inspect
from tests.lowering.kernels.launch.as_launched import as_launched, flaws

SHARED_OF_THE_SMALLEST = 99 * 1024
CPU = torch.device("cpu")


def side(spec, width):
    return decode_attention_triton._empty_side(spec, width)


@pytest.mark.parametrize("rows", [1, 4, 17, 128])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("spec", [None, *FORMATS.values()], ids=str)
def test_configurations_fit_every_device(spec, width, rows):
    keys = side(spec, width)
    tile = Tile.of(rows, keys, keys)
    found = configs(tile)
    assert found[0] == default_config(tile)
    assert len(set(found)) == len(found)
    for config in found:
        assert config.tokens > tile.rows  # else warps compute the same
        assert (config.stages - 1) * config.tokens * tile.token_bytes < SHARED_OF_THE_SMALLEST
        assert config.warps == 1 or tile.words > tile.rows


def test_tiles():
    int8, int4 = side(CacheFormat("int8"), 128), side(CacheFormat("int4"), 128)
    assert Tile.of(4, int8, int4) == Tile(16, 32, 192)
    assert Tile.of(17, int8, int8) == Tile(32, 64, 256)
    assert Tile.of(64, int8, int4).rows == 16


def test_shares_depend_on_the_capacity_and_keep_a_device_busy():
    splits = decode_attention_triton._splits
    config = Config(64, 4, 3, 4)
    assert splits(32768, 8, config, CPU) == 66
    assert splits(32768, 1000, config, CPU) == 1
    assert splits(1 << 20, 1, config, CPU) == 128
    assert splits(300, 8, config, CPU) == 3
    assert splits(1, 8, config, CPU) == 1


def test_strides_come_in_units_that_divide_them():
    packed = Side.of("k", torch.zeros(2, 3, 8, 40, dtype=torch.uint8), torch.ones(1, 3, 1, 80), None, "int4")
    words, steps, unit = decode_attention_triton._words("k", packed)
    assert (words.dtype, steps, unit) == (torch.uint16, (120, 40, 5), 4)
    aligned = Side.of("k", torch.zeros(2, 3, 8, 128, dtype=torch.int8), torch.ones(1, 3, 1, 128), None, "int8")
    assert decode_attention_triton._words("k", aligned)[1:] == ((96, 32, 4), 16)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(1, 2, 8, 31, dtype=torch.int8),
        torch.zeros(1, 2, 8, 33, dtype=torch.int8)[..., :32],
        torch.zeros(1, 2, 8, 34, dtype=torch.int8)[..., 1:33],
    ],
)
def test_codes_that_are_not_aligned_are_refused(codes):
    width = codes.shape[3]
    cache = Side.of("k", codes, torch.ones(1, 2, 1, width), None, "int8")
    with pytest.raises(InputError, match="not aligned") as caught:
        launch(torch.zeros(1, 2, 1, width).half(), cache, cache, int32(4), 1.0, None, None)
    assert caught.value.where == "k_codes"


def test_nothing_to_compute_gives_zeros():
    cache = Side.of("k", torch.zeros(1, 2, 0, 32, dtype=torch.int8), torch.ones(1, 2, 1, 32), None, "int8")
    out = launch(torch.ones(1, 4, 1, 32).half(), cache, cache, int32(0), 1.0, None, None)
    assert (out.shape, out.any().item()) == ((1, 4, 1, 32), False)


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *given, **constants: self.launches.append((grid, given, constants))


@pytest.fixture
def split(monkeypatch):
    recorders = Recorder(), Recorder()
    monkeypatch.setattr(decode_attention_triton, "split_kernel", recorders[0])
    monkeypatch.setattr(decode_attention_triton, "merge_kernel", recorders[1])
    return recorders[0]


def test_more_heads_than_a_second_axis_of_a_grid_has_places(split):
    """65535; and blocks of queries that read the same tokens are next to each other."""
    codes = torch.zeros(1, 1, 1, 16, dtype=torch.int8).expand(40000, 2, 256, 16)
    cache = Side.of("k", codes, torch.ones(1, 2, 1, 16), None, "int8")
    q = torch.zeros(1, 1, 1, 16).half().expand(40000, 20, 2, 16)
    launch(q, cache, cache, int32(4), 1.0, None, None, splits=3)
    ((grid, _, constants),) = split.launches
    assert grid == (80000 * 2, 3)
    assert (constants["ROWS"], constants["RATIO"]) == (16, 10)


@pytest.mark.parametrize(("window", "passed"), [(None, 0), (3, 3), (256, 256), (2**31 - 1, 256), (2**40, 256)])
def test_a_window_wider_than_the_cache_is_no_number_that_overflows(split, window, passed):
    cache = Side.of("k", torch.zeros(1, 1, 256, 16, dtype=torch.int8), torch.ones(1, 1, 1, 16), None, "int8")
    launch(torch.zeros(1, 1, 1, 16).half(), cache, cache, int32(4), 1.0, window, None)
    names = decode_attention_split_triton.split_kernel.arg_names
    ((_, given, constants),) = split.launches
    assert given[names.index("window")] == passed
    assert constants["WINDOW"] == (window is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
def test_a_found_configuration_is_launched(monkeypatch):
    cache = filled_cache(FORMATS["int8"], 1, 1, 70, 32, (70,))
    keys = Side.of("k", *cache.tensors, "int8")
    q = torch.randn(1, 2, 1, 32).half()
    asked = []

    def found(device, kernel, key, make, candidates):
        asked.append((kernel, key, candidates()))
        return make(tokens=128, warps=1, stages=2, programs=1)

    monkeypatch.setattr(tuning, "found", found)
    got = launch(q, keys, keys, int32(70), 0.2, None, None)
    want = decode_attention_reference(q.float(), *cache.tensors, *cache.tensors, int32(70), "int8", "int8", 0.2)
    assert (got.float() - want).abs().max() < 2e-3 * want.abs().max()
    ((kernel, key, candidates),) = asked
    assert (kernel, candidates) == ("decode_attention", configs(Tile.of(2, keys, keys)))
    assert key == ("int8 per token g32 symmetric", "int8 per token g32 symmetric", 32, 32, 2, 1, 128)


def test_machine_code_of_the_common_forms():
    wanted = [c for c in decode_attention_triton.ahead_of_time() if c.name.startswith("common")]
    assert {case.budget for case in wanted} == {0.0, *decode_attention_triton._BUDGETS.values()}
    reports = inspect("cache.triton_attention", "common", capabilities=(90,))
    assert sorted(r["name"] for r in reports) == sorted(case.name for case in wanted if 90 in case.mma)
    assert [(r["name"], r["failures"]) for r in reports if r["failures"] or r["spilled_bytes"]] == []
    plain = [r["loop"] for r in reports if r["name"].split(": ")[1].split(",")[0] in ("int8", "int4", "fp8")]
    assert len(plain) == 3
    assert not any(loop.get("I2F") or loop.get("I2FP") for loop in plain)  # codes are not converted one by one


def test_every_configuration_of_the_common_forms_is_among_the_cases():
    launched = {
        (c.constants["K_KIND"], c.constants["TOKENS"], c.options["num_warps"], c.options["num_stages"])
        for c in decode_attention_triton.ahead_of_time()
        if c.constants.get("K_WIDTH") == 128 and c.constants["RATIO"] == 4
    }
    for spec in (CacheFormat("int8"), CacheFormat("int4"), CacheFormat("float8_e4m3fn")):
        keys = side(spec, 128)
        kind, _ = kind_of(keys)
        for config in configs(Tile.of(4, keys, keys)):
            assert (kind, config.tokens, config.warps, config.stages) in launched


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_machine_code_of_everything():
    wanted = list(decode_attention_triton.ahead_of_time())
    reports = inspect("cache.triton_attention")
    assert sorted((r["name"], r["capability"]) for r in reports) == sorted((c.name, n) for c in wanted for n in c.mma)
    assert [(r["name"], r["failures"]) for r in reports if r["failures"] or r["spilled_bytes"]] == []


def launches(capability: int) -> None:
    """Forms, widths and options that are not among the cases; for `as_launched`."""
    decode_attention_triton._mode = lambda device: 2 if capability >= 89 else 1  # type: ignore[assignment]
    shapes: list[tuple[CacheFormat | None, int, int, int, int | None, float | None, int | None]] = [
        (None, 96, 4, 1, None, None, None),
        (FORMATS["int4-g16-asymmetric"], 96, 8, 4, 700, 20.0, None),
        (CacheFormat("int8"), 128, 4, 1, 700, 20.0, 1),
        (CacheFormat("float8_e4m3fn"), 80, 8, 16, None, 3.0, None),
    ]
    for spec, width, ratio, queries, window, softcap, splits in shapes:
        like = side(spec, width)
        scale, zero = (None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (like.scale, like.zero))
        cache = Side(spec, torch.empty(like.codes.shape, dtype=like.codes.dtype), scale, zero)
        q = torch.empty(1, queries, 8 * ratio, width, dtype=torch.float16).transpose(1, 2)
        launch(q, cache, cache, int32(4), 0.1, window, softcap, splits=splits)


@pytest.mark.parametrize("capability", [86, 90])
def test_what_is_launched_leaves_no_registers_in_memory(capability):
    found = as_launched("cache.test_triton_attention", "launches", capability)
    assert [one["kernel"] for one in found].count("split_kernel") == 4
    assert flaws(found, capability) == [one for one in found if one["spilled"]] == []


@pytest.mark.gpu
def test_a_recorded_graph_serves_every_length():
    capacity = 2048
    cache = filled_cache(FORMATS["int4-g16-asymmetric"], 1, 8, capacity, 128, (capacity,))
    on_device = cache.to("cuda")
    q = torch.randn(1, 32, 1, 128).half()
    length = int32(capacity).cuda()
    given = (q.cuda(), *on_device.tensors, *on_device.tensors, length, "int4", "int4", 0.1)
    KERNELS.decode_attention(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNELS.decode_attention(*given)
    for used in (1, 65, 1000, capacity):
        length.fill_(used)
        graph.replay()
        want = decode_attention_reference(q.float(), *cache.tensors, *cache.tensors, int32(used), "int4", "int4", 0.1)
        assert (out.cpu().float() - want).abs().max() <= 1.5e-3 * want.abs().max()
