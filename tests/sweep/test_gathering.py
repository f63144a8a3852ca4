"""What is gathered once, what anew, and passes that do not keep what they declare."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qcompiler.errors import CalibrationError, VerificationError
from qcompiler.ir.graph import Graph, is_op
from qcompiler.protocol.histograms import MinMax
from qcompiler.protocol.pass_base import (
    DROP,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Tap,
    Wave,
)
from qcompiler.protocol.statistics import AbsMax, Gram
from tests.sweep.scaling_passes import Entry, FoldIntoNorm, Scale, ScaleTogether, run
from tests.sweep.test_streaming import check_against_whole_model
from tests.tiny_graphs import language_model, token_batches

# --- what passes declare ----------------------------------------------------------------------------------------------


class Watch(Scale):
    """Looks and leaves everything as it is."""

    effect: ClassVar[Effect] = Effect.ANALYSIS

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        return PassResult(modified=False)


class Denies(Scale):
    """Says that it changed nothing."""

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        super().change(graph, wave)
        return PassResult(modified=False)


class Claims(Watch):
    """Says that it changed something."""

    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        return PassResult(modified=True)


class Meddles(Scale):
    """Calls itself an analysis."""

    effect: ClassVar[Effect] = Effect.ANALYSIS


class Careless(Scale):
    """Calls itself exact."""

    effect: ClassVar[Effect] = Effect.EXACT


class HalfFold(FoldIntoNorm):
    """Forgets the norm."""

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        return Scale.change(
            self, graph, [site for site in wave if is_op(site.inputs[0], torch.ops.qcompiler.rms_norm.default)]
        )


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Denies, r"does not say truly.*\n  where: denies, segment 1\n  got: modified=False, changed: 0\.k\.weight"),
        (Claims, r"does not say truly.*\n  where: claims, segment 1\n  got: modified=True, changed: nothing"),
        (Meddles, r"an analysis changed the graph\n  where: meddles, segment 1\n  got: 0\.k\.weight"),
        (Careless, r"declared exact changed what the model computes\n  where: careless, segment 1"),
        (HalfFold, r"declared exact changed what the model computes\n  where: half-fold, segment 1"),
    ],
)
@pytest.mark.parametrize("others", [[], [Watch()]], ids=["alone", "behind another"])
def test_a_pass_that_does_not_keep_what_it_declares(tmp_path, kind, text, others):
    graph = language_model()
    with pytest.raises(VerificationError, match=text):
        run(graph, [*others, kind()], token_batches(graph), tmp_path)


def test_an_exact_pass_is_probed_without_calibration(tmp_path):
    class Unseen(Careless):
        statistics = Pass.statistics

    graph = language_model()
    with pytest.raises(VerificationError, match="where: unseen"):
        run(graph, [Unseen()], [], tmp_path, probe=token_batches(graph)[0])
    with pytest.raises(CalibrationError, match="checked on inputs\n  where: unseen"):
        run(language_model(), [Unseen()], [], tmp_path)


def test_the_probe_is_seen_by_no_statistic(tmp_path):
    logs: list[list[Entry]] = [[], []]
    for log, probe in zip(logs, (None, 1), strict=True):
        graph = language_model()
        batches = token_batches(graph)
        given = {} if probe is None else {"probe": {key: value[:1] for key, value in batches[0].items()}}
        run(graph, [FoldIntoNorm(log=log)], batches, tmp_path, **given)
    for (_, _, moments), (_, _, others) in zip(*logs, strict=True):
        for key, moment in moments.items():
            assert torch.equal(moment, others[key])


# --- statistics that are kept -----------------------------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> Counter[type]:
    """How often a statistic of each kind was given a batch."""
    counter: Counter[type] = Counter()
    for kind in (Gram, AbsMax, MinMax):
        update = kind.update

        def counted(self: Any, batch: Tensor, reference: Tensor | None = None, *, update: Any = update) -> None:
            counter[type(self)] += 1
            update(self, batch, reference)

        monkeypatch.setattr(kind, "update", counted)
    return counter


def distinct_inputs(graph: Graph) -> int:
    return len({value for site in graph.sites() for value in site.inputs})


def test_what_two_passes_want_is_gathered_once(tmp_path, updates):
    graph = language_model()
    batches = token_batches(graph)
    run(graph, [Watch(), Watch(kinds=(Gram, AbsMax))], batches, tmp_path)
    assert updates == {kind: len(batches) * distinct_inputs(graph) for kind in (Gram, AbsMax)}


def test_an_exact_rewrite_costs_no_second_gathering(tmp_path, updates):
    log: list[Entry] = []
    check_against_whole_model(language_model, token_batches, [FoldIntoNorm(log=log), Watch(log=log)], log, tmp_path)
    assert updates == {Gram: 3 * distinct_inputs(language_model())}


@pytest.mark.parametrize(("kind", "anew"), [(Scale, 0), (ScaleTogether, 4)])
def test_behind_an_approximate_rewrite_only_what_it_changed_is_gathered_anew(tmp_path, updates, kind, anew):
    """Wave by wave, each moment is that of rewritten weights; of a segment at once, those of o and down are not."""
    graph = language_model()
    batches = token_batches(graph)
    run(graph, [kind(), Watch()], batches, tmp_path)
    assert updates == {Gram: len(batches) * (distinct_inputs(graph) + anew)}


class FoldSaysLittle(FoldIntoNorm):
    """Tells of Gram matrices alone, whatever else was gathered at a value."""

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        result = super().change(graph, wave)
        return PassResult(result.modified, statistics={Tap(tap.value, Gram): c for tap, c in result.statistics.items()})


@dataclass(frozen=True)
class See(Watch):
    """Notes the results of any kind."""

    seen: dict[tuple[str, str, type], Any] = field(default_factory=dict)

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        for tap, statistic in statistics.items():
            self.seen[wave[0].name, tap.value.name, tap.kind] = statistic.result()
        return PassResult(modified=False)


def test_what_became_of_a_value_goes_for_all_kinds(tmp_path, updates):
    """A range cannot be rescaled and is gathered again; magnitudes are rescaled, though nobody spoke of them."""
    kinds = (Gram, AbsMax, MinMax)
    graph, fresh = language_model(), language_model()
    before, after, expected = See(kinds=kinds), See(kinds=kinds), See(kinds=kinds)
    batches = token_batches(graph)
    run(graph, [before, FoldSaysLittle(), after], batches, tmp_path)
    inputs = distinct_inputs(graph)
    assert updates == {
        Gram: len(batches) * inputs,
        AbsMax: len(batches) * inputs,
        MinMax: len(batches) * (inputs + 5),  # behind the five norms
    }
    run(fresh, [FoldSaysLittle()], token_batches(fresh), tmp_path)
    run(fresh, [expected], token_batches(fresh), tmp_path)
    assert after.seen.keys() == expected.seen.keys()
    for key, value in expected.seen.items():
        torch.testing.assert_close(after.seen[key], value, rtol=1e-4, atol=1e-4)
    assert any(after.seen[key] != before.seen[key] for key in after.seen if key[2] is MinMax)


def test_statistics_that_a_pass_drops_are_gathered_anew(tmp_path, updates):
    class FoldDrops(FoldIntoNorm):
        def change(self, graph: Graph, wave: Wave) -> PassResult:
            result = super().change(graph, wave)
            return PassResult(result.modified, statistics=dict.fromkeys(result.statistics, DROP))

    log: list[Entry] = []
    check_against_whole_model(language_model, token_batches, [FoldDrops(log=log), Watch(log=log)], log, tmp_path)
    assert updates == {Gram: 3 * (distinct_inputs(language_model()) + 5)}
