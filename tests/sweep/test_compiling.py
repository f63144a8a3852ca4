"""`compile_graph` on graphs made by hand: what it checks and notes on the way. The journeys are in test_api.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qcompiler.artifacts.calibration import Calibration
from qcompiler.errors import CalibrationError, InputError, RecipeError, VerificationError, WeightError
from qcompiler.ir.graph import Graph
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Skip,
    Wave,
)
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.reporting.report import CompileReport
from qcompiler.sweep.compiling import compile_graph
from tests.tiny_graphs import language_model, residual_mlp

CPU = torch.device("cpu")


def run(graph: Graph, passes: list[Pass], calibration: Any = None, **options: Any) -> CompileReport:
    report = CompileReport()
    result = compile_graph(graph, Pipeline(passes), calibration, report=report, device=CPU, **options)
    assert result.report is report
    assert result.graph is graph
    return report


@dataclass(frozen=True)
class _LeaveAlone(Pass):
    """Leaves every site alone, asked to or not."""

    asked: bool

    effect: ClassVar[Effect] = Effect.ANALYSIS

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        reason = "no override could help"
        skips = tuple(Skip(s.name, self.name, reason, self.asked) for s in wave)
        return PassResult(modified=False, skips=skips, regions=({"name": wave[0].name},))


def test_strict_asks_the_skip_and_not_the_words_of_its_reason() -> None:
    assert len(run(language_model(), [_LeaveAlone(True)], strict=True).skipped) == 15
    report = run(language_model(), [_LeaveAlone(False)])
    assert len(report.skipped) == 15
    assert [region["name"] for region in report.regions] == ["0.q", "0.gate", "1.q", "1.gate", "head"]
    with pytest.raises(RecipeError) as caught:
        run(language_model(), [_LeaveAlone(False)], strict=True)
    assert caught.value.where == "0.q"
    assert caught.value.got == "no override could help"


def test_what_is_lost_is_noted_and_refused_where_strict_before_anything_is_computed() -> None:
    graph = language_model()
    graph.lost.append("a tower is left out")
    graph.notes.append("two tensors are apart")
    assert run(graph.copy(), [RTN(bits=4)]).notes == ["two tensors are apart", "a tower is left out"]
    with pytest.raises(InputError, match="would be lost") as caught:
        run(graph, [RTN(bits=4)], strict=True)
    assert caught.value.got == "a tower is left out"
    assert graph.schemes == {}
    graph.lost.clear()
    assert run(graph, [RTN(bits=4)], strict=True).notes == ["two tensors are apart"]


def test_what_predicts_no_tokens_is_calibrated_with_text_alone() -> None:
    graph = language_model()
    scores, *others = graph.signature.outputs
    graph.signature = replace(graph.signature, outputs=(replace(scores, role="scores"), *others))
    with pytest.raises(CalibrationError, match="predicts no tokens") as caught:
        run(graph, [GPTQ(bits=4, group_size=8)])
    assert "--calib" in str(caught.value.remedy)
    rows = torch.randint(32, (6, 12), generator=torch.Generator().manual_seed(2))
    report = run(graph, [GPTQ(bits=4, group_size=8)], Calibration.from_tokens(rows))
    assert report.held_out is None
    assert len(report.sites) == 14


def test_files_that_do_not_travel_are_lost(tmp_path: Path) -> None:
    graph = language_model()
    graph.provenance["companions"] = str(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    assert run(graph.copy(), [RTN(bits=4)]).notes == ["files of the source that are not copied: modules.json"]
    with pytest.raises(InputError, match=r"modules\.json"):
        run(graph, [RTN(bits=4)], strict=True)


@dataclass(frozen=True)
class _LowRank(Pass):
    """Adds the product of two thin matrices to a weight, and stores them as a pass of anybody's would."""

    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        site = graph.sites()[0]
        weight = graph.weights.read(site.weight).float()
        graph.weights.set(site.weight, weight + 0.01)
        graph.weights.set("thin", torch.randn(site.out_features, 2))
        with graph.fx.inserting_before(site.nodes[0]):
            thin = graph.fx.create_node("get_attr", "thin")
            thin.meta.update(dtype=torch.float32, shape=(site.out_features, 2))
            ones = graph.fx.call_function(torch.ops.aten.sum.default, (thin,))
            ones.meta.update(dtype=torch.float32, shape=())
        with graph.fx.inserting_after(site.nodes[0]):
            moved = graph.fx.call_function(torch.ops.aten.add.Tensor, (site.nodes[0], ones))
            moved.meta.update(site.nodes[0].meta)
        site.nodes[0].replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
        return PassResult(modified=True)


def test_tensors_that_a_pass_adds_take_the_dtype_of_the_model() -> None:
    graph = language_model()
    for name in graph.weight_names():
        graph.weights.set(name, graph.weights.read(name).bfloat16())
    before = graph.weights.stored_bytes(graph.weight_names())
    site = graph.sites()[0]
    run(graph, [_LowRank()])
    assert {graph.weights.info(name).dtype for name in (site.weight, "thin")} == {"bfloat16"}
    assert graph.weights.stored_bytes(graph.weight_names()) == before + 2 * 2 * site.out_features


def test_what_quantizes_no_weight_says_so() -> None:
    note = "no weight was quantized: every site was left in float"
    assert note in run(language_model(), [_LeaveAlone(True)]).notes
    assert note in run(language_model(), [_Claim(True, True)]).notes
    assert note not in run(language_model(), [RTN(bits=4)]).notes


def test_phases_are_timed() -> None:
    rows = torch.randint(32, (6, 12), generator=torch.Generator().manual_seed(2))
    calibrated = run(language_model(), [GPTQ(bits=4, group_size=8)], Calibration.from_tokens(rows))
    assert calibrated.seconds.keys() == calibrated.cpu_seconds.keys() == {"calibration", "sweep"}
    assert all(seconds > 0 for seconds in calibrated.seconds.values())
    assert run(language_model(), [RTN(bits=4)]).seconds.keys() == {"sweep"}


@pytest.mark.parametrize("name", ["0.up.weight", "embedding.weight", "norm.weight"])
def test_a_weight_that_is_not_finite_is_named_before_the_model_generates_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*arguments: object, **options: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(Calibration, "bind", bind)
    graph = language_model()
    value = graph.weights.read(name).clone()
    value.view(-1)[3] = float("inf")
    graph.weights.set(name, value)
    with pytest.raises(WeightError) as caught:
        run(graph, [GPTQ(bits=4, group_size=8)], work_dir=tmp_path)
    assert name in str(caught.value.where)
    assert not list(tmp_path.iterdir())


def test_an_override_that_matches_nothing_stops_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*arguments: object, **options: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(Calibration, "bind", bind)
    with pytest.raises(RecipeError, match="matches no site"):
        run(language_model(), [Assign("w4a16", overrides={"nothing.*": "w8a16"}), GPTQ()])


@dataclass(frozen=True)
class _Scale(Pass):
    """Multiplies ``up`` and divides ``down`` of every gated block: exact where the factors are inverse."""

    factor: float
    inverse: float

    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        factors = {"up": self.factor, "down": self.inverse}
        chosen = [(site, factors[site.name[2:]]) for site in wave if site.name[2:] in factors]
        if len(chosen) < 2:  # they lie in two segments
            return PassResult(modified=False)
        for site, factor in chosen:
            context.graph.weights.set(site.weight, context.weight(site) * factor)
        return PassResult(modified=True)


@pytest.mark.parametrize(("graph", "inputs"), [(language_model, None), (residual_mlp, [(torch.ones(3, 8),)])])
def test_exact_passes_are_checked_where_nothing_is_calibrated(graph: Any, inputs: Any) -> None:
    assert run(graph(), [_Scale(4.0, 0.25)], inputs).calibration == (
        None if inputs is None else {"source": "inputs", "samples": 1}
    )
    with pytest.raises(VerificationError, match="exact"):
        run(graph(), [_Scale(4.0, 0.26)], inputs)


@dataclass(frozen=True)
class _Claim(Pass):
    """Changes a weight of the whole graph or not, and says so or not."""

    changes: bool
    claims: bool

    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if self.changes:
            graph.weights.set("0.q.weight", graph.weights.read("0.q.weight") * 2)
        sites = (SiteReport("0.q", self.name, "twice as large", 0.0),) if self.changes else ()
        return PassResult(modified=self.claims, sites=sites, regions=({"name": "a region"},))


@pytest.mark.parametrize("changes", [False, True])
def test_passes_on_the_whole_graph_are_held_to_what_they_say(changes: bool) -> None:
    assert run(language_model(), [_Claim(changes, changes)]).regions == [{"name": "a region"}]
    with pytest.raises(VerificationError, match="say truly"):
        run(language_model(), [_Claim(changes, not changes)])


@dataclass(frozen=True)
class _Half(Pass):
    """Halves a weight of the whole graph; exact where ``other`` is doubled for it."""

    first: str
    other: str | None

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        graph.rewrite_float(self.first, graph.weights.read(self.first) / 2)
        if self.other is not None:
            graph.rewrite_float(self.other, graph.weights.read(self.other) * 2)
        return PassResult(modified=True)


def test_an_exact_pass_on_the_whole_graph_is_checked_on_a_modules_own_inputs() -> None:
    inputs = [(torch.randn(3, 8),)]
    up, down = "0.up.weight", "0.down.weight"
    run(residual_mlp(), [_Half(up, down)], inputs)
    with pytest.raises(VerificationError) as caught:
        run(residual_mlp(), [_Half(up, None)], inputs)
    assert caught.value.where == "_half"
    with pytest.raises(CalibrationError):
        run(residual_mlp(), [_Half(up, down)])
    with pytest.raises(CalibrationError, match="checked on inputs"):
        run(residual_mlp(), [_Half(up, down)], [])
