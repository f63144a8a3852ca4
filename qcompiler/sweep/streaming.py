"""`sweep`: once through the graph, segment by segment: gather statistics, rewrite, hand the frontier on.

Memory is one segment's weights, its statistics, and the calibration values at the current cut, whatever the depth.
Inside a segment (`position`) the batches advance only as far as the next wave's statistics need, and go on from there
with rewritten weights, so every node runs once; only where a rewrite touches what has run already does the segment
start again from its inputs.

Passes are applied to a segment one after the other. Statistics that a later pass wants too are kept, as far as what was
rewritten in between has not touched them; where an exact pass has rescaled a value, so are its statistics. A pass that
calls itself exact is held to it: a probe runs through the segment before and after.
"""

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompiler.errors import CalibrationError, PipelineError, ResourceError
from qcompiler.ir import Graph, Segment, SegmentedGraph, Trimmer, descendants, segment_graph
from qcompiler.numerics import Scheme
from qcompiler.protocol import (
    DROP,
    WEIGHTS_QUANTIZED,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Rescalable,
    Rescale,
    SiteReport,
    Skip,
    Statistic,
    Tap,
    Wave,
    check_declared,
    check_exact,
    state_of,
)
from qcompiler.sweep.position import Batch, Frontier, OutsideValues, Position, SweepContext, original_name
from qcompiler.sweep.value_store import ValueStore

__all__ = ["Progress", "SweepReport", "default_value_budget", "sweep"]

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with segments done, segments in all, and a description."""


@dataclass
class SweepReport:
    """What happened in a sweep."""

    sites: list[SiteReport] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: int = 0
    seconds: float = 0.0
    bytes_spilled: int = 0


def default_value_budget() -> int:
    """A quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def sweep(
    graph: Graph,
    passes: Sequence[Pass],
    batches: Sequence[Batch],
    context: PassContext,
    *,
    work_dir: Path,
    probe: Batch | None = None,
    value_budget: int | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Applies passes to a graph in one sweep.

    Args:
        graph: rewritten in place.
        passes: the swept passes of one stage, in order.
        batches: calibration inputs; empty where no pass is calibrated.
        context: device and seed.
        probe: a small input on which passes that are declared exact are compared with what was there before; the first
            of the batches by default.
        work_dir: rewritten tensors are written to a new directory in it after each segment, and read from there
            afterwards.
        value_budget: bytes of calibration values held in memory; a quarter of the machine's by default.
        progress: called before every segment.

    Raises:
        CalibrationError: if a pass is calibrated and there are no batches, or exact and there is nothing to check it
            with.
        PipelineError: if a pass asks for statistics where it asked for none when the sweep began.
        VerificationError: if a pass is not exact as declared, or did not say truly whether it changed something.
        ResourceError: if the work directory cannot be written.
    """
    if any(item.is_calibrated for item in passes) and not batches:
        raise CalibrationError("a calibrated pass needs calibration data", got="no batches")
    exact = [item.name for item in passes if item.effect is Effect.EXACT]
    if exact and probe is None and not batches:
        raise CalibrationError("a pass that is declared exact is checked on inputs", where=exact[0], got="no inputs")
    start = time.perf_counter()
    directory = _new_directory(work_dir)
    cut = segment_graph(graph)
    store = ValueStore(value_budget if value_budget is not None else default_value_budget(), directory)
    try:
        probes = [] if not exact else [probe if probe is not None else batches[0]]
        running = _Sweep(graph, cut, passes, batches, probes, context, store)
        for segment in cut.segments:
            names = ", ".join(site.name for site in segment.sites)
            _log.info("segment %d of %d: %s", segment.index + 1, len(cut.segments), names or "no layers")
            if progress is not None:
                progress(segment.index, len(cut.segments), names)
            if running.rewrite_segment(segment):
                graph.weights.spill(directory, f"segment-{segment.index:05d}")
        if progress is not None:
            progress(len(cut.segments), len(cut.segments), "")
    finally:
        store.close()
    report = running.report
    report.segments, report.seconds = len(cut.segments), time.perf_counter() - start
    report.bytes_spilled = store.bytes_spilled
    return report


def _new_directory(work_dir: Path) -> Path:
    """A directory of this sweep's own: tensors written by an earlier one are still read from there."""
    for number in itertools.count():
        try:
            (work_dir / f"sweep-{number:02d}").mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ResourceError("the work directory cannot be written", where=work_dir, got=error) from error
        return work_dir / f"sweep-{number:02d}"
    raise AssertionError("unreachable")


class _Sweep:
    """The passes of one sweep, and the frontier that the batches have reached so far."""

    def __init__(
        self,
        graph: Graph,
        cut: SegmentedGraph,
        passes: Sequence[Pass],
        batches: Sequence[Batch],
        probes: Sequence[Batch],
        context: PassContext,
        store: ValueStore,
    ) -> None:
        self.report = SweepReport()
        self._graph, self._passes, self._pass_context, self._memory = graph, passes, context, Trimmer()
        taps = {s.index: [tap for item in passes for tap in self._taps(item, s)] for s in cut.segments if batches}
        last_tapped = max((index for index, wanted in taps.items() if wanted), default=-1)
        self._last_executed = len(cut.segments) - 1 if probes else last_tapped
        """Behind this segment nothing is calibrated or checked, so nothing is computed."""
        self._has_reference = any(tap.kind.needs_reference for wanted in taps.values() for tap in wanted)
        outside = OutsideValues(graph, cut.prologue, context.device)
        everything = [*probes, *batches]
        self._context = SweepContext(
            graph, context.device, store, everything, len(probes), self._has_reference, outside
        )
        self._frontier = Frontier.of_inputs(self._context)
        self._skip_sites_in_no_segment(cut)

    def _taps(self, item: Pass, segment: Segment) -> list[Tap]:
        return [tap for wave in item.waves(segment, self._graph) for tap in item.statistics(wave, self._graph)]

    def _skip_sites_in_no_segment(self, cut: SegmentedGraph) -> None:
        """Leaves sites in float that are never reached."""
        inside = {site.name for segment in cut.segments for site in segment.sites}
        for item in self._passes:
            for site in self._graph.sites() if WEIGHTS_QUANTIZED in item.establishes else ():
                if site.name not in inside and self._graph.schemes.get(site.name, Scheme()) != Scheme():
                    self._graph.schemes[site.name] = Scheme()
                    reason = "used in several segments, or not on the way to the first output"
                    self.report.skips.append(Skip(site.name, item.name, reason))

    def rewrite_segment(self, segment: Segment) -> bool:
        """Applies every pass to a segment; tells whether one of them changed it."""
        position = Position(self._context, segment, self._frontier)
        is_modified = False
        kept: dict[Tap, Statistic] = {}
        for index, item in enumerate(self._passes):
            following = self._passes[index + 1 :]
            position.keep_start = item.rewrites_upstream or bool(following)
            waves = list(item.waves(segment, self._graph))
            for number, wave in enumerate(waves):
                taps = item.statistics(wave, self._graph)
                if missing := [tap for tap in taps if tap not in kept]:
                    kept |= self._gather(item, missing, waves[number:], position)
                result = self._rewrite(item, wave, {tap: kept[tap] for tap in taps}, position)
                wanted = {tap for other in waves[number + 1 :] for tap in item.statistics(other, self._graph)}
                wanted.update(tap for other in following for tap in self._taps(other, segment))
                kept = _carried_over(kept, wanted, item, wave, result)
                self._memory.trim()
                if result.modified:
                    is_modified = True
                    position.rewind_if_executed(wave, upstream=item.rewrites_upstream)
        self._frontier = position.finish() if segment.index < self._last_executed else position.abandon()
        self._forget_originals(segment)
        self._memory.trim()
        return is_modified

    def _gather(
        self, item: Pass, taps: Sequence[Tap], pending: Sequence[Wave], position: Position
    ) -> dict[Tap, Statistic]:
        """Runs the batches on as far as the next wave of a pass needs: its statistics.

        Args:
            item: the pass.
            taps: where to gather what.
            pending: its next wave, and those behind.
            position: of the batches.
        """
        wave, *others = pending
        if position.segment.index > self._last_executed:
            raise PipelineError(
                "a pass asks for statistics where it asked for none when the sweep began",
                where=f"{item.name}: {', '.join(site.name for site in wave)}",
            )
        later = [tap for other in others for tap in item.statistics(other, self._graph)]
        return position.gather(taps, later, pending)

    def _rewrite(self, item: Pass, wave: Wave, statistics: Mapping[Tap, Any], position: Position) -> PassResult:
        """Lets a pass rewrite a wave, and holds it to what it declares."""
        if self._has_reference and item.effect is Effect.APPROXIMATE:
            self._remember_originals(wave)
        segment = position.segment
        before = state_of(self._graph, segment.nodes())
        expected = position.probe_outputs() if item.effect is Effect.EXACT else []
        result = item.rewrite(wave, statistics, replace(self._pass_context, segment=segment))
        where = f"{item.name}, segment {segment.index}"
        check_declared(item, result, before, state_of(self._graph, segment.nodes()), where)
        if item.effect is Effect.EXACT and result.modified:
            width = max((site.in_features for site in segment.sites), default=1)
            check_exact(expected, position.probe_outputs(), width, where)
        self.report.sites += result.sites
        self.report.skips += result.skips
        self.report.regions += [dict(region) for region in result.regions]
        self.report.notes += [note for note in result.notes if note not in self.report.notes]
        return result

    def _remember_originals(self, wave: Wave) -> None:
        """Keeps float weights within reach, under another name, for the reference lane; nothing is copied."""
        for site in wave:
            if site.weight in self._graph.weights and original_name(site) not in self._graph.weights:
                self._graph.weights.alias(original_name(site), site.weight)

    def _forget_originals(self, segment: Segment) -> None:
        for site in segment.sites:
            if original_name(site) in self._graph.weights:
                self._graph.weights.remove(original_name(site))


def _carried_over(
    kept: Mapping[Tap, Statistic], wanted: set[Tap], item: Pass, wave: Wave, result: PassResult
) -> dict[Tap, Statistic]:
    """The statistics that are wanted later and still true after a rewrite."""
    if not result.modified:
        return {tap: statistic for tap, statistic in kept.items() if tap in wanted}
    changed = descendants([node for site in wave for node in site.nodes])
    of_value = {tap.value: change for tap, change in result.statistics.items()}
    found: dict[Tap, Statistic] = {}
    for tap in wanted.intersection(kept):
        change, statistic = result.statistics.get(tap, of_value.get(tap.value)), kept[tap]
        if change is DROP or (change is None and item.effect is not Effect.EXACT and tap.value in changed):
            continue
        if isinstance(change, Rescale):
            if not isinstance(statistic, Rescalable):
                continue
            statistic.rescale(change.factor)
        found[tap] = statistic
    return found
