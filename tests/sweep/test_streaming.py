"""Every wave must see what a loop over the whole model, written without any of the sweep's economies, would see."""

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from qcompiler.errors import CalibrationError, PipelineError, ResourceError, VerificationError
from qcompiler.ir import execute
from qcompiler.ir.graph import Graph, Site, is_op
from qcompiler.ir.segments import Segment, segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.protocol.histograms import MinMax
from qcompiler.protocol.observers import AbsMax, CrossGram, Gram, Statistic
from qcompiler.protocol.pass_base import (
    DROP,
    WEIGHTS_QUANTIZED,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Rescale,
    Skip,
    Tap,
    Wave,
)
from qcompiler.sweep import streaming as sweep_module
from qcompiler.sweep.streaming import Batch, SweepReport, sweep
from qcompiler.sweep.values import ValuePark
from tests.tiny_graphs import Maker, chain, input_batches, interpret, language_model, other, residual_mlp, token_batches

CPU = torch.device("cpu")
_aten = torch.ops.aten


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies weights; ``log`` gets what it was given: (pass, site names, matrix by kind and node name)."""

    factor: float = 1.5
    log: list["Entry"] = field(default_factory=list)
    kinds: tuple[type[Statistic], ...] = (Gram,)
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        return list(segment.waves())

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        return [Tap(value, kind) for site in wave for value in site.inputs for kind in self.kinds]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        moments = {(tap.kind, tap.value.name): statistic.result() for tap, statistic in statistics.items()}
        self.log.append((self, [site.name for site in wave], moments))
        return self.change(context.graph, wave)

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        for site in wave:
            graph.weights.set(site.weight, graph.weights.read(site.weight) * self.factor)
        return PassResult(modified=True)


Entry = tuple[Scale, list[str], dict[tuple[type[Statistic], str], Tensor]]


class ScaleTogether(Scale):
    """Takes all sites of a segment at once."""

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        return [segment.sites] if segment.sites else []


class ScaleUnseen(Scale):
    """Needs no statistics."""

    statistics = Pass.statistics


class FoldIntoNorm(Scale):
    """Moves the factor from the sites that read from a norm into that norm."""

    effect: ClassVar[Effect] = Effect.EXACT
    rewrites_upstream: ClassVar[bool] = True

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        norms: set[fx.Node] = set()
        for site in wave:
            (source,) = site.inputs
            if is_op(source, torch.ops.qcompiler.rms_norm.default):
                graph.weights.set(site.weight, graph.weights.read(site.weight) / self.factor)
                norms.add(source)
        for norm in norms:
            name = str(norm.all_input_nodes[1].target)
            graph.weights.set(name, graph.weights.read(name) * self.factor)
        scaled = {
            norm: torch.full(graph.weights.info(str(norm.all_input_nodes[1].target)).shape, self.factor)
            for norm in norms
        }
        changes = {Tap(norm, kind): Rescale(factor) for norm, factor in scaled.items() for kind in self.kinds}
        return PassResult(modified=bool(norms), statistics=changes)


class Quantize(Scale):
    """Replaces weights by codes, so that nodes are added to the graph."""

    def change(self, graph: Graph, wave: Wave) -> PassResult:
        for site in wave:
            graph.schemes[site.name] = Scheme.parse("w3a16-channel")
        return RTN().rewrite(wave, {}, PassContext(graph, CPU, 0))


def run(graph: Graph, passes: Sequence[Pass], batches: Sequence[Batch], work_dir: Path, **options: Any) -> SweepReport:
    return sweep(graph, passes, batches, PassContext(graph, CPU, 0), work_dir=work_dir, **options)


def site_named(graph: Graph, name: str) -> Site:
    return next(site for site in graph.sites() if site.name == name)


def check_against_whole_model(
    make_graph: Callable[[], Graph],
    make_batches: Callable[[Graph], Sequence[Batch]],
    passes: Sequence[Scale],
    log: list[Entry],
    work_dir: Path,
    **options: Any,
) -> Graph:
    """Sweeps; then follows the log with a second copy of the model that is run in full before every wave.

    A third copy takes only the exact rewrites: the reference.
    """
    graph = make_graph()
    run(graph, passes, make_batches(graph), work_dir, **options)
    naive, exact = make_graph(), make_graph()
    batches = make_batches(naive)
    original = [interpret(exact, batch) for batch in batches]
    for item, names, moments in log:
        everywhere = [interpret(naive, batch) for batch in batches]
        for (kind, node), moment in moments.items():
            rows, reference = (
                torch.cat([values[node].flatten(0, -2) for values in found]).double()
                for found in (everywhere, original)
            )
            expected = (reference if kind is CrossGram else rows).T @ rows
            torch.testing.assert_close(moment.double(), expected, rtol=1e-4, atol=1e-4)
        item.change(naive, [site_named(naive, name) for name in names])
        if item.effect is Effect.EXACT:
            item.change(exact, [site_named(exact, name) for name in names])
            original = [interpret(exact, batch) for batch in batches]
    assert sorted(graph.weights.names()) == sorted(naive.weights.names())
    for name in naive.weight_names():
        assert torch.equal(graph.weights.read(name), naive.weights.read(name)), name
    return graph


LAYER = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


@pytest.mark.parametrize("budget", [0, 1000, 1 << 30])
def test_sites_are_visited_in_true_sequence(tmp_path, budget):
    log: list[Entry] = []
    graph = check_against_whole_model(
        language_model, token_batches, [Scale(log=log)], log, tmp_path, value_budget=budget
    )
    expected = [[f"{layer}.{name}" for name in wave] for layer in (0, 1) for wave in LAYER] + [["head"]]
    assert [names for _, names, _ in log] == expected
    assert all(len(grams) == 1 for _, _, grams in log)  # one matrix for q, k and v together
    assert len(segment_graph(graph).segments) > 2


@pytest.mark.parametrize("make_graph", [residual_mlp, chain])
@pytest.mark.parametrize("kind", [Scale, ScaleTogether, Quantize, FoldIntoNorm])
def test_one_pass(tmp_path, make_graph, kind):
    log: list[Entry] = []
    check_against_whole_model(make_graph, input_batches, [kind(log=log)], log, tmp_path)
    assert sorted(name for _, names, _ in log for name in names) == sorted(s.name for s in make_graph().sites())


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize("kinds", [(Scale, Scale), (ScaleTogether, Quantize), (FoldIntoNorm, Quantize), (Scale,) * 3])
@pytest.mark.parametrize("make", [(language_model, token_batches), (chain, input_batches)])
def test_later_passes_start_the_segment_again(tmp_path, make, kinds, budget):
    log: list[Entry] = []
    passes = [kind(factor=1.25 + index / 4, log=log) for index, kind in enumerate(kinds)]
    check_against_whole_model(*make, passes, log, tmp_path, value_budget=budget)
    sites = len(make[0]().sites())
    for item in passes:
        assert sum(len(names) for logged, names, _ in log if logged is item) == sites


def test_a_pass_without_statistics_among_calibrated_ones(tmp_path):
    log: list[Entry] = []
    passes = [ScaleUnseen(factor=1.1, log=log), Scale(log=log), ScaleUnseen(factor=0.9, log=log)]
    check_against_whole_model(language_model, token_batches, passes, log, tmp_path)


@pytest.mark.parametrize("budget", [0, 1 << 30])
@pytest.mark.parametrize("make", [(language_model, token_batches), (residual_mlp, input_batches)])
@pytest.mark.parametrize("first", [None, FoldIntoNorm])
def test_the_reference_is_the_model_without_approximations(tmp_path, make, first, budget):
    log: list[Entry] = []
    passes = [Quantize(log=log, kinds=(Gram, CrossGram))]
    if first is not None:
        passes = [first(log=log), *passes]
    check_against_whole_model(*make, passes, log, tmp_path, value_budget=budget)
    moments = [pair for _, _, found in log for pair in found.items()]
    crossed = [name for (kind, name), _ in moments if kind is CrossGram]
    assert len(crossed) >= len(segment_graph(make[0]()).segments) - 2


def called_twice() -> Graph:
    """One layer used at two places of a segment, the first of them before a layer of an earlier wave has run."""
    make = Maker()
    x = make.fx.placeholder("x")
    normed = make.norm(x, "norm", 8)
    first = make.linear(normed, "shared", 8, 8)
    second = make.linear(make.call(_aten.relu.default, make.linear(normed, "alone", 8, 8)), "shared", 8, 8)
    third = make.linear(make.call(_aten.add.Tensor, second, first), "last", 8, 8)
    return make.graph([other("x", "batch", 8)], {other("y", "batch", 8): make.call(_aten.add.Tensor, x, third)})


@pytest.mark.parametrize("kinds", [(Scale,), (Quantize,), (Scale, Scale)])
def test_a_layer_that_is_called_twice(tmp_path, kinds):
    log: list[Entry] = []
    passes = [kind(factor=2.0 + index, log=log) for index, kind in enumerate(kinds)]
    check_against_whole_model(called_twice, input_batches, passes, log, tmp_path)
    first = [(names, grams) for item, names, grams in log if item is passes[0]]
    assert [names for names, _ in first] == [["alone"], ["shared"], ["last"]]
    assert len(first[1][1]) == 2


def test_results_do_not_depend_on_budget_or_repetition(tmp_path):
    def codes(name: str, budget: int) -> dict[str, Tensor]:
        graph = language_model(width=32)
        for site in graph.sites():
            graph.schemes[site.name] = Scheme.parse("w4a16-g16")
        run(graph, [GPTQ()], token_batches(graph), tmp_path / name, value_budget=budget)
        return {name: graph.weights.read(name) for name in graph.weight_names()}

    expected = codes("memory", 1 << 30)
    assert any(name.endswith("_codes") for name in expected)
    for name, budget in (("disk", 0), ("both", 5000), ("again", 1 << 30)):
        found = codes(name, budget)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_results_do_not_depend_on_batch_size(tmp_path):
    logs: list[list[Entry]] = [[], []]
    for log, sizes in zip(logs, [(5,), (1, 1, 1, 1, 1)], strict=True):
        graph = language_model()
        run(graph, [Scale(log=log)], token_batches(graph, sizes), tmp_path)
    for (_, names, grams), (_, other_names, other_grams) in zip(*logs, strict=True):
        assert names == other_names
        for gram, other_gram in zip(grams.values(), other_grams.values(), strict=True):
            torch.testing.assert_close(gram, other_gram, rtol=1e-4, atol=1e-4)


def test_batches_of_one_shape_keep_their_own_mask(tmp_path):
    def batches(graph: Graph) -> Sequence[Batch]:
        made = [dict(batch) for batch in token_batches(graph, (2, 2))]
        mask = graph.inputs[1]
        made[1][mask] = made[1][mask].clone()
        made[1][mask][:, :3] = 0
        return made

    log: list[Entry] = []
    check_against_whole_model(language_model, batches, [Scale(log=log)], log, tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[fx.Node]:
    """How often every node was executed."""
    counter: Counter[fx.Node] = Counter()
    original = execute._call

    def counted(node: fx.Node, env: Mapping[fx.Node, Any], device: torch.device) -> Any:
        counter[node] += 1
        return original(node, env, device)

    monkeypatch.setattr(execute, "_call", counted)
    return counter


@pytest.mark.parametrize("kind", [Scale, Quantize])
def test_every_node_runs_once_per_batch(tmp_path, calls, kind):
    graph = language_model()
    batches = token_batches(graph, (2, 2, 2))
    run(graph, [kind()], batches, tmp_path)
    ran = {node: calls[node] for node in calls if not is_op(node, torch.ops.qcompiler.dequantize.default)}
    once = {node for node, count in ran.items() if count == 1}  # the same for every batch of a shape
    assert {node.name for node in once} == {"embedding_default", "to_dtype", "unsqueeze_default", "unsqueeze_default_1"}
    assert {count for node, count in ran.items() if node not in once} == {len(batches)}
    linears = [node for node in graph.fx.nodes if is_op(node, torch.ops.qcompiler.linear.default)]
    assert [node for node in linears if node not in ran] == linears[-1:]  # nothing is calibrated behind the head


def test_nothing_runs_behind_the_last_calibrated_site(tmp_path, calls):
    class FirstLayer(Scale):
        def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
            return [wave for wave in segment.waves() if wave[0].name.startswith("0.")]

    graph = language_model()
    run(graph, [FirstLayer()], token_batches(graph), tmp_path)
    later = [node for name in ("1.q", "1.down", "head") for node in site_named(graph, name).nodes]
    assert not any(calls[node] for node in later)
    assert calls[site_named(graph, "0.gate").nodes[0]]


def test_a_pass_that_asks_late_is_refused(tmp_path):
    class Late(Scale):
        def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
            return super().statistics(wave, graph) if wave[0].name == "0.q" or self.log else []

    with pytest.raises(PipelineError, match=r"late: 0\.gate, 0\.up"):
        run(graph := language_model(), [Late()], token_batches(graph), tmp_path)


@pytest.mark.parametrize("kinds", [(Scale,), (ScaleTogether,), (Scale, Scale), (FoldIntoNorm, ScaleTogether)])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_only_the_frontier_is_held_between_segments(tmp_path, monkeypatch, kinds, budget):
    parks: list[ValuePark] = []

    class Spy(ValuePark):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            parks.append(self)

    held, files = [], []

    def progress(done: int, total: int, what: str) -> None:
        held.append(parks[0]._held)
        files.append(sum(path.stat().st_size for path in Path(parks[0]._temporary.name).iterdir()))

    monkeypatch.setattr(sweep_module, "ValuePark", Spy)
    graph = language_model(layers=4)
    report = run(graph, [k() for k in kinds], token_batches(graph), tmp_path, value_budget=budget, progress=progress)
    probed = 2 if FoldIntoNorm in kinds else 0  # the first batch runs along as the probe
    stream = (5 + probed) * 6 * 16 * 4  # rows, tokens, channels, bytes
    expected = [0] + [stream] * (len(held) - 2) + [0]
    assert (held if budget else files) == expected
    assert not any(files if budget else held)
    assert (report.bytes_spilled > 0) == (budget == 0)
    assert not Path(parks[0]._temporary.name).exists()


def test_weights_are_written_and_read_back(tmp_path):
    graph = language_model()
    expected = {name: graph.weights.read(name) * 1.5 for name in ("0.q.weight", "1.down.weight")}
    run(graph, [Scale()], token_batches(graph), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep-00"]
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "sweep-00").iterdir())
    for name, tensor in expected.items():
        assert graph.weights._tensors[name].source.__class__.__name__ == "InFile"
        assert torch.equal(graph.weights.read(name), tensor)


def test_a_second_sweep_over_the_same_directory(tmp_path):
    graph = language_model()
    expected = graph.weights.read("0.q.weight") * 1.5 * 1.5
    for _ in range(2):
        run(graph, [Scale()], token_batches(graph), tmp_path)
    torch.testing.assert_close(graph.weights.read("0.q.weight"), expected)
    assert sorted(os.listdir(tmp_path)) == ["sweep-00", "sweep-01"]


def test_no_calibration_needs_no_batches(tmp_path, calls):
    log: list[Entry] = []
    graph = language_model()
    expected = graph.weights.read("1.up.weight") * 1.5
    report = run(graph, [ScaleUnseen(log=log)], [], tmp_path)
    assert not calls
    assert len(log) == 9
    assert torch.equal(graph.weights.read("1.up.weight"), expected)
    assert report.segments == len(segment_graph(graph).segments)


def test_calibrated_pass_without_batches(tmp_path):
    graph = language_model()
    with pytest.raises(CalibrationError, match="no batches"):
        run(graph, [ScaleUnseen(), Scale()], [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_are_cleaned_up_after_an_error(tmp_path):
    class Broken(Scale):
        def rewrite(self, *_: Any) -> PassResult:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(graph := language_model(), [Broken()], token_batches(graph), tmp_path, value_budget=0)
    assert not list((tmp_path / "sweep-00").iterdir())


def test_work_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"):
        run(graph := language_model(), [Scale()], token_batches(graph), tmp_path / "file" / "in")


def test_sites_in_no_segment_are_skipped_with_a_reason(tmp_path):
    @dataclass(frozen=True)
    class Quantizer(ScaleUnseen):
        establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})

    make = Maker()
    x = make.fx.placeholder("x")
    main, side = make.linear(x, "main", 8, 8), make.linear(x, "side", 8, 8)
    main = make.linear(main, "last", 8, 8)
    ports = other("y", "batch", 8), other("z", "batch", 8)
    graph = make.graph([other("x", "batch", 8)], dict(zip(ports, (main, side), strict=True)))
    graph.schemes = {name: Scheme.parse("w4a16") for name in ("main", "side", "last")}
    report = run(graph, [Quantizer()], [], tmp_path)
    inside = {site.name for segment in segment_graph(graph).segments for site in segment.sites}
    skipped = {skip.site for skip in report.skips}
    assert skipped == {"main", "side", "last"} - inside
    for name in skipped:
        assert graph.schemes[name] == Scheme()
        assert (
            Skip(name, "quantizer", "used in several segments, or not on the way to the first output") in report.skips
        )


def test_progress(tmp_path):
    seen: list[tuple[int, int, str]] = []
    graph = residual_mlp(blocks=3)
    run(graph, [ScaleUnseen()], [], tmp_path, progress=lambda *what: seen.append(what))
    total = len(segment_graph(graph).segments)
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {of for _, of, _ in seen} == {total}
    assert ", ".join(text for _, _, text in seen if text) == ", ".join(site.name for site in graph.sites())


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


def test_a_graph_is_freed_with_its_last_name(tmp_path):
    """Files of rewritten weights are removed when the weights are; no cycle may keep them until the collector runs."""
    graph = residual_mlp()
    context = PassContext(graph, CPU, 0)
    Assign("w4a16", group_size=8).run(graph, context)
    batches = input_batches(graph)
    gc.disable()
    try:
        sweep(graph, [GPTQ()], batches, context, work_dir=tmp_path)
        gone = weakref.ref(graph.weights)
        del graph, context, batches
        assert gone() is None
    finally:
        gc.enable()
