"""`KernelModel`: an artifact whose caches grow in place, that `torch.compile` takes."""

import pickle

import pytest
import torch
from torch import nn

import qcompiler as qc
from qcompiler.artifacts.generation import stream_tokens
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.errors import InputError, TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.kernels.module import search
from qcompiler.lowering.kernels.module.model import KernelModel, choose_dtype, lower
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache, SqueezeLLM
from qcompiler.protocol.artifact import Artifact
from tests.tiny_graphs import chain, language_model

CPU = torch.device("cpu")
IDS = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
RECIPES = {
    "w4a16": [Assign("w4a16-g32"), RTN()],
    "w8a8-dynamic+kv-int8": [Assign("w8a8-dynamic"), QuantizeKVCache("int8"), RTN(), InsertQDQ(observer=None)],
    "fp8+kv-int4": [Assign("fp8"), QuantizeKVCache("int4", rotate=True), RTN(), InsertQDQ(observer="minmax")],
    "lut": [Assign("w3a16-lut"), SqueezeLLM()],
}


def graph_of(name: str) -> Graph:
    calibration = qc.Calibration.from_tokens(torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(2)))
    return qc.compile(language_model(width=32), RECIPES[name], calibration).graph


def test_it_is_an_artifact_and_a_module():
    graph = graph_of("w8a8-dynamic+kv-int8")
    model = lower(graph, device=CPU)
    native = NativeArtifact(graph)
    assert isinstance(model, Artifact)
    assert isinstance(model, nn.Module)
    for name in ("vocab_size", "max_positions", "has_cache", "has_quantized_cache", "cache_bytes_per_token", "path"):
        assert getattr(model, name) == getattr(native, name), name
    assert model.stored_bytes() == native.stored_bytes()
    assert model.bits_per_weight() == native.bits_per_weight()
    assert model(IDS).dtype == torch.float32
    assert not model(IDS).requires_grad


def test_the_report_says_what_runs_and_why():
    report = lower(graph_of("w8a8-dynamic+kv-int8"), device=CPU).report
    assert (report["device"], report["dtype"], report["fused_norms"]) == ("cpu", "bfloat16", 4)
    first, head = report["sites"][0], report["sites"][-1]
    assert (first["site"], first["implementation"]) == ("0.q", "cpu")
    assert first["activation"] == "int8 per_token symmetric dynamic"
    assert (head["site"], head["implementation"], head["weight"]) == ("head", "float", None)
    assert [cache["layer"] for cache in report["caches"]] == [0, 1]
    assert {cache["keys"] for cache in report["caches"]} == {"int8 per token symmetric"}
    in_float32 = lower(graph_of("w4a16"), device=CPU, dtype="float32").report
    assert {site["implementation"] for site in in_float32["sites"]} == {"reference", "float"}
    assert all("bfloat16" in site["reason"] for site in in_float32["sites"][:-1])


@pytest.mark.parametrize("name", RECIPES)
def test_caches_in_pieces_give_what_the_whole_gives(name):
    model = lower(graph_of(name), device=CPU, dtype="float32")
    whole = model.forward(IDS)
    first, cache = model.prefill(IDS[:, :3])
    second, cache = model.step(IDS[:, 3:8], cache)
    pieces = [first, second]
    for position in range(8, 12):
        logits, cache = model.step(IDS[:, position : position + 1], cache)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-3)
    assert cache.length == 12
    assert cache.start.tolist() == [12]


def test_buffers_double_when_they_are_full():
    model = lower(graph_of("fp8+kv-int4"), device=CPU, dtype="float32")
    _, cache = model.prefill(IDS[:, :4])
    assert cache.capacity == 256
    assert {t.shape[2] for t in cache.tensors} == {256}
    small = model.new_cache(2, 4)
    _, small = model.step(IDS[:, :4], small)
    before = [t.clone() for t in small.tensors]
    logits, small = model.step(IDS[:, 4:5], small)
    assert small.capacity == 256
    expected, cache = model.step(IDS[:, 4:5], cache)
    assert torch.equal(logits, expected)
    for old, new, other in zip(before, small.tensors, cache.tensors, strict=True):
        assert torch.equal(new[:, :, :4], old)
        assert torch.equal(new[:, :, :5], other[:, :, :5])
    long = model.new_cache(2, 300)
    model._grow(long, 301)
    assert (long.capacity, long.tensors[0].shape[2]) == (600, 600)


def test_generation_equals_that_of_the_native_artifact():
    graph = graph_of("w4a16")
    model = lower(graph, device=CPU, dtype="float32")
    expected = list(stream_tokens(NativeArtifact(graph), IDS[0, :4], max_new_tokens=20))
    assert list(stream_tokens(model, IDS[0, :4], max_new_tokens=20)) == expected
    with pytest.raises(InputError, match="tokenizer"):
        model.generate("Once")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("w4a16", "eager"),
        *(pytest.param(name, "aot_eager", marks=() if "+" in name else pytest.mark.slow) for name in RECIPES),
    ],
)
def test_torch_compile_takes_it_whole(name, backend):
    model = lower(graph_of(name), device=CPU)
    expected_cache = model.new_cache(2, 16)
    expected = model.module(IDS, expected_cache.start, 0, *expected_cache.tensors)
    torch._dynamo.reset()
    cache = model.new_cache(2, 16)
    compiled = torch.compile(model.module, backend=backend, fullgraph=True)
    found = compiled(IDS, cache.start, 0, *cache.tensors)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(cache.tensors, expected_cache.tensors, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(IDS), model(IDS))


def test_dtypes():
    graph = graph_of("w4a16")
    assert choose_dtype(graph, CPU, None) == torch.bfloat16
    assert choose_dtype(graph, CPU, "float32") == torch.float32
    cuda = torch.device("cuda")
    assert choose_dtype(graph, cuda, None) == torch.float16
    assert choose_dtype(graph, cuda, "bfloat16") == torch.bfloat16
    assert choose_dtype(language_model(dtype=torch.bfloat16), cuda, None) == torch.bfloat16
    for name in ("float64", "float16"):
        with pytest.raises(TargetError, match="dtype"):
            choose_dtype(graph, CPU, name)


def test_what_is_no_language_model():
    with pytest.raises(InputError, match="does not predict"):
        lower(chain(), device=CPU)


def test_a_text_longer_than_the_graph_takes():
    graph = graph_of("w4a16")
    graph.provenance["limits"] = {"sequence": 4}
    model = lower(graph, device=CPU)
    with pytest.raises(InputError, match="longer"):
        model.forward(IDS)
    assert model.forward(IDS[:, :4]).shape == (2, 4, 32)


def test_on_a_cpu_there_is_nothing_to_tune():
    assert "nothing to tune" in lower(graph_of("w4a16"), device=CPU, tune=True).report["notes"][1]


def test_weights_are_buffers_that_can_be_saved():
    graph = graph_of("lut")
    model = lower(graph, device=CPU)
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_buffers()}
    assert {"codes", "table"} <= names
    assert not list(model.parameters())
    again = pickle.loads(pickle.dumps(model.module))
    cache = model.new_cache(2, 12)
    assert torch.equal(again(IDS, cache.start, 0, *cache.tensors)[0], model(IDS))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_on_cuda(name, tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    graph = graph_of(name)
    native = NativeArtifact(graph)
    for dtype in ("float16", "bfloat16"):
        model = KernelModel(graph, torch.device("cuda"), getattr(torch, dtype))
        expected, found = native.forward(IDS), model.forward(IDS).cpu()
        assert (found - expected).abs().max() < 0.2 * expected.abs().max()
        first, cache = model.prefill(IDS[:, :4])
        rest, _ = model.step(IDS[:, 4:], cache)
        assert (torch.cat((first, rest), 1).cpu() - found).abs().max() < 0.2 * expected.abs().max()
    assert all(site["implementation"] in ("triton", "library", "float") for site in model.report["sites"])
    before = model.forward(IDS)
    assert search.tune(model, rows=(1, 4))
    assert (model.forward(IDS) - before).abs().max() < 0.2 * before.abs().max()
