"""`GPTQ`: rounds weights column by column, each time moving the error onto the columns not rounded yet."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from qcompiler import numerics
from qcompiler.ir import Graph, Segment, Site
from qcompiler.passes.rtn import RTN, gathered_gram, implied_assign, refuse_codebooks, unreached
from qcompiler.passes.solvers.gptq_solver import solve_gptq
from qcompiler.protocol import (
    CANONICAL,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    CrossGram,
    Effect,
    Gram,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Tap,
    Wave,
    Within,
)

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(Pass):
    """Quantizes weights one input channel at a time, compensating each error with the channels that are left.

    ``linear(x, W)`` becomes ``linear(x, dequantize(codes, scale))`` with codes that keep ``||X W' - X Q'||`` small for
    the calibration inputs ``X``, through the Gram matrix ``X'X`` alone. Sites are taken in true sequence: the inputs of
    ``o`` are gathered with ``q``, ``k`` and ``v`` quantized already, those of ``down`` with ``gate`` and ``up``.
    Sites that read the same value share one Gram matrix, one factorization and one column loop. An expert that no
    calibration row is sent to is rounded to nearest.

    Attributes:
        bits: with ``group_size`` and ``symmetric``, shorthand for an `Assign` ahead of this pass; None: schemes are
            assigned already.
        group_size: elements per scale; -1: per output channel.
        symmetric: no zero point.
        act_order: take the channels with the largest activations first. Groups stay where they are (static groups), so
            nothing has to be reordered at run time.
        damping: added to the Gram diagonal, as a fraction of its mean; grows until the factorization succeeds.
        sweeps: passes of coordinate descent over the finished codes, each column rounded anew given all others
            (arXiv 2309.01885).
        correction: how far each layer also makes good what quantizing the layers before it changed in its input, from 0
            to 1 (arXiv 2504.02692). Above 0 the calibration batches also run through the original weights, which
            doubles the time of the sweep.

    Raises:
        RecipeError: for options out of range.

    Source: arXiv 2210.17323, algorithm 1; act-order and static groups from its reference implementation.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool = True
    damping: Annotated[float, Within(0, 1)] = 0.05
    sweeps: Annotated[int, Within(0)] = 2
    correction: Annotated[float, Within(0, 1)] = 0.5

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.implied_passes()  # a shorthand that means nothing is refused here

    def implied_passes(self) -> tuple[Pass, ...]:
        """An `Assign` where ``bits`` is given."""
        return implied_assign(self.bits, self.group_size, self.symmetric)

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """Sites with a scheme, in true sequence."""
        waves = [[site for site in wave if graph.schemes[site.name].weight is not None] for wave in segment.waves()]
        return [wave for wave in waves if wave]

    def check(self, graph: Graph) -> None:
        """Refuses schemes with a codebook."""
        refuse_codebooks(graph, self)

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """The Gram matrix of every distinct input and, with correction, the cross moment with its original value."""
        kinds = (Gram, CrossGram) if self.correction else (Gram,)
        return [Tap(value, kind) for site in wave for value in site.inputs for kind in kinds]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Solves the sites of a wave, those with one input and one scheme together."""
        together: dict[Any, list[Site]] = {}
        for site in wave:
            key = (site.inputs, context.graph.schemes[site.name].weight, context.scale_dtype(site))
            together.setdefault(key, []).append(site)
        reports: list[SiteReport] = []
        for (inputs, _, _), sites in together.items():
            gram, cross = gathered_gram(inputs, statistics), None
            if self.correction:
                cross = CrossGram()
                for value in inputs:
                    cross.merge(statistics[Tap(value, CrossGram)])
            if gram.rows == 0:
                reports += self._round_unreached(sites, context)
            else:
                reports += self._solve(sites, gram, cross, context)
        return PassResult(modified=bool(reports), sites=tuple(reports))

    def _round_unreached(self, sites: list[Site], context: PassContext) -> list[SiteReport]:
        """Rounds experts to nearest that no calibration row was sent to."""
        details = unreached(sites)
        done = RTN().rewrite(sites, {}, context)
        return [replace(report, method=self.name, details=details) for report in done.sites]

    def _solve(self, sites: list[Site], gram: Gram, cross: CrossGram | None, context: PassContext) -> list[SiteReport]:
        start = time.perf_counter()
        spec = context.graph.schemes[sites[0].name].weight
        assert spec is not None
        weights = [context.weight(site) for site in sites]
        second_moment = gram.result()
        solutions = solve_gptq(
            weights,
            second_moment,
            spec,
            context.scale_dtype(sites[0]),
            act_order=self.act_order,
            damping=self.damping,
            sweeps=self.sweeps,
            cross=None if cross is None else cross.result(),
            correction=self.correction,
        )
        seconds = (time.perf_counter() - start) / len(sites)
        reports = []
        for site, weight, solution in zip(sites, weights, solutions, strict=True):
            energy = ((weight @ second_moment) * weight).sum(dtype=torch.float64).item() or 1.0
            reports.append(
                SiteReport(
                    site.name,
                    self.name,
                    str(spec),
                    numerics.sqnr_db(weight, solution.qtensor.dequantize()),
                    output_error=solution.loss / energy,
                    rtn_output_error=solution.rtn_loss / energy,
                    seconds=seconds,
                    details={
                        "damping": solution.damping,
                        "dead_columns": solution.dead_columns,
                        "calibration_rows": gram.rows,
                    },
                )
            )
            context.graph.set_weight(site, solution.qtensor)
        return reports
