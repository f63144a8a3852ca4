import dataclasses

import pytest
import torch

from qcompiler.artifacts.calibration import Calibration
from qcompiler.errors import CalibrationError, PipelineError
from qcompiler.passes import RTN, Assign, Fisher, InsertQDQ, SmoothQuant, SqueezeLLM
from qcompiler.passes.quantize_kv_cache import QuantizeKVCache
from qcompiler.protocol.pass_base import (
    FISHER,
    WEIGHTS_QUANTIZED,
    CalibrationRun,
    Effect,
    Pass,
    PassContext,
    PassResult,
)
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.reporting.report import CompileReport
from qcompiler.sweep.compiling import compile_graph
from tests.tiny_graphs import language_model, token_batches

CPU = torch.device("cpu")


def run_fisher(graph, tmp_path):
    run = CalibrationRun(token_batches(graph), tmp_path, 1 << 20)
    return Fisher().run(graph, PassContext(graph, CPU, 0, calibration=run))


def test_sites_that_will_be_quantized_are_measured(tmp_path):
    graph = language_model()
    Assign("w3a16-lut", overrides={"0.*": None}).run(graph, PassContext(graph, CPU, 0))
    result = run_fisher(graph, tmp_path)
    assert result == PassResult(modified=False)
    expected = {site.name for site in graph.sites() if site.name.startswith("1.")}
    assert set(graph.fisher.names()) == expected
    for site in graph.sites():
        if site.name in expected:
            assert graph.fisher.info(site.name).shape == (site.out_features, site.in_features)


def test_all_sites_where_no_scheme_is_assigned_yet(tmp_path):
    graph = language_model()
    run_fisher(graph, tmp_path)
    assert set(graph.fisher.names()) == {site.name for site in graph.sites()}


def test_without_calibration(tmp_path):
    graph = language_model()
    with pytest.raises(CalibrationError, match="calibration data"):
        Fisher().run(graph, PassContext(graph, CPU, 0))
    with pytest.raises(CalibrationError, match="calibration data"):
        Fisher().run(graph, PassContext(graph, CPU, 0, calibration=CalibrationRun([], tmp_path, 1)))


def test_place_in_a_pipeline():
    assert Fisher().is_calibrated
    assert not Fisher().works_in_sweep
    assert Pipeline([Fisher(), Assign("w4a16"), RTN()]).is_calibrated
    with pytest.raises(PipelineError) as caught:
        Pipeline([Assign("w8a8"), Fisher(), SmoothQuant(), SqueezeLLM(sensitivity="fisher")])
    assert "needs 'Fisher information" in str(caught.value)
    assert "SmoothQuant (position 2)" in str(caught.value)
    for rounding in (RTN(), InsertQDQ(), QuantizeKVCache()):
        with pytest.raises(PipelineError, match="cannot run in this order"):
            Pipeline([Assign("w8a8"), rounding, Fisher()])
    for leaves_weights in (InsertQDQ(), QuantizeKVCache()):
        Pipeline([Assign("w8a8"), Fisher(), leaves_weights, SqueezeLLM(sensitivity="fisher")])


@dataclasses.dataclass(frozen=True)
class Peek(Pass):
    """Remembers what was measured."""

    effect = Effect.ANALYSIS
    requires = frozenset({FISHER})

    def run(self, graph, context):
        seen.append((graph.fisher.names(), [graph.fisher.read(name) for name in graph.fisher.names()]))
        return PassResult(modified=False)


seen: list = []


def test_in_a_compilation(tmp_path):
    graph, report = language_model(), CompileReport()
    ids = torch.cat([batch[graph.inputs[0]] for batch in token_batches(graph)])
    calibration = Calibration.from_tokens(ids)
    steps = []
    compile_graph(
        graph,
        Pipeline([Fisher(), Peek(), Assign("w4a16"), RTN()]),
        calibration,
        report=report,
        device=CPU,
        work_dir=tmp_path,
        progress=lambda *step: steps.append(step),
    )
    names, values = seen.pop()
    assert len(names) == len(graph.sites())
    other = language_model()
    run_fisher(other, tmp_path / "other")
    for name, value in zip(names, values, strict=True):
        torch.testing.assert_close(value, other.fisher.read(name))
    assert report.calibration["samples"] == 5
    assert report.sweeps == 2
    assert any("backward" in text for _, _, text in steps)
    assert len(graph.fisher) == 0
    assert not list(tmp_path.glob("*/measured"))


def test_it_tells_the_truth_about_itself():
    assert WEIGHTS_QUANTIZED not in Fisher.establishes
    assert Fisher.effect is Effect.ANALYSIS
