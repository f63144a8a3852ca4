"""`GPTQ`: rounds weights column by column, each time moving the error onto the columns not rounded yet."""

from dataclasses import dataclass
from typing import Annotated

from qcompiler.numerics import QuantSpec
from qcompiler.passes.assign import ShorthandQuantizer
from qcompiler.passes.solvers.gptq_solver import solve_gptq
from qcompiler.protocol import CrossGram, Gram, SharedInput, Solution, Within

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(ShorthandQuantizer):
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

    act_order: bool = True
    damping: Annotated[float, Within(0, 1)] = 0.05
    sweeps: Annotated[int, Within(0)] = 2
    correction: Annotated[float, Within(0, 1)] = 0.5

    def kinds(self, spec: QuantSpec) -> tuple[type[Gram] | type[CrossGram], ...]:
        """The Gram matrix and, with correction, the cross moment with the original value."""
        return (Gram, CrossGram) if self.correction else (Gram,)

    def quantize_together(self, layers: SharedInput) -> list[Solution]:
        """One factorization and one column loop for layers with one input and one format."""
        assert layers.gram is not None
        solutions = solve_gptq(
            layers.weights,
            layers.gram,
            layers.spec,
            layers.scale_dtype,
            act_order=self.act_order,
            damping=self.damping,
            sweeps=self.sweeps,
            cross=layers.cross,
            correction=self.correction,
        )
        return [
            Solution(
                found.qtensor,
                {"damping": found.damping, "dead_columns": found.dead_columns},
                found.loss,
                found.rtn_loss,
            )
            for found in solutions
        ]
