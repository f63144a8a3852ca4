"""What kernels ought to reach, as ratios to what the same GPU does in the same run.

Set for an H200 (4.3 TB/s of copies); ratios to copies and to cuBLAS carry over to other GPUs better than times do.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Goal", "attention_goal", "linear_goal"]


@dataclass(frozen=True)
class Goal:
    """A bound.

    Attributes:
        kind: ``bandwidth``, a share of copy bandwidth, or ``speedup``, over the best of cuBLAS in 16 bits.
        least: that has to be reached.
        aim: that is hoped for; None where nothing more is.
    """

    kind: Literal["bandwidth", "speedup"]
    least: float
    aim: float | None = None

    def is_met(self, share: float | None, speedup: float | None) -> bool | None:
        """Whether it was reached; None where it could not be seen."""
        value = share if self.kind == "bandwidth" else speedup
        return None if value is None else value >= self.least

    def __str__(self) -> str:
        if self.kind == "bandwidth":
            return f"≥ {self.least:.0%}" + (f" (aim {self.aim:.0%})" if self.aim else "")
        return f"≥ {self.least:.2f}×" + (f" (aim {self.aim:.1f}×)" if self.aim else "")


def linear_goal(name: str, rows: int, out_features: int, in_features: int) -> Goal | None:
    """The goal of a linear layer in a number format (`linear_times.FORMATS`).

    Bandwidth is asked of 8192 × 8192, where launching no longer counts; speed-ups of every shape with so many rows.
    """
    is_large = out_features == in_features == 8192
    if name == "w4a16":
        if rows <= 16:
            return Goal("bandwidth", 0.60, 0.85) if is_large else None
        if rows == 64:
            return Goal("speedup", 1.2, 1.9)
        return {256: Goal("speedup", 1 / 1.3), 2048: Goal("speedup", 1 / 1.05)}.get(rows)
    if name == "w8a16" and rows == 1 and is_large:
        return Goal("bandwidth", 0.75)
    if name in ("w8a8", "fp8") and rows >= 2048:
        return Goal("speedup", 1.6)
    return None


def attention_goal(context: int) -> Goal | None:
    """The goal of decode attention over so many tokens."""
    return Goal("bandwidth", 0.70) if context >= 32_768 else None
