"""Every wave must see what a loop over the whole model, written without any of the sweep's economies, would see."""

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from qcompiler.errors import CalibrationError, PipelineError, ResourceError
from qcompiler.ir import execute
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.segments import Segment, segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import GPTQ, Assign
from qcompiler.protocol.pass_base import (
    WEIGHTS_QUANTIZED,
    Effect,
    PassContext,
    PassResult,
    Skip,
    Tap,
    Wave,
)
from qcompiler.protocol.statistics import CrossGram, Gram
from qcompiler.sweep import streaming as sweep_module
from qcompiler.sweep.position import Batch
from qcompiler.sweep.streaming import sweep
from qcompiler.sweep.value_store import ValueStore
from tests.sweep.scaling_passes import (
    CPU,
    Entry,
    FoldIntoNorm,
    Quantize,
    Scale,
    ScaleTogether,
    ScaleUnseen,
    run,
    site_named,
)
from tests.tiny_graphs import Maker, chain, input_batches, interpret, language_model, other, residual_mlp, token_batches

_aten = torch.ops.aten


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
    stores: list[ValueStore] = []

    class Spy(ValueStore):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            stores.append(self)

    held, files = [], []

    def progress(done: int, total: int, what: str) -> None:
        held.append(stores[0]._held)
        files.append(sum(path.stat().st_size for path in Path(stores[0]._temporary.name).iterdir()))

    monkeypatch.setattr(sweep_module, "ValueStore", Spy)
    graph = language_model(layers=4)
    report = run(graph, [k() for k in kinds], token_batches(graph), tmp_path, value_budget=budget, progress=progress)
    probed = 2 if FoldIntoNorm in kinds else 0  # the first batch runs along as the probe
    stream = (5 + probed) * 6 * 16 * 4  # rows, tokens, channels, bytes
    expected = [0] + [stream] * (len(held) - 2) + [0]
    assert (held if budget else files) == expected
    assert not any(files if budget else held)
    assert (report.bytes_spilled > 0) == (budget == 0)
    assert not Path(stores[0]._temporary.name).exists()


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
