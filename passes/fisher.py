"""`Fisher`: measures how much the loss minds an error of each weight, for passes that weigh errors by it."""

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.errors import CalibrationError
from qcompiler.ir import Graph, Site
from qcompiler.protocol import (
    CANONICAL,
    FISHER,
    FLOAT_ACTIVATIONS,
    FLOAT_CACHE,
    FLOAT_WEIGHTS,
    Effect,
    Pass,
    PassContext,
    PassResult,
)
from qcompiler.sweep import measure_fisher

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher(Pass):
    """Measures the diagonal of the Fisher information of weights, ``graph.fisher``; the graph stays as it is.

    The diagonal is the sum over calibration sequences of the squared derivative of a sequence's cross entropy, by a
    forward and a backward sweep of its own (`qcompiler.sweep`), whose memory does not grow with depth. Sites that stay
    in float are left out, where schemes are assigned already.

    It stands ahead of what rounds activations or caches, through which no derivative passes. Whatever changes weights
    behind it ends what it says: a pipeline in which one stands between it and a pass that needs it is refused.

    Source: arXiv 2306.07629, section 4.1.
    """

    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FLOAT_ACTIVATIONS, FLOAT_CACHE})
    establishes: ClassVar[frozenset[str]] = frozenset({FISHER})

    @property
    def is_calibrated(self) -> bool:
        """It is: the loss is that of the calibration tokens."""
        return True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Fills ``graph.fisher``."""
        run = context.calibration
        if run is None or not run.batches:
            raise CalibrationError("a calibrated pass needs calibration data", where=self.name, got="no batches")

        def is_quantized(site: Site) -> bool:
            scheme = graph.schemes.get(site.name)
            return scheme is None or scheme.weight is not None

        graph.fisher = measure_fisher(
            graph,
            run.batches,
            is_quantized,
            device=context.device,
            work_dir=run.work_dir,
            value_budget=run.value_budget,
            progress=run.progress,
        )
        return PassResult(modified=False)
