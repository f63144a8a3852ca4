"""The kernel of appends: the codes of the reference, bit for bit, interpreted or on a GPU; its machine code."""

import pytest
import torch

pytest.importorskip("triton")

from qcompiler.lowering.kernels.cache import triton_append as cache_append_triton
from qcompiler.lowering.kernels.cache.triton_append import (
    Config,
    configs,
    default_config,
    launch,
)
from tests.lowering.kernels.cache.filled_caches import (
    FORMATS,
    Cache,
    empty_cache,
    int32,
)
from tests.lowering.kernels.cache.test_append import append_reference, awkward, equal
from tests.lowering.kernels.launch.ahead_of_time import inspect

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


def check(name, shape, start, capacity, config, dtype=torch.float16, device="cpu"):
    """The rows written equal the reference's; all others stay as they were."""
    batch, heads, _, width = shape
    reference = empty_cache(FORMATS.get(name), batch, heads, capacity, width, dtype)
    cache = reference.copy().to(device)
    new = awkward(*shape).clamp(-65504, 65504).to(dtype)
    launch(new.to(device), *cache.tensors, start.to(device), cache.spec, config)
    append_reference(reference, new, start)
    assert equal(cache.to("cpu"), reference)


@interpreted
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_interpreted_codes_equal_the_reference(name, width):
    check(name, (2, 3, 3, width), int32(4), 9, Config(4, 4))


@interpreted
@pytest.mark.parametrize("rows", [1, 16])
def test_rows_are_spread_over_programs(rows):
    check("int4-g16-asymmetric", (3, 2, 3, 32), int32(2), 5, Config(rows, 1))


@interpreted
@pytest.mark.parametrize("starts", [(0,), (7,), (6, 0), (9,), (-1,), (-1, 5)])
def test_every_sequence_has_its_place_and_what_lies_outside_is_dropped(starts):
    check("int8", (2, 2, 2, 16), int32(*starts), 9, Config(4, 1))


@interpreted
def test_float32_and_a_view_are_taken():
    reference = empty_cache(FORMATS["int8-asymmetric"], 2, 3, 5, 32)
    store = empty_cache(FORMATS["int8-asymmetric"], 2, 6, 5, 32)
    part = Cache(store.spec, store.codes[:, 1:4], store.scale[:, 1:4], store.zero[:, 1:4], 32)
    for mine, other in zip(part.tensors, reference.tensors, strict=True):
        mine.copy_(other)
    new = torch.randn(2, 2, 3, 32).transpose(1, 2)
    launch(new, *part.tensors, int32(1), part.spec, Config(2, 1))
    append_reference(reference, new, int32(1))
    assert equal(part, reference)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_tokens_may_lie_further_apart_than_an_int32_counts():
    """A long input of many heads; what is reserved for it is never touched, but for three rows."""
    step = 1 << 30
    new = torch.empty(2 * step + 32, dtype=torch.float16).as_strided((1, 1, 3, 32), (32, 32, step, 1))
    new.copy_(torch.randn(1, 1, 3, 32))
    cache = empty_cache(FORMATS["int8"], 1, 1, 4, 32)
    reference = cache.copy()
    launch(new, *cache.tensors, int32(0), cache.spec, Config(4, 1))
    append_reference(reference, new.contiguous(), int32(0))
    assert equal(cache, reference)


@pytest.mark.parametrize("name", ["fp8-static", "int8-static"])
def test_every_float16_is_rounded_as_torch_rounds_it(name):
    """With a scale of 1 ties of both kinds occur, and numbers beyond the largest code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    new = torch.where(values.isnan(), 0.0, values).reshape(1, 1, 512, 128)
    reference = empty_cache(FORMATS[name], 1, 1, 512, 128)
    reference.scale.fill_(1.0)
    cache = reference.copy().to(device)
    launch(new.to(device), *cache.tensors, int32(0).to(device), cache.spec, Config(32, 4))
    append_reference(reference, new, int32(0))
    assert equal(cache.to("cpu"), reference)


@interpreted
def test_not_a_number_stays_visible():
    for name in ("int8", "int4-asymmetric", "fp8"):
        cache = empty_cache(FORMATS[name], 1, 1, 2, 16)
        cache.scale.zero_()
        new = torch.randn(1, 1, 2, 16)
        new[0, 0, 1, 3] = torch.nan
        launch(new, *cache.tensors, int32(0), cache.spec)
        assert cache.scale.isnan().flatten().tolist() == [False, True]


def test_configurations():
    assert default_config(8, 128) == Config(1, 1)
    assert default_config(4096, 128) == Config(8, 4)
    assert default_config(8, 512) == Config(1, 4)
    for rows in (1, 4096):
        for padded in (16, 64, 128, 256, 1024):
            found = configs(rows, padded)
            assert found[0] == default_config(rows, padded)
            assert len(set(found)) == len(found)
            assert all(config.rows & (config.rows - 1) == 0 for config in found)


def test_machine_code_of_the_common_forms():
    pytest.importorskip("triton.backends.nvidia")
    wanted = [case.name for case in cache_append_triton.ahead_of_time() if case.name.startswith("common")]
    assert len(wanted) == 3
    reports = inspect("cache.triton_append", "common", capabilities=(90,))
    assert sorted((r["name"], r["capability"]) for r in reports) == sorted((name, 90) for name in wanted)
    assert [r for r in reports if r["failures"] or r["spilled_bytes"]] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_machine_code_of_every_configuration():
    reports = inspect("cache.triton_append")
    assert len(reports) == 2 * len(list(cache_append_triton.ahead_of_time()))
    assert [r["name"] for r in reports if r["failures"]] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_codes_on_a_gpu_equal_the_reference(name, dtype):
    for width in (64, 80, 128):
        for tokens in (1, 3, 40):
            for config in (None, Config(4, 4)):
                check(name, (2, 3, tokens, width), int32(4, 2), 64, config, dtype, "cuda")


@pytest.mark.gpu
def test_a_recorded_graph_appends_wherever_the_device_says():
    cache = empty_cache(FORMATS["int8"], 1, 8, 64, 128)
    reference, cache = cache, cache.copy().to("cuda")
    new, start = torch.zeros(1, 8, 1, 128, dtype=torch.float16, device="cuda"), int32(0).cuda()
    cache.append(new, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(new, start)
    for at in (0, 5, 63):
        fresh = torch.randn(1, 8, 1, 128).half()
        new.copy_(fresh)
        start.fill_(at)
        graph.replay()
        append_reference(reference, fresh, int32(at))
    append_reference(reference, torch.zeros(1, 8, 1, 128).half(), int32(1))
    cache.append(torch.zeros_like(new), int32(1).cuda())
    assert equal(cache.to("cpu"), reference)
