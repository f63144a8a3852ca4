"""`compile_graph` on graphs made by hand: what it checks and notes on the way. The journeys are in test_api.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qcompiler.calibration import Calibration
from qcompiler.compiling import choose_device, compile_graph
from qcompiler.errors import InputError, RecipeError, WeightError
from qcompiler.graph import Graph
from qcompiler.pass_base import Effect, Pass, PassContext, PassResult, Skip, Wave
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.pipeline import Pipeline
from qcompiler.report import CompileReport
from tests.tiny_graphs import language_model

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
        return PassResult(modified=False, skips=tuple(Skip(s.name, self.name, reason, self.asked) for s in wave))


def test_strict_asks_the_skip_and_not_the_words_of_its_reason() -> None:
    assert len(run(language_model(), [_LeaveAlone(True)], strict=True).skipped) == 15
    assert len(run(language_model(), [_LeaveAlone(False)]).skipped) == 15
    with pytest.raises(RecipeError) as caught:
        run(language_model(), [_LeaveAlone(False)], strict=True)
    assert caught.value.where == "0.q"
    assert caught.value.got == "no override could help"


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


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError) as caught:
        choose_device("abacus")
    assert caught.value.got == "abacus"
