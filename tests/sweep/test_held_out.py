"""What compiling did, measured on the tokens it kept: against a naive computation, and what is said of it."""

import math

import pytest
import torch

from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.evaluation import evaluate
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.errors import ArtifactError
from qcompiler.passes import GPTQ, RTN, Assign, Fisher, InsertQDQ
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.reporting.report import CompileReport
from qcompiler.sweep.compiling import compile_graph
from qcompiler.sweep.held_out import HeldOutCheck, precision_note
from tests.models import VOCABULARY, canonical_graph, copy_graph
from tests.tiny_graphs import residual_mlp

CPU = torch.device("cpu")


def llama():
    return copy_graph(canonical_graph("llama"))


def compiled(graph, bits, rows):
    report = CompileReport()
    calibration = Calibration.from_tokens(rows.flatten(), samples=16, length=rows.shape[1])
    result = compile_graph(graph, Pipeline([GPTQ(bits=bits, group_size=16)]), calibration, report=report, device=CPU)
    return result, report


def test_against_a_naive_computation():
    rows = torch.randint(VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(0))
    original = NativeArtifact(llama())
    result, report = compiled(llama(), 3, rows)
    ids = result.held_out[:1]
    p = original.forward(ids).double().log_softmax(-1)[:, :-1]
    q = result.artifact().forward(ids).double().log_softmax(-1)[:, :-1]
    targets = ids[:, 1:, None]
    found = report.held_out
    assert found["tokens"] == ids.shape[1] - 1
    assert found["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-float(q.gather(-1, targets).mean())), rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(math.exp(-float(p.gather(-1, targets).mean())), rel=1e-5)
    assert found["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found["kl_divergence"] > 0


def test_the_report_warns_with_numbers_only_where_much_is_lost(monkeypatch):
    rows = torch.randint(VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(0))
    _, report = compiled(llama(), 8, rows)
    assert not any("small for the precision" in note for note in report.notes)
    monkeypatch.setattr("qcompiler.sweep.held_out._LARGE_DIVERGENCE", report.held_out["kl_divergence"] * 0.99)
    _, report = compiled(llama(), 8, rows)
    (note,) = (note for note in report.notes if "small for the precision" in note)
    assert f"{report.parameters / 1e6:.1f} million parameters" in note
    assert f"{report.held_out['kl_divergence']:.3f} nats" in note


def test_the_note():
    found = {
        "tokens": 511,
        "perplexity": 90.0,
        "reference_perplexity": 72.0,
        "kl_divergence": 0.25,
        "top1_agreement": 0.7,
    }
    note = precision_note(found, 7_300_000)
    assert note is not None
    for part in ("7.3 million", "511 held-out tokens", "0.250 nats", "72.00 -> 90.00", "30% of the positions"):
        assert part in note
    assert precision_note({**found, "kl_divergence": 0.004}, 7_300_000) is None


def test_few_tokens_where_the_vocabulary_is_large(monkeypatch):
    graph, rows = llama(), torch.randint(VOCABULARY, (3, 20))
    assert HeldOutCheck.of(graph, rows, CPU).ids.shape == (1, 20)
    monkeypatch.setattr("qcompiler.sweep.held_out._MOST_LOGITS", 5 * VOCABULARY)
    check = HeldOutCheck.of(graph, rows, CPU)
    assert check.logits.shape == (1, 5, VOCABULARY)
    assert check.measure(graph, CPU)["kl_divergence"] == 0
    assert check.measure(graph, CPU)["tokens"] == 4
    assert HeldOutCheck.of(graph, rows[:, :1], CPU) is None


def test_nothing_is_measured_without_logits_or_calibration():
    assert HeldOutCheck.of(residual_mlp(), torch.zeros(2, 8, dtype=torch.int64), CPU) is None
    report = CompileReport()
    compile_graph(llama(), Pipeline([RTN(bits=4, group_size=16)]), report=report, device=CPU)
    assert report.held_out is None


def test_logits_that_are_not_finite():
    graph = llama()
    check = HeldOutCheck.of(graph, torch.randint(VOCABULARY, (1, 8)), CPU)
    name = next(name for name in graph.weight_names() if name.endswith("norm.weight"))
    graph.weights.set(name, torch.full_like(graph.weights.read(name).float(), 3e38))
    with pytest.raises(ArtifactError, match="not finite"):
        check.measure(graph, CPU)


class Late(Fisher):
    """Begins a second stage, calibrated, on a model that the first has changed."""

    requires = frozenset()


def test_the_original_is_measured_before_anything_changes_it():
    rows = torch.randint(VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(0))
    passes = [Assign("w8a8-dynamic"), InsertQDQ(observer=None), Late(), RTN()]
    assert len(Pipeline(passes).stages) == 2
    report = CompileReport()
    calibration = Calibration.from_tokens(rows.flatten(), samples=16, length=12)
    result = compile_graph(llama(), Pipeline(passes), calibration, report=report, device=CPU)
    assert report.calibration is not None
    expected = evaluate(result.artifact(), tokens=result.held_out[:1], against=NativeArtifact(llama()))
    assert report.held_out["kl_divergence"] == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert report.held_out["reference_perplexity"] == pytest.approx(expected.reference_perplexity, rel=1e-5)


def test_what_was_changed_before_it_generated_a_text_is_no_original():
    passes = [Assign("w8a8-dynamic"), InsertQDQ(observer=None), Late(), RTN()]
    report = CompileReport()
    calibration = Calibration.self_generated(samples=8, length=12)
    compile_graph(llama(), Pipeline(passes), calibration, report=report, device=CPU)
    assert report.held_out is None
    assert any("not measured: the model was changed" in note for note in report.notes)


def test_a_given_text_measures_what_is_not_calibrated():
    rows = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    report = CompileReport()
    recipe = Pipeline([RTN(bits=3, group_size=16)])
    result = compile_graph(llama(), recipe, Calibration.from_tokens(rows), report=report, device=CPU)
    assert torch.equal(result.held_out, rows)
    expected = evaluate(result.artifact(), tokens=rows[:1], against=NativeArtifact(llama()))
    assert report.held_out["kl_divergence"] == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert report.held_out["kl_divergence"] > 0
    assert any("served to measure the result alone" in note for note in report.notes)


def test_what_is_given_for_nothing_is_said():
    report = CompileReport()
    recipe = Pipeline([RTN(bits=4, group_size=16)])
    compile_graph(llama(), recipe, Calibration.self_generated(), report=report, device=CPU)
    assert report.held_out is None
    assert any("was not used" in note for note in report.notes)


def test_a_result_that_is_not_measured_is_said():
    rows = torch.randint(VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(0))
    for calibration in (Calibration.from_tokens(rows), Calibration.from_tokens(rows.flatten(), 64, 12)):
        report = CompileReport()
        compile_graph(llama(), Pipeline([GPTQ(bits=4, group_size=16)]), calibration, report=report, device=CPU)
        assert report.held_out is None
        assert any("was not measured" in note for note in report.notes)


def test_too_few_tokens_to_tell_channels_apart_are_said():
    for length, is_said in ((4, True), (20, False)):
        rows = torch.randint(VOCABULARY, (8, length), generator=torch.Generator().manual_seed(0))
        _, report = compiled(llama(), 4, rows.repeat(2, 1)[:9])
        assert any("cannot tell all channels apart" in note for note in report.notes) is is_said
