"""The statistics that ranges are chosen from: of all values of a tensor, whatever its channels.

`MinMax` keeps both ends; `Histogram` counts values in bins whose width doubles as values grow, and gives a
`Distribution`. Statistics of channels and rows are in `statistics`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import CalibrationError

__all__ = ["Distribution", "Histogram", "MinMax", "finite_range"]

_FINEST_BITS = 30  # bins are no narrower than the largest magnitude times 2^-30
_FINEST_EXPONENT = -100
_SLICE_ELEMENTS = 1 << 16  # counted at once: the temporaries stay in the cache


class MinMax:
    """The least and the largest value of a tensor."""

    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes a tensor of any shape; the reference does not matter.

        Raises:
            CalibrationError: if a value is not finite.
        """
        if batch.numel():
            low, high = finite_range(batch)
            self._low, self._high = min(self._low, low), max(self._high, high)

    def merge(self, other: "MinMax") -> None:
        """Takes what the other has seen."""
        self._low, self._high = min(self._low, other._low), max(self._high, other._high)

    def result(self) -> tuple[float, float]:
        """The two values."""
        if self._low > self._high:
            raise ValueError("nothing was observed")
        return self._low, self._high


@dataclass(frozen=True)
class Distribution:
    """How often values fell into bins of one width: bin ``i`` begins at ``(first + i) * width``, which belongs to it.

    Attributes:
        counts: int64 ``[bins]``, on the CPU.
        first: the place of the first bin, counted from zero.
        width: of a bin: a power of two.
        low, high: the least and the largest value seen.
    """

    counts: Tensor
    first: int
    width: float
    low: float
    high: float

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64."""
        return (torch.arange(len(self.counts), dtype=torch.float64) + (self.first + 0.5)) * self.width

    def coarsened(self, shift: int) -> "Distribution":
        """The same with bins that are ``2^shift`` times as wide; exact."""
        bins = (torch.arange(len(self.counts)) + self.first) >> shift
        first = self.first >> shift
        counts = torch.zeros(int(bins[-1]) - first + 1, dtype=torch.int64).index_add_(0, bins - first, self.counts)
        return Distribution(counts, first, self.width * 2**shift, self.low, self.high)

    def magnitudes(self) -> "Distribution":
        """The distribution of absolute values; bins begin at zero. A value on the border of two bins may change bin."""
        places = torch.arange(len(self.counts)) + self.first
        folded = torch.where(places < 0, -1 - places, places)
        counts = torch.zeros(int(folded.max()) + 1, dtype=torch.int64).index_add_(0, folded, self.counts)
        largest = max(self.high, -self.low)
        return Distribution(counts, 0, self.width, 0.0 if self.low <= 0 <= self.high else self.low, largest)


class Histogram:
    """How a tensor's values are distributed, in bins that widen as the range grows.

    The width is the smallest power of two with which at most 8192 bins reach over the range seen so far, and bins are
    counted from zero: two bins of one width always make one of the next. So widening loses nothing, and neither the
    cut into batches nor the order of merges changes the result.
    """

    needs_reference: ClassVar[bool] = False
    bins: ClassVar[int] = 8192

    def __init__(self) -> None:
        self._seen: Distribution | None = None

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes a tensor of any shape; the reference does not matter.

        Raises:
            CalibrationError: if a value is not finite.
        """
        if not batch.numel():
            return
        low, high = finite_range(batch)
        exponent = self._exponent(low, high)
        if self._seen is not None:
            exponent = self._exponent(min(low, self._seen.low), max(high, self._seen.high))
        width = 2.0**exponent
        first = math.floor(low / width)
        size = math.floor(high / width) - first + 1
        counts = torch.zeros(size, dtype=torch.int64, device=batch.device)
        for part in batch.reshape(-1).split(_SLICE_ELEMENTS):
            places = torch.floor(part.float() / width)
            is_exact = abs(first) < 1 << 24  # in float32; 16 bits are counted seven times as fast
            places = places.sub_(first).to(torch.int16) if is_exact else places.to(torch.int64).sub_(first)
            counts += torch.bincount(places, minlength=size)
        self._take(Distribution(counts.cpu(), first, width, low, high))

    def merge(self, other: "Histogram") -> None:
        """Takes what the other has seen."""
        if other._seen is not None:
            self._take(other._seen)

    @property
    def has_seen(self) -> bool:
        """Whether there is a result."""
        return self._seen is not None

    def result(self) -> Distribution:
        """The distribution of all values seen."""
        if self._seen is None:
            raise ValueError("nothing was observed")
        return self._seen

    def _take(self, other: Distribution) -> None:
        parts = [other] if self._seen is None else [self._seen, other]
        low, high = min(part.low for part in parts), max(part.high for part in parts)
        exponent = self._exponent(low, high)
        parts = [part.coarsened(exponent - round(math.log2(part.width))) for part in parts]
        first = min(part.first for part in parts)
        counts = torch.zeros(max(part.first + len(part.counts) for part in parts) - first, dtype=torch.int64)
        for part in parts:
            counts[part.first - first : part.first - first + len(part.counts)] += part.counts
        self._seen = Distribution(counts, first, 2.0**exponent, low, high)

    def _exponent(self, low: float, high: float) -> int:
        """Of the width for a range; it grows with the range."""
        exponent = _FINEST_EXPONENT
        if largest := max(-low, high):
            exponent = max(exponent, math.frexp(largest)[1] - _FINEST_BITS)
        if low < high:
            exponent = max(exponent, math.frexp((high - low) / self.bins)[1] - 1)
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= self.bins:
            exponent += 1
        return exponent


def finite_range(batch: Tensor) -> tuple[float, float]:
    """The least and the largest value.

    Raises:
        CalibrationError: if one is not finite.
    """
    low, high = (float(value) for value in batch.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(
            "an activation is not finite",
            got=f"values from {low} to {high}",
            remedy="look for NaN, infinity or overflow in the layers before",
        )
    return low, high
