"""A range of activations chosen your own way: `AverageRange`, used by `InsertQDQ`.

``qcompiler compile MODEL --recipe examples/custom_statistic.py:RECIPE --calib TEXT --to onnx -o OUT``
"""

from typing import ClassVar

from torch import Tensor

from qcompiler.extend import CalibrationError, QuantSpec
from qcompiler.passes import RTN, Assign, InsertQDQ


class AverageRange:
    """The average over tokens of the least and the largest value that each has.

    One token that reaches far does not make the range of all; where every token reaches equally far, nothing is
    clamped but by rounding. Any order of batches gives the same.
    """

    needs_reference: ClassVar[bool] = False
    reach: ClassVar[float] = 1.5
    """Of the range, relative to the average: tokens differ, and clamping costs more than rounding."""

    def __init__(self) -> None:
        self.tokens, self.low, self.high = 0, 0.0, 0.0  # sums

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes ``[..., channels]``."""
        rows = batch.reshape(-1, batch.shape[-1]).double()
        self.tokens += len(rows)
        self.low += float(rows.amin(-1).sum())
        self.high += float(rows.amax(-1).sum())

    def merge(self, other: "AverageRange") -> None:
        """Adds what another instance has seen: of layers that share a range, the inputs are merged."""
        self.tokens += other.tokens
        self.low += other.low
        self.high += other.high

    def range(self, spec: QuantSpec) -> tuple[float, float]:
        """The range that codes of 8 bits and more cover; it is widened to hold zero."""
        if not self.tokens:
            raise CalibrationError("nothing was observed")
        return self.reach * self.low / self.tokens, self.reach * self.high / self.tokens


RECIPE = (Assign("w8a8"), RTN(), InsertQDQ(observer=AverageRange))
