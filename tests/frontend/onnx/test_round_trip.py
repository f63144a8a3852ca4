"""What is written as ONNX comes back with the same codes, scales and schemes."""

from collections import Counter

import pytest
import torch

import qcompiler as qc
from qcompiler.api import CompileResult, open_artifact
from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.onnx import capture_onnx
from qcompiler.lowering.onnx import OnnxArtifact, lower
from qcompiler.numerics import Scheme
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ
from qcompiler.protocol.verify import verify_graph
from tests.models import canonical_graph

RECIPES = {
    "w4a16": ((Assign("w4a16-g16"), RTN()), 21),
    "w4a16-asym": ((Assign("w4a16-g16-asym"), GPTQ()), 23),
    "w8a16": ((Assign("w8a16"), RTN()), 21),
    "w8a8": ((Assign("w8a8"), RTN(), InsertQDQ()), 21),
    "fp8": ((Assign("fp8"), RTN(), InsertQDQ(observer="minmax")), 21),
}


def kinds(graph):
    found = Counter(str(node.target) for node in graph.fx.nodes if node.op == "call_function")
    found["turn"] = found.pop("aten.permute.default", 0) + found.pop("aten.transpose.int", 0)
    return found


@pytest.fixture(
    scope="module",
    params=[name if name in ("w4a16-asym", "w8a8") else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def pair(request, tmp_path_factory):
    """A compiled graph, and what came back of the file that it was written to."""
    recipe, opset = RECIPES[request.param]
    tokens = qc.Calibration.from_tokens(torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0)))
    compiled = qc.compile(canonical_graph("llama"), recipe, tokens).graph
    folder = tmp_path_factory.mktemp("onnx") / "out"
    lower(compiled, folder, opset=opset)
    return compiled, folder / "model.onnx", capture_onnx(folder / "model.onnx")


def test_codes_scales_and_schemes_come_back(pair):
    compiled, _, back = pair
    assert [site.name for site in back.sites()] == [site.name for site in compiled.sites()]
    for site in compiled.sites():
        for part in ("_codes", "_scale", "_zero_point"):
            name = site.weight + part
            assert (name in back.weights) == (name in compiled.weights), name
            if name in compiled.weights:
                assert torch.equal(back.weights.read(name), compiled.weights.read(name)), name
        assert str(back.schemes.get(site.name, Scheme())) == str(compiled.schemes[site.name])
    verify_graph(back)


def test_the_graph_is_the_one_that_was_written(pair):
    compiled, _, back = pair
    assert kinds(back) == kinds(compiled)
    assert back.unrecognized == []


def test_it_is_loaded_as_what_was_compiled(pair, monkeypatch):
    _, path, back = pair
    monkeypatch.setattr("qcompiler.artifacts.result.capture_checkpoint", lambda *_, **__: back)
    loaded = qc.load(path)
    assert isinstance(loaded, CompileResult)
    assert [site.name for site in loaded.graph.sites()] == [site.name for site in back.sites()]
    assert isinstance(open_artifact(path), OnnxArtifact)


def test_what_has_codes_is_not_compiled_again(pair):
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        qc.compile(pair[1], "w4a16-rtn")


def test_a_cache_of_int4_runs_and_is_refused_by_name(tmp_path):
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    result = qc.compile(canonical_graph("llama"), "kv-int4", qc.Calibration.from_tokens(ids))
    qc.lower(result, "onnx", tmp_path / "onnx", verify=False)
    again = qc.load(tmp_path / "onnx" / "model.onnx")
    expected = result.artifact().forward(ids)
    found = again.artifact().forward(ids)
    assert float((found - expected).norm() / expected.norm()) < 0.05  # a tie falls otherwise
    with pytest.raises(UnsupportedModelError, match="packed by operators"):
        qc.lower(again, "onnx", tmp_path / "again")
