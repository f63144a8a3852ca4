"""What a statistic is, and those of channels and rows: ``update`` it, ``merge`` it with another, read its ``result``.

A pass asks for one at a value of the graph by a `Tap`, and the sweep gathers it. Those of all values of a tensor, which
ranges are chosen from, are in `histograms`.
"""

from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qcompiler.numerics import QuantSpec
from qcompiler.protocol.histograms import finite_range

__all__ = ["AbsMax", "CrossGram", "Gram", "HeadRange", "RangeStatistic", "Rescalable", "RowSample", "Statistic"]

_BLOCK = 128


class Statistic(Protocol):
    """What a pass may ask to be gathered at a value of the graph.

    Class attributes:
        needs_reference: it also wants the value the model has there without the approximations made so far; the sweep
            then runs every batch twice.
    """

    needs_reference: ClassVar[bool] = False

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes one batch, ``[..., channels]``, and the reference value of the same shape where it asked for it."""

    def merge(self, other: Self) -> None:
        """Adds what another instance has seen, and leaves that one alone."""


class RangeStatistic(Statistic, Protocol):
    """A statistic that says which range of its value codes should cover."""

    def range(self, spec: QuantSpec) -> tuple[float, float]:
        """The least and the largest value to be told apart; what lies beyond is clamped.

        It is widened to hold zero, and to both sides alike where the format is symmetric.

        Args:
            spec: the number format.
        """


@runtime_checkable
class Rescalable(Protocol):
    """A statistic that needs not be gathered anew when every channel of its value was multiplied by a factor."""

    def rescale(self, factor: Tensor) -> None:
        """Becomes what it would be, had every channel been multiplied by ``factor``, float ``[channels]``."""


class Gram:
    """The second moment ``X.T @ X`` of the rows of an activation, as GPTQ's Hessian and AWQ's loss need it.

    Kept in float32 ``[channels, channels]``; only blocks on and above the diagonal are multiplied out.
    """

    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.rows = 0

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Adds ``[..., channels]``; the reference does not matter."""
        rows = batch.reshape(-1, batch.shape[-1]).float()
        width = rows.shape[-1]
        if self._sum is None:
            self._sum = torch.zeros(width, width, dtype=torch.float32, device=batch.device)
        self.rows += rows.shape[0]
        for start in range(0, width, _BLOCK):
            block = slice(start, min(start + _BLOCK, width))
            self._sum[block, start:].addmm_(rows[:, block].T, rows[:, start:])

    def merge(self, other: "Gram") -> None:
        """Adds the other's sum and rows."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)
            self.rows += other.rows

    def rescale(self, factor: Tensor) -> None:
        """``D G D`` with ``D = diag(factor)``."""
        if self._sum is not None:
            factor = factor.to(self._sum.device)
            self._sum *= factor * factor[:, None]

    def result(self) -> Tensor:
        """The symmetric matrix, float32 ``[channels, channels]``; not divided by the number of rows."""
        if self._sum is None:
            raise ValueError("nothing was observed")
        upper = self._sum.triu()
        return upper + upper.triu(1).T


class CrossGram:
    """``Y.T @ X``: the reference value of an activation against the value it has in the rewritten model.

    Kept in float32 ``[channels, channels]``.
    """

    needs_reference: ClassVar[bool] = True

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Adds two values of one shape, ``[..., channels]``."""
        if reference is None:
            raise ValueError("a cross moment needs the reference value")
        rows, other = (t.reshape(-1, t.shape[-1]).float() for t in (batch, reference))
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=batch.device)
        self._sum.addmm_(other.T, rows)

    def rescale(self, factor: Tensor) -> None:
        """``D C D`` with ``D = diag(factor)``: the original model is rescaled alike."""
        if self._sum is not None:
            factor = factor.to(self._sum.device)
            self._sum *= factor * factor[:, None]

    def merge(self, other: "CrossGram") -> None:
        """Adds the other's sum."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)

    def result(self) -> Tensor:
        """float32 ``[channels, channels]``; not divided by the number of rows."""
        if self._sum is None:
            raise ValueError("nothing was observed")
        return self._sum


class AbsMax:
    """The largest magnitude of every channel (the last axis)."""

    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self.rows = 0

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes ``[..., channels]``; the reference does not matter."""
        rows = batch.reshape(-1, batch.shape[-1])
        self.rows += len(rows)
        if len(rows):
            self._take(torch.maximum(rows.amax(0), -rows.amin(0)).float())

    def merge(self, other: "AbsMax") -> None:
        """Takes what the other has seen."""
        self.rows += other.rows
        if other._largest is not None:
            self._take(other._largest)

    def rescale(self, factor: Tensor) -> None:
        """Every magnitude times its channel's factor."""
        if self._largest is not None:
            self._largest = self._largest * factor.abs().to(self._largest.device)

    def result(self) -> Tensor:
        """float32 ``[channels]``."""
        if self._largest is None:
            raise ValueError("nothing was observed")
        return self._largest

    def _take(self, largest: Tensor) -> None:
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)


class RowSample:
    """A few hundred rows of an activation, evenly spaced over all that were seen: to try candidates on.

    Every ``stride``-th row is kept; when there are twice as many as wanted, every other one goes.
    The rows depend on what was seen alone, not on how it was cut into batches.
    """

    needs_reference: ClassVar[bool] = False
    wanted: ClassVar[int] = 256
    """At least this many rows are kept, and fewer than twice as many; all, where there are not so many."""

    def __init__(self) -> None:
        self.rows = 0
        """How many were seen."""
        self._stride = 1
        self._kept: Tensor | None = None

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes ``[..., channels]``; the reference does not matter."""
        rows = batch.reshape(-1, batch.shape[-1])
        chosen = rows[-self.rows % self._stride :: self._stride].float()
        self.rows += len(rows)
        self._keep(chosen)

    def merge(self, other: "RowSample") -> None:
        """Takes the other's rows, thinned alike."""
        if other._kept is None:
            return
        taken = other._kept
        while self._stride < other._stride and self._kept is not None:
            self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._stride = max(self._stride, other._stride)
        self.rows += other.rows
        self._keep(taken[:: self._stride // other._stride])

    def rescale(self, factor: Tensor) -> None:
        """Every row times the factor."""
        if self._kept is not None:
            self._kept = self._kept * factor.to(self._kept.device)

    def result(self) -> Tensor:
        """float32 ``[kept, channels]``."""
        if self._kept is None:
            raise ValueError("nothing was observed")
        return self._kept

    def _keep(self, rows: Tensor) -> None:
        kept = rows.clone() if self._kept is None else torch.cat([self._kept, rows])
        while len(kept) >= 2 * self.wanted:
            kept, self._stride = kept[::2].clone(), 2 * self._stride
        self._kept = kept


class HeadRange:
    """The least and the largest value of every channel of every head, and a few hundred tokens to try formats on."""

    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._tokens = RowSample()
        self._heads = 0

    @property
    def rows(self) -> int:
        """Tokens seen."""
        return self._tokens.rows

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes ``[B, H, S, D]``; the reference does not matter.

        Raises:
            CalibrationError: if a value is not finite.
        """
        if not batch.numel():
            return
        finite_range(batch)
        self._heads = batch.shape[1]
        self._tokens.update(batch.transpose(1, 2).flatten(2))
        self._take(batch.amin((0, 2)).float(), batch.amax((0, 2)).float())

    def merge(self, other: "HeadRange") -> None:
        """Takes what the other has seen."""
        self._tokens.merge(other._tokens)
        self._heads = self._heads or other._heads
        if other._low is not None and other._high is not None:
            self._take(other._low, other._high)

    def result(self) -> tuple[Tensor, Tensor]:
        """Both ends, float32 ``[H, D]``."""
        if self._low is None or self._high is None:
            raise ValueError("nothing was observed")
        return self._low, self._high

    def tokens(self) -> Tensor:
        """Some of the tokens, evenly spaced, float32 ``[1, H, kept, D]``."""
        rows = self._tokens.result()
        return rows.reshape(len(rows), self._heads, -1).transpose(0, 1)[None]

    def _take(self, low: Tensor, high: Tensor) -> None:
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
