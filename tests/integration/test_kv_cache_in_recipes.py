"""Quantized caches among other passes, and where they are refused."""

import math

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts.native import NativeArtifact, load_native, save_native
from qcompiler.errors import PipelineError, RecipeError, TargetError, UnsupportedModelError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.feeding import feed
from qcompiler.ir.kv_cache import cache_rounding, float_caches
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache, recipe
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    Tap,
)
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.statistics import CrossGram
from qcompiler.protocol.target import Support, Target
from qcompiler.sweep.streaming import sweep
from tests.models import canonical_graph, copy_graph
from tests.passes.test_quantize_kv_cache import CPU, FORMATS, cached, each_format, quantized, tokens
from tests.tiny_graphs import interpret, language_model, residual_mlp, token_batches

# --- in the sweep -----------------------------------------------------------------------------------------------------


class Watch(Pass):
    """Keeps the moments between what each site reads and what the reference has there."""

    effect = Effect.ANALYSIS
    seen: dict[str, Tensor]

    def waves(self, segment, graph):
        return segment.waves()

    def statistics(self, wave, graph):
        return [Tap(value, CrossGram) for site in wave for value in site.inputs]

    def rewrite(self, wave, statistics, context):
        for site in wave:
            self.seen[site.name] = statistics[Tap(site.inputs[0], CrossGram)].result()
        return PassResult(modified=False)


@pytest.mark.parametrize("ahead", [False, True], ids=["first", "behind another"])
@each_format
def test_what_follows_sees_rounded_keys_and_the_reference_does_not(quantizer, ahead, tmp_path):
    """Also where a pass ahead has run the segment to its end, and has gathered what is no longer true."""
    graph = language_model()
    batches = token_batches(graph)
    plain = copy_graph(graph)
    before, watch = Watch(), Watch()
    for item in (before, watch):
        object.__setattr__(item, "seen", {})
    sweep(
        graph, [*([before] if ahead else []), quantizer, watch], batches, PassContext(graph, CPU, 0), work_dir=tmp_path
    )
    wanted = {site.name: torch.zeros_like(watch.seen[site.name]) for site in graph.sites()}
    for batch in batches:
        exact = interpret(plain, batch)
        named = {node.name: value for node, value in batch.items()}
        rounded = interpret(
            graph, {**{n: named[n.name] for n in graph.inputs if n.name in named}, **_empty(graph, batch)}
        )
        for site, reference in zip(graph.sites(), plain.sites(), strict=True):
            x, y = rounded[site.inputs[0].name], exact[reference.inputs[0].name]
            wanted[site.name] += y.flatten(0, 1).T @ x.flatten(0, 1)
    for name, moments in wanted.items():
        torch.testing.assert_close(watch.seen[name], moments, rtol=1e-4, atol=1e-4 * float(moments.abs().max()))


class WatchOne(Watch):
    """Stops where attention has been run."""

    def waves(self, segment, graph):
        return [[site for site in segment.sites if site.name.endswith(".o")]]


def test_attention_is_run_anew_where_it_has_been_run(tmp_path):
    """The values are at hand still, as something behind attention reads them, too."""
    graph = language_model(layers=1, kv_heads=4)
    _, values = float_caches(graph)
    (output,) = (node for site in graph.sites() if site.name == "0.o" for node in site.nodes)
    (residual,) = output.users
    with graph.fx.inserting_after(residual):
        joined = graph.fx.call_function(torch.ops.aten.add.Tensor, (residual, residual))
    residual.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not joined)
    with graph.fx.inserting_before(joined):
        flat = graph.fx.call_function(torch.ops.aten.transpose.int, (values.new, 1, 2))
        flat = graph.fx.call_function(torch.ops.aten.flatten.using_ints, (flat, 2, 3))
    joined.args = (residual, flat)
    batches = token_batches(graph)
    passes = [WatchOne(), QuantizeKVCache("int4", keys="float"), WatchOne()]
    for item in (passes[0], passes[2]):
        object.__setattr__(item, "seen", {})
    sweep(graph, passes, batches, PassContext(graph, CPU, 0), work_dir=tmp_path)
    plain, rounded = passes[0].seen["0.o"], passes[2].seen["0.o"]
    assert 20 < -20 * math.log10(float((plain - rounded).norm() / plain.norm())) < 60


def _empty(graph, batch):
    rows = next(iter(batch.values())).shape[0]
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    given = {node.name for node in batch}
    return {node: value for node, value in feed(graph, ids).items() if node.name not in given}


def test_passing_through_leaves_the_float_model():
    graph = language_model()
    ids = tokens(graph, 2, 7)
    exact = NativeArtifact(copy_graph(graph)).forward(ids)
    for quantizer in FORMATS.values():
        copy = copy_graph(graph)
        copy = quantized(copy, quantizer).graph
        assert cache_rounding(copy.fx.nodes)
        unrounded = NativeArtifact(copy, round_activations=False)
        torch.testing.assert_close(unrounded.forward(ids), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        assert not torch.allclose(NativeArtifact(copy).forward(ids), exact, rtol=1e-4)


@pytest.mark.parametrize("name", ["w4a16-gptq+kv-int8", "w4a16-awq-gptq+kv-int4", "w8a8-smoothquant+kv-fp8", "kv-int8"])
def test_recipes_compose(name):
    graph = copy_graph(canonical_graph("llama"))
    result = quantized(graph, *recipe(name))
    graph = result.graph
    assert graph.signature.has_quantized_cache
    weights = [site for site in result.report.sites if site.method in ("gptq", "rtn")]
    assert bool(weights) is (name != "kv-int8")
    ids = tokens(graph, 2, 6)
    artifact = result.artifact()
    torch.testing.assert_close(cached(artifact, ids), artifact.forward(ids), rtol=0, atol=0.05)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3"}, "unknown format"),
        ({"format": "float"}, "unknown format"),
        ({"keys": "int5"}, "unknown format"),
        ({"scales": "per_head"}, "QuantizeKVCache.scales"),
        ({"group_size": 0}, "out of range"),
        ({"group_size": 8, "scales": "static"}, "scales per token"),
        ({"keys": "float", "values": "float"}, "quantizes nothing"),
        ({"keys": "float", "rotate": True}, "not rotated"),
        ({"format": "fp8", "symmetric": False}, "no zero point"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(RecipeError, match=message):
        QuantizeKVCache(**options)


def test_models_it_does_not_fit():
    with pytest.raises(UnsupportedModelError, match="no cache to quantize"):
        qc.compile(residual_mlp(), [QuantizeKVCache()], [(torch.zeros(2, 8),)])
    with pytest.raises(UnsupportedModelError, match="no cache to quantize"):
        quantized(copy_graph(canonical_graph("bert")), QuantizeKVCache())
    with pytest.raises(RecipeError, match="have to divide a head"):
        quantized(language_model(), QuantizeKVCache(group_size=3))
    with pytest.raises(RecipeError, match="share a byte"):
        quantized(language_model(width=20), QuantizeKVCache("int4"))
    with pytest.raises(RecipeError, match="no Hadamard matrix"):
        quantized(language_model(width=24), QuantizeKVCache("int4", rotate=True))
    with pytest.raises(PipelineError, match="a float cache"):
        Pipeline([QuantizeKVCache(), QuantizeKVCache("fp8")])
    graph = language_model()
    graph = quantized(graph, QuantizeKVCache()).graph
    with pytest.raises(UnsupportedModelError, match="no cache to quantize") as caught:
        quantized(graph, QuantizeKVCache())
    assert "a quantized cache" in str(caught.value)


def test_refused_before_calibration(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("calibration began")

    monkeypatch.setattr("qcompiler.sweep.compiling.calibration_batches", never)
    with pytest.raises(RecipeError, match="have to divide a head"):
        qc.compile(language_model(), [QuantizeKVCache(group_size=3)])

    class Picky(Target):
        name = "picky"

        def supports(self, scheme, width):
            return Support("runs")

        def supports_cache(self, spec):
            return Support("refused", "no int4") if spec.bits == 4 else Support("runs")

        def lower(self, graph, directory):
            raise AssertionError

    with pytest.raises(TargetError, match="does not take a cache") as caught:
        qc.compile(language_model(), [QuantizeKVCache("int8", values="int4")], targets=[Picky()])
    assert "no int4" in str(caught.value)


def test_a_cache_that_is_not_recognized_is_named():
    graph = language_model()
    first = float_caches(graph)[0]
    with graph.fx.inserting_before(first.append):  # as if something else read the past keys
        other = graph.fx.call_function(torch.ops.aten.neg.default, (first.past,))
        other = graph.fx.call_function(torch.ops.aten.neg.default, (other,))
    first.append.update_arg(0, other)
    result = quantized(graph, QuantizeKVCache("int8"))
    graph, report = result.graph, result.report
    assert [skip.site for skip in report.skipped if skip.site.startswith("cache")] == ["cache.0.key"]
    assert len(report.sites) == 3


def test_formats_as_text():
    assert str(CacheFormat("int4", "per_token", 16, False)) == "int4 per token g16 asymmetric"
    assert str(CacheFormat("float8_e4m3fn", "static")) == "float8_e4m3fn static per tensor"
    assert math.isclose(CacheFormat("int4", "per_token", 16, False).bytes_per_token(2, 64), 2 * (32 + 4 * 3))


def test_activations_and_the_cache_together(tmp_path):
    graph = language_model(width=32)
    result = quantized(graph, Assign("w8a8"), QuantizeKVCache("int8"), RTN(), InsertQDQ())
    graph = result.graph
    save_native(graph, tmp_path / "out", {}, result.report.to_dict())
    loaded, _, _ = load_native(tmp_path / "out")
    ids = tokens(graph, 1, 5)
    assert torch.equal(NativeArtifact(loaded).forward(ids), result.artifact().forward(ids))
