"""Exported language models: the same graph, layers and codes as from transformers."""

from collections import Counter

import pytest
import torch

import qcompiler as qc
from qcompiler.frontend.onnx import capture_onnx
from tests.frontend.onnx.exported import by_onnxruntime, computed, exported
from tests.models import canonical_graph

FAMILIES = ("llama", "gpt2", "bert")


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def graphs(family):
    """As captured from ONNX, and from transformers."""
    return capture_onnx(exported(family)), canonical_graph(family)


def canonical(graph):
    return Counter(str(node.target) for node in graph.fx.nodes if str(node.target).startswith("qcompiler."))


def check_same(ours, theirs):
    assert canonical(ours) == canonical(theirs)
    assert ours.unrecognized == []
    shapes = [[(site.out_features, site.in_features, len(site.nodes)) for site in g.sites()] for g in (ours, theirs)]
    assert shapes[0] == shapes[1]
    for port, wanted in zip(ours.signature.inputs, theirs.signature.inputs, strict=True):
        assert port == wanted
    for port, wanted in zip(ours.signature.outputs, theirs.signature.outputs, strict=True):
        assert (port.name, port.role, port.shape, port.part) == (wanted.name, wanted.role, wanted.shape, wanted.part)


def test_the_graph_is_that_of_the_transformers_model(graphs):
    check_same(*graphs)


def test_sites_are_called_by_their_modules(graphs):
    ours, theirs = ([site.name for site in graph.sites()] for graph in graphs)
    assert ours[:-1] == [f"model.{name}" for name in theirs][:-1]


def test_it_computes_what_onnxruntime_computes(family, graphs):
    ours, _ = graphs
    sizes = {"batch": 2, "sequence": 4, "past_sequence": 6, "past_sequence + sequence": 10}
    inputs = {}
    for port in ours.signature.inputs:
        shape = [sizes.get(size, size) for size in port.shape]
        if port.role == "past":
            inputs[port.name] = torch.randn(shape)
        elif port.role == "positions":
            inputs[port.name] = torch.arange(6, 10).repeat(2, 1)
        else:
            inputs[port.name] = torch.randint(0, 50, shape) if port.role == "ids" else torch.ones(shape).long()
        if port.name == "token_type_ids":
            inputs[port.name] = torch.zeros(shape).long()
    inputs["attention_mask"][1, :2] = 0
    expected = by_onnxruntime(exported(family), inputs)
    for got, wanted in zip(computed(ours, list(inputs.values())), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w8a8-smoothquant"])
def test_codes_and_regions_are_those_of_the_transformers_model(recipe, graphs):
    tokens = qc.Calibration.from_tokens(torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(0)))
    ours, theirs = (qc.compile(graph, recipe, tokens) for graph in graphs)
    regions = [
        [(region["consumers"], region["producers"]) for region in r.report.to_dict()["regions"]] for r in (ours, theirs)
    ]
    assert len(regions[0]) == len(regions[1])
    count = 0
    for mine, other in zip(ours.graph.sites(), theirs.graph.sites(), strict=True):
        for part in ("codes", "scale", "zero_point"):
            name, wanted = f"{mine.weight}_{part}", f"{other.weight}_{part}"
            assert (name in ours.graph.weights) == (wanted in theirs.graph.weights)
            if name not in ours.graph.weights:
                continue
            a, b = ours.graph.weights.read(name), theirs.graph.weights.read(wanted)
            if part == "codes":  # the last bit of a sum may tip a code to the next
                assert (a.float() - b.float()).abs().max() <= 1, name
                assert (a != b).float().mean() < (1e-2 if recipe.startswith("w4") else 0.1), name
                count += 1
            else:
                torch.testing.assert_close(a, b, rtol=1e-3 if recipe.startswith("w4") else 1e-2, atol=0)
    assert count >= 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_other_exporter_gives_the_same(kind):
    pytest.importorskip("onnxscript")
    check_same(capture_onnx(exported(kind, dynamo=True)), canonical_graph(kind))


def test_a_path_may_be_that_of_a_directory(monkeypatch):
    asked = []
    monkeypatch.setattr("qcompiler.frontend.capture.capture_onnx", lambda file: asked.append(file) or "a graph")
    path = exported("llama")
    assert qc.capture(path.parent) == qc.capture(path) == "a graph"
    assert asked == [path, path]
