"""Appending to a quantized cache: the codes of the graph's own operators, bit for bit, where they belong."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qcompiler.errors import InputError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.graph import is_op
from qcompiler.ir.kv_cache import float_caches, quantize_cache
from qcompiler.lowering.kernels.cache import append as cache_append
from qcompiler.lowering.kernels.cache.append import (
    append_quantized_reference,
    append_static_reference,
    choose,
    format_of,
)
from qcompiler.lowering.kernels.launch.device import Device
from tests.lowering.kernels.cache.filled_caches import (
    FORMATS,
    KERNELS,
    Cache,
    empty_cache,
    int32,
)
from tests.tiny_graphs import language_model

ops = torch.ops.qcompiler


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def append_reference(cache, new, start):
    if cache.spec is None or cache.spec.scales == "static":
        append_static_reference(new, *cache.tensors, start, cache.dtype)
    else:
        append_quantized_reference(new, *cache.tensors, start, cache.dtype, cache.block, cache.spec.symmetric)


def equal(one: Cache, other: Cache) -> bool:
    pairs = zip(one.tensors, other.tensors, strict=True)
    return all(a is None or torch.equal(raw(a), raw(b)) for a, b in pairs)


def awkward(*shape):
    """Values of very different sizes, with rows of zeros, of the largest float16, and of halves of a step."""
    values = torch.randn(shape) * 10.0 ** torch.randint(-6, 4, (*shape[:3], 1))
    values[:, :, 0] = 0.0
    values[..., 1::7] *= -0.5
    if shape[2] > 2:
        values[:, :, 1] = torch.arange(shape[3]) / 2 - 20
        values[:, :, 2] = 65504.0
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_a_cache_holds_what_the_graph_would_append(name):
    spec = FORMATS[name]
    if spec.group_size:
        spec = CacheFormat(spec.dtype, spec.scales, 2, spec.symmetric)
    graph = language_model()
    float_cache = next(c for c in float_caches(graph) if c.part == "key")
    cache = empty_cache(spec, 1, float_cache.heads, 7, float_cache.width)
    names = (None, None)
    if spec.scales == "static":
        graph.weights.set("s", cache.scale)
        if cache.zero is not None:
            graph.weights.set("z", cache.zero)
        names = ("s", None if cache.zero is None else "z")
    quantize_cache(graph, float_cache, spec, *names)
    new = awkward(1, float_cache.heads, 7, float_cache.width)

    # Run the nodes between what is new and the appends of the graph.
    values = {float_cache.new: new}
    appended = []
    for node in graph.fx.nodes:
        if node in values or node.op not in ("call_function", "get_attr"):
            continue
        if node.op == "get_attr" and node.target in ("s", "z"):
            values[node] = graph.weights.read(node.target)
        elif is_op(node, ops.kv_append.default) and node.args[1] in values:
            appended.append(values[node.args[1]])
        elif node.op == "call_function" and node.all_input_nodes and all(n in values for n in node.all_input_nodes):
            values[node] = node.target(*torch.fx.map_arg(node.args, lambda n: values[n]))

    cache.append(new, int32(0))
    kept = [t for t in cache.tensors if t is not None and t.dim() == 4 and t.shape[2] == 7]
    assert len(kept) == len(appended) == (1 if spec.scales == "static" else 2 + (not spec.symmetric))
    for mine, graphs in zip(kept, appended, strict=True):
        assert mine.dtype == graphs.dtype
        assert torch.equal(raw(mine), raw(graphs))


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*FORMATS, "float"])
def test_cpu_writes_the_codes_of_the_reference_and_nothing_else(name, dtype, width):
    cache = empty_cache(FORMATS.get(name), 2, 3, 9, width)
    reference = cache.copy()
    garbage = cache.copy()
    new = awkward(2, 3, 4, width).clamp(-65504, 65504).to(dtype)
    cache.append(new, int32(3))
    append_reference(reference, new, int32(3))
    assert equal(cache, reference)
    assert not equal(cache, garbage)
    for mine, before in zip(cache.tensors, garbage.tensors, strict=True):
        if mine is not None and mine.dim() == 4 and mine.shape[2] == 9:
            for rows in (slice(0, 3), slice(7, 9)):
                assert torch.equal(raw(mine[:, :, rows]), raw(before[:, :, rows]))


def test_sequences_of_a_batch_may_stand_at_different_places():
    cache = empty_cache(FORMATS["int4-g16-asymmetric"], 2, 1, 6, 32)
    reference, apart = cache.copy(), cache.copy()
    new = torch.randn(2, 1, 2, 32)
    cache.append(new, int32(4, 1))
    append_reference(reference, new, int32(4, 1))
    assert equal(cache, reference)
    for i, at in enumerate((4, 1)):
        row = Cache(apart.spec, apart.codes[i : i + 1], apart.scale[i : i + 1], apart.zero[i : i + 1], apart.block)
        row.append(new[i : i + 1], int32(at))
    assert equal(cache, apart)


def test_what_is_appended_may_be_a_view_and_the_cache_a_part_of_one():
    store = empty_cache(FORMATS["int8"], 2, 4, 8, 32)
    part = Cache(store.spec, store.codes[:, 1:3], store.scale[:, 1:3], None, 32)
    plain = empty_cache(FORMATS["int8"], 2, 2, 8, 32)
    new = torch.randn(2, 3, 2, 32).transpose(1, 2)
    part.append(new, int32(5))
    plain.append(new.contiguous(), int32(5))
    assert torch.equal(part.codes[:, :, 5:], plain.codes[:, :, 5:])
    assert torch.equal(part.scale[:, :, 5:], plain.scale[:, :, 5:])


def test_no_tokens_change_nothing():
    cache = empty_cache(FORMATS["int8"], 1, 2, 4, 16)
    before = cache.copy()
    cache.append(torch.randn(1, 2, 0, 16), int32(4))
    assert equal(cache, before)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"new": torch.randn(1, 2, 4)}, "new"),
        ({"new": torch.ones(1, 2, 1, 32, dtype=torch.int32)}, "new"),
        ({"new": torch.randn(1, 2, 1, 30)}, "block"),
        ({"new": torch.randn(1, 2, 5, 32)}, "new"),
        ({"new": torch.randn(1, 2, 32, 2).transpose(2, 3)}, "new"),
        ({"codes": torch.zeros(1, 2, 4, 32, dtype=torch.uint8)}, "codes"),
        ({"codes": torch.zeros(1, 3, 4, 32, dtype=torch.int8)}, "codes"),
        ({"scale": None}, "scale"),
        ({"scale": torch.ones(1, 2, 4, 2)}, "scale"),
        ({"scale": torch.ones(1, 2, 3, 2, dtype=torch.float16)}, "scale"),
        ({"zero_point": torch.zeros(1, 2, 4, 2, dtype=torch.uint8)}, "zero_point"),
        ({"symmetric": False}, "codes"),
        ({"start": torch.zeros(1, dtype=torch.int64)}, "start"),
        ({"start": int32(0, 0, 0)}, "start"),
        ({"start": int32(4)}, "start"),
        ({"start": int32(-1)}, "start"),
        ({"dtype": "int3"}, "dtype"),
        ({"dtype": "float16"}, "dtype"),
        ({"block": 7}, "block"),
        ({"start": torch.zeros(1, dtype=torch.int32, device="meta")}, "start"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, where):
    arguments = {
        "new": torch.randn(1, 2, 1, 32),
        "codes": torch.zeros(1, 2, 4, 32, dtype=torch.int8),
        "scale": torch.ones(1, 2, 4, 2, dtype=torch.float16),
        "zero_point": None,
        "start": int32(0),
        "dtype": "int8",
        "block": 16,
        "symmetric": True,
    } | change
    with pytest.raises(InputError) as caught:
        cache_append._append_quantized_cpu(**arguments)
    assert caught.value.where == where


def test_stored_scales_that_do_not_fit_are_refused():
    codes, new = torch.zeros(1, 2, 4, 32, dtype=torch.int8), torch.randn(1, 2, 1, 32)
    for scale in (torch.tensor(0.1), torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 32, dtype=torch.float16)):
        with pytest.raises(InputError, match="does not fit"):
            KERNELS.append_static(new, codes, scale, None, int32(0), "int8")
    with pytest.raises(InputError, match="without a scale"):
        KERNELS.append_static(new, codes, None, None, int32(0), "int8")
    with pytest.raises(InputError, match="zero points"):
        KERNELS.append_quantized(
            new, codes.view(torch.uint8), torch.ones(1, 2, 4, 1, dtype=torch.float16), None, int32(0), "int8", 32, False
        )


def test_it_is_traced_without_data():
    cache = empty_cache(FORMATS["int8"], 1, 2, 4, 32)

    def step(new):
        cache.append(new, int32(0))
        return new

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step(torch.empty(1, 2, 1, 32)).shape == (1, 2, 1, 32)


def test_what_is_chosen_for_a_device():
    hopper, turing = Device("cuda", "", 90, True), Device("cuda", "", 75, True)
    assert choose(CacheFormat("int8"), 128, Device("cpu")).implementation == "cpu"
    assert choose(CacheFormat("float8_e4m3fn"), 128, Device("cuda", "", 80, True)).implementation == "triton"
    assert choose(None, 128, hopper).implementation == "triton"
    odd = choose(CacheFormat("int4", group_size=5), 80, hopper)
    assert (odd.implementation, "5 channels" in odd.reason) == ("reference", True)
    assert "75" in choose(CacheFormat("int8"), 128, turing).reason
    assert "Triton" in choose(CacheFormat("int8"), 128, Device("cuda", "", 90, False)).reason
    assert choose(CacheFormat("int8"), 128, Device("xpu")).implementation == "reference"


def test_formats_by_name():
    assert format_of("int4", static=False, block=16, symmetric=False) == CacheFormat("int4", "per_token", 16, False)
    assert format_of("int8", static=True, block=None, symmetric=True) == CacheFormat("int8", "static")
    assert format_of("bfloat16", static=True, block=None, symmetric=True) is None
    with pytest.raises(InputError, match="unknown format"):
        format_of("uint8", static=False, block=16, symmetric=True)


@pytest.mark.parametrize("name", ["int8", "int4-asymmetric", "int8-static"])
def test_tracing_sees_what_is_written(name):
    cache = empty_cache(FORMATS[name], 2, 2, 12, 32)
    for tensor in (cache.scale, cache.zero):
        if tensor is not None:
            tensor.fill_(1)  # what is not a number differs from itself
    new = torch.randn(2, 3, 2, 32).transpose(1, 2)
    if cache.spec.scales == "static":
        torch.library.opcheck(KERNELS.append_static.default, (new, *cache.tensors, int32(4), cache.dtype))
    else:
        form = (cache.dtype, cache.block, cache.spec.symmetric)
        torch.library.opcheck(KERNELS.append_quantized.default, (new, *cache.tensors, int32(4), *form))
