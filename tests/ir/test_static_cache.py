"""Caches with scales per token, made static: the same graph as one that was quantized so from the start."""

from dataclasses import replace

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.feeding import feed
from qcompiler.ir.kv_cache import float_caches, quantize_cache
from qcompiler.ir.static_cache import cache_formats, static_caches, static_qparams
from qcompiler.passes import QuantizeKVCache
from tests.models import canonical_graph, copy_graph
from tests.passes.test_quantize_kv_cache import FORMATS
from tests.tiny_graphs import language_model


def quantized(**options):
    ids = torch.randint(61, (24, 12), generator=torch.Generator().manual_seed(0))
    graph = copy_graph(canonical_graph("llama"))
    return qc.compile(graph, [QuantizeKVCache(**options)], Calibration.from_tokens(ids.flatten(), 16, 12))


@pytest.mark.parametrize(
    "options", [{"format": "int8"}, {"format": "fp8"}, {"format": "int4"}, {"format": "int4", "rotate": True}]
)
def test_it_is_the_static_form_of_the_same_calibration(options):
    result, expected = quantized(**options), quantized(**options, scales="static")
    before = result.graph.signature
    made = static_caches(result.graph)
    assert result.graph.signature == before
    assert made.signature == expected.graph.signature
    names = [name for name in expected.graph.weight_names() if name.startswith("cache.") and "_range" not in name]
    assert len(names) >= 4
    for name in names:  # the second layer was calibrated on what the first one rounded, to other codes
        own = made.weights.read(name.replace("_scale", "_static_scale").replace("_zero_point", "_static_zero_point"))
        assert own.shape == expected.graph.weights.read(name).shape
        if name.startswith("cache.0.key"):
            assert torch.equal(own, expected.graph.weights.read(name))
        expected.graph.weights.set(name, own)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    first, second = NativeArtifact(made), NativeArtifact(expected.graph)
    assert torch.equal(first.forward(ids), second.forward(ids))
    logits, cache = first.prefill(ids[:, :5])
    step, _ = first.step(ids[:, 5:6], cache)
    assert torch.allclose(torch.cat((logits, step), 1), first.forward(ids[:, :6]), atol=1e-4)
    assert not torch.equal(first.forward(ids), NativeArtifact(result.graph).forward(ids))
    found = result.report.held_out
    assert found["static_cache_kl_divergence"] not in (None, found["kl_divergence"])
    assert found["static_cache_kl_divergence"] == pytest.approx(expected.report.held_out["kl_divergence"], rel=0.5)
    assert expected.report.held_out["static_cache_kl_divergence"] is None


def test_one_side_alone():
    made = static_caches(quantized(format="int8", keys="float").graph)
    dtypes = {port.part: port.dtype for port in made.signature.outputs if port.role == "present"}
    assert dtypes == {"key": "float32", "value": "int8"}
    ids = torch.randint(61, (1, 4))
    assert len(feed(made, ids)) == len(made.signature.inputs)


def test_nothing_to_make_static():
    graph = language_model()
    assert static_caches(graph) is None
    quantize_cache(graph, float_caches(graph)[0], CacheFormat("int8"))
    assert static_caches(graph) is None  # no range was kept


def test_scales():
    low, high = torch.tensor([[-2.0, 0.5]]), torch.tensor([[1.0, 3.0]])
    scale, zero = static_qparams(CacheFormat("int8", "static"), low, high)
    assert zero is None
    assert torch.allclose(scale, torch.tensor([[[[2.0, 3.0]]]]) / 127)
    scale, zero = static_qparams(CacheFormat("float8_e4m3fn", "static"), low, high)
    assert (zero, float(scale)) == (None, pytest.approx(6 / 448))
    scale, zero = static_qparams(CacheFormat("int4", "static", symmetric=False), low, high)
    assert torch.allclose(scale, torch.tensor([[[[3.0, 3.0]]]]) / 15)
    assert zero.flatten().tolist() == [10, 0]
    zeros = torch.zeros(1, 2)
    assert float(static_qparams(CacheFormat("int8", "static"), zeros, zeros)[0].min()) > 0


@pytest.mark.parametrize("quantizer", FORMATS.values(), ids=FORMATS.keys())
def test_the_formats_of_a_graph_are_those_that_it_was_given(quantizer):
    graph = qc.compile(language_model(), [quantizer], Calibration.from_tokens(torch.arange(24).reshape(2, 12))).graph
    width = next(port.shape[3] for port in language_model().signature.outputs if port.role == "present")

    def alike(formats):  # one group for all of a head is none
        return {replace(found, group_size=None) if found.block(width) >= width else found for found in formats}

    assert alike(cache_formats(graph)) == alike(quantizer.cache_formats())


def test_float_caches_have_no_format():
    assert cache_formats(language_model()) == []
