"""`compile_graph`: carries a pipeline through a graph. It knows no concrete pass and no target."""

import logging
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import qcompiler
from qcompiler.artifacts import Calibration, CompileResult, companion_losses
from qcompiler.errors import CalibrationError, InputError, RecipeError
from qcompiler.ir import Graph, feed, formats_by_cache, results_of, run_by_segments
from qcompiler.protocol import (
    CalibrationRun,
    Effect,
    Pass,
    PassContext,
    Pipeline,
    Target,
    check_caches,
    check_declared,
    check_exact,
    check_schemes,
    state_of,
    tied_layers,
    verify_graph,
    with_taken_tables,
)
from qcompiler.reporting import CompileReport, peak_rss_bytes, quantized_bits_per_weight
from qcompiler.storage import WeightStore, remove_tree, undisturbed
from qcompiler.sweep.calibration_batches import calibration_batches, token_limits
from qcompiler.sweep.held_out import HeldOutCheck, precision_note
from qcompiler.sweep.position import Batch
from qcompiler.sweep.streaming import Progress, default_value_budget, sweep

__all__ = ["CalibrationInput", "check_work_dir", "compile_graph"]

CalibrationInput = Calibration | Iterable[tuple[Tensor, ...]] | None
"""Tokens for a language model; for another graph, its own inputs."""
_log = logging.getLogger(__name__)

_MEASURED = "measured"  # of the work directory: what passes measure on the whole graph, for others to read


def compile_graph(
    graph: Graph,
    pipeline: Pipeline,
    calibration: CalibrationInput = None,
    *,
    report: CompileReport,
    targets: Sequence[Target] = (),
    memory_budget: int | None = None,
    device: torch.device,
    seed: int = 0,
    strict: bool = False,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> CompileResult:
    """Carries a pipeline through a graph, which is rewritten in place: one sweep per stage.

    Args:
        report: filled in, and part of the result.
        graph, pipeline, calibration, targets, memory_budget, device, seed, strict, work_dir, progress,
            trust_remote_code: as `qcompiler.compile` takes them, looked up and built.

    Raises:
        QCompilerError: see `qcompiler.errors`; nothing is left behind.
    """
    plans_caches = any(item.cache_formats() for item in pipeline.passes)
    for target in targets:
        target.check_graph(graph)
        if not plans_caches:
            target.check_cached(formats_by_cache(graph))
    report.unrecognized = list(graph.unrecognized)
    report.notes += graph.notes
    _judge_losses(graph, report, strict, trust_remote_code)
    dtype = graph.remember_dtypes()
    report.bytes_before = graph.weights.stored_bytes(graph.weight_names())
    report.parameters = int(graph.provenance["parameters"])
    context = PassContext(graph, device, seed, targets=tuple(targets))
    with ExitStack() as undo:
        workspace = _workspace(work_dir, graph)
        undo.callback(remove_tree, workspace)
        batches: list[Batch] | None = None
        held_out: Tensor | None = None
        check: HeldOutCheck | None = None
        is_original = True  # nothing approximate has changed the model yet
        is_given = isinstance(calibration, Calibration) and calibration.source != "self-generated"
        is_calibrated = any(item.is_calibrated for item in pipeline.passes)

        def gather() -> list[Batch]:
            nonlocal batches, held_out, check
            if batches is None:
                with _phase(report, "calibration", progress):
                    batches, held_out = calibration_batches(
                        graph, calibration, context, report, trust_remote_code, is_calibrated=is_calibrated
                    )
                    if held_out is not None and is_original:
                        check = HeldOutCheck.of(graph, held_out, device)
                    elif held_out is not None:
                        report.notes.append(
                            "the result was not measured: the model was changed before calibration began"
                        )
            return batches

        for stage in pipeline.stages:
            for item in stage.whole_graph:
                if is_given and item.effect is Effect.APPROXIMATE:
                    gather()  # the original is measured before anything changes it
                before = state_of(graph, graph.fx.nodes)
                probe: Batch | None = None
                if item.effect is Effect.EXACT:
                    if graph.signature.input("ids") is not None:
                        probe = _random_probe(graph, device)
                    else:
                        if not gather():
                            raise CalibrationError(
                                "a pass that is declared exact is checked on inputs", where=item.name, got="no inputs"
                            )
                        probe = gather()[0]
                    expected = _results(graph, probe, device)
                if item.is_calibrated:
                    _check_schemes(graph, targets)  # nothing long runs for a target that refuses
                    budget = memory_budget if memory_budget is not None else default_value_budget()
                    run = CalibrationRun(gather(), workspace / _MEASURED, budget, progress)
                    with report.timed("sweep"):
                        result = item.run(graph, replace(context, calibration=run))
                    report.sweeps += 1
                else:
                    result = item.run(graph, context)
                check_declared(item, result, before, state_of(graph, graph.fx.nodes), item.name)
                if probe is not None and result.modified:
                    check_exact(expected, _results(graph, probe, device), _terms(graph), item.name)
                is_original &= item.effect is not Effect.APPROXIMATE or not result.modified
                report.sites += result.sites
                report.skipped += result.skips
                report.regions += [dict(region) for region in result.regions]
                report.notes += result.notes
            _check_schemes(graph, targets)
            for item in stage.swept:
                item.check(graph)
                check_caches(item.cache_formats(), targets)
                _check_cached(graph, item, targets)
            is_checked = any(item.effect is Effect.EXACT for item in stage.swept)
            takes_tokens = graph.signature.input("ids") is not None
            wants_inputs = stage.is_calibrated or (is_checked and not takes_tokens and calibration is not None)
            if wants_inputs or is_given:
                gather()
            probe = batches[0] if batches else None
            if probe is None and is_checked and takes_tokens:
                probe = _random_probe(graph, device)
            with report.timed("sweep"):
                done = sweep(
                    graph,
                    stage.swept,
                    batches if batches is not None and stage.is_calibrated else (),
                    replace(context, ties=tied_layers(graph, targets)),
                    probe=probe,
                    work_dir=workspace,
                    value_budget=memory_budget,
                    progress=progress,
                )
            is_original &= all(item.effect is not Effect.APPROXIMATE for item in stage.swept)
            report.sites += done.sites
            report.skipped += done.skips
            report.regions += done.regions
            report.notes += done.notes
            report.sweeps += 1
            report.segments = done.segments
            report.bytes_spilled += done.bytes_spilled
        if calibration is not None and batches is None:
            report.notes.append("nothing in this recipe is calibrated: what was given to calibrate with was not used")
        graph.fisher = WeightStore()
        remove_tree(workspace / _MEASURED)
        graph.round_rewritten(dtype)
        verify_graph(graph)
        _judge_coverage(graph, report, strict)
        if check is not None:
            with _phase(report, "held-out check", progress):
                report.held_out = check.measure(graph, device)
            if (note := precision_note(report.held_out, report.parameters)) is not None:
                report.notes.append(note)
        report.cache_bytes_per_token = graph.signature.cache_bytes_per_token
        report.bytes_after = graph.weights.stored_bytes(graph.weight_names())
        undo.pop_all()
    report.peak_rss_bytes = peak_rss_bytes()
    manifest = {
        "qcompiler": qcompiler.__version__,
        "torch": torch.__version__,
        "seed": seed,
        "recipe": [{"pass": item.name, "options": item.options()} for item in pipeline.passes],
        "calibration": report.calibration,
        "provenance": {k: v for k, v in graph.provenance.items() if k != "companions"},
    }
    return CompileResult(graph, report, manifest, held_out)


def _phase(report: CompileReport, name: str, progress: Progress | None) -> AbstractContextManager[None]:
    """A phase that is timed, and announced; nobody knows how long it takes."""
    _log.info("%s", name)
    if progress is not None:
        progress(0, 0, name)
    return report.timed(name)


def _terms(graph: Graph) -> int:
    """The number of terms in all sums that a result goes through at most, one behind the other."""
    return sum(site.in_features for site in graph.sites()) or 1


def _check_schemes(graph: Graph, targets: Sequence[Target]) -> None:
    check_schemes(graph.schemes, {site.name: site.in_features for site in graph.sites()}, targets)
    for target in targets:
        target.check_assigned(with_taken_tables(graph, target))


def _check_cached(graph: Graph, item: Pass, targets: Sequence[Target]) -> None:
    planned = item.planned_caches(graph)
    for target in targets if planned else ():
        target.check_cached({**formats_by_cache(graph), **planned})


def _workspace(work_dir: str | Path | None, graph: Graph) -> Path:
    """A new directory that lives as long as the graph's weights, which are read from there once they are rewritten."""
    with undisturbed():
        path = _make_directory(work_dir)
        weakref.finalize(graph.weights, remove_tree, path)
    return Path(path)


def check_work_dir(work_dir: str | Path | None) -> None:
    """Makes a temporary directory in it, and removes it.

    Raises:
        InputError: if that cannot be done.
    """
    with undisturbed():
        Path(_make_directory(work_dir)).rmdir()


def _make_directory(work_dir: str | Path | None) -> str:
    try:
        return tempfile.mkdtemp(prefix="qcompiler-", dir=work_dir)
    except OSError as error:
        raise InputError(
            "the work directory cannot be written", where=work_dir or tempfile.gettempdir(), got=error.strerror
        ) from error


def _results(graph: Graph, batch: Batch, device: torch.device) -> list[Tensor]:
    return next(run_by_segments(graph, [[batch]], device, results_of(graph)))


def _random_probe(graph: Graph, device: torch.device) -> Batch:
    """A few tokens that exact passes are checked on where nothing is calibrated."""
    vocab_size, max_positions = token_limits(graph)
    if vocab_size is None:
        index = graph.signature.index_of_output("logits")
        vocab_size = 2 if index is None else int(graph.signature.outputs[index].shape[-1])
    shape = (2, min(16, max_positions or 16))
    return feed(graph, torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device))


def _judge_losses(graph: Graph, report: CompileReport, strict: bool, trust_remote_code: bool) -> None:
    """What neither the graph nor the files beside it will hold is said, and refused where strict."""
    companions = graph.provenance.get("companions")
    lost = [*graph.lost, *([] if companions is None else companion_losses(companions, trust_remote_code))]
    report.notes += lost
    if strict and lost:
        raise InputError(
            "something of the model would be lost, and strict was asked for",
            where=graph.provenance.get("source"),
            got="; ".join(lost),
            remedy="compile without strict, or take out of the directory what is not needed",
        )


def _judge_coverage(graph: Graph, report: CompileReport, strict: bool) -> None:
    if quantized_bits_per_weight(graph) is None:
        report.notes.append("no weight was quantized: every site was left in float")
    unasked = [skip for skip in report.skipped if not skip.asked]
    if strict and unasked:
        raise RecipeError(
            "a site was left alone, and strict was asked for",
            where=unasked[0].site,
            got=unasked[0].reason,
            expected="every site quantized, or named in an override",
        )
