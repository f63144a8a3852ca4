"""Which range of an activation its codes cover: chosen from a statistic of its values, by pure functions.

The method is what `InsertQDQ` calls its ``observer``, after other toolkits.

| method | range |
|---|---|
| ``minmax`` | all that was seen |
| ``percentile`` | all but a share of the values at each end |
| ``mse`` | the least squared rounding and clipping error |
| ``kl`` | the least divergence of the distribution from its rounded form (integer codes only) |
"""

import inspect
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.numerics import QuantSpec, fp4
from qcompiler.protocol.histograms import Distribution, Histogram, MinMax
from qcompiler.protocol.statistics import RangeStatistic

__all__ = [
    "RangeMethod",
    "activation_qparams",
    "check_range_method",
    "check_range_statistic",
    "choose_range",
    "range_of",
    "range_sqnr_db",
    "squared_error",
]

RangeMethod = Literal["minmax", "percentile", "mse", "kl"]
"""How a range is chosen: see the table of this module."""

_FRACTIONS = tuple(0.01 ** (step / 127) for step in range(128))
_ROUNDS = 3
_KL_BINS = 2048
_KL_CANDIDATES = 128


def check_range_method(method: str, percentile: float) -> None:
    """Refuses an unknown method, and a percentile that is none.

    Raises:
        RecipeError: if so.
    """
    if method not in get_args(RangeMethod):
        raise RecipeError("unknown way to choose a range", got=method, expected=", ".join(get_args(RangeMethod)))
    if not 50 < percentile <= 100:
        raise RecipeError("a percentile lies between 50 and 100", got=percentile, expected="99.9, 99.99, ...")


def choose_range(
    statistic: Histogram | MinMax, spec: QuantSpec, method: RangeMethod = "mse", *, percentile: float = 99.99
) -> tuple[float, float]:
    """The range that codes should cover: ``(-a, a)`` where the format is symmetric, else one with zero inside.

    Args:
        statistic: what was observed; `MinMax` is enough for ``minmax``.
        spec: the number format.
        method: see the table of this module.
        percentile: in percent, for the method of that name: values beyond it (of magnitudes; at each end where there is
            a zero point) are clipped.

    Raises:
        RecipeError: for an unknown method, or ``kl`` with float codes.
    """
    check_range_method(method, percentile)
    if isinstance(statistic, MinMax):
        if method != "minmax":
            raise ValueError(f"{method} needs a Histogram")
        return _admissible(*statistic.result(), spec)
    seen = statistic.result()
    full = _admissible(seen.low, seen.high, spec)
    if method == "percentile":
        return _percentile_range(seen, spec, percentile)
    if method == "mse":
        return _mse_range(seen, spec, full)
    if method == "kl":
        return _kl_range(seen, spec, full)
    return full


def check_range_statistic(kind: type[RangeStatistic], where: str) -> None:
    """Refuses a class that is no `RangeStatistic`.

    Raises:
        RecipeError: saying what is missing.
    """
    missing = [name for name in ("update", "merge", "range") if not callable(getattr(kind, name, None))]
    if not isinstance(getattr(kind, "needs_reference", None), bool):
        missing.append("needs_reference, True or False")
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):
        missing.append("a constructor without arguments")
    if missing:
        raise RecipeError(
            "this class is no statistic that chooses a range",
            where=where,
            got=f"{kind.__name__} without {', '.join(missing)}",
            expected="a class with update(batch, reference), merge(other), range(spec) and needs_reference",
            remedy="see docs/writing-a-pass.md: A statistic",
        )


def range_of(statistic: RangeStatistic, spec: QuantSpec, where: str) -> tuple[float, float]:
    """What a statistic chooses as the range that codes cover, widened as `choose_range` does.

    Args:
        statistic: of somebody else's making.
        spec: the number format.
        where: the site, for the message.

    Raises:
        CalibrationError: if it is no range.
    """
    chosen: object = statistic.range(spec)
    try:
        low, high = (float(end) for end in chosen)  # type: ignore[attr-defined]
        is_range = math.isfinite(low) and math.isfinite(high) and low <= high
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise CalibrationError(
            "a statistic chose something that is no range",
            where=where,
            got=f"{chosen!r} from {type(statistic).__name__}.range({spec})",
            expected="two finite numbers, the least first",
        )
    return _admissible(low, high, spec)


def activation_qparams(low: float, high: float, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for a range, 0-D.

    The scale is float32 with a value that bfloat16 holds, and float16 too from 6e-5 on: a graph computes the same codes
    in every float type. In NVFP4, whose scales are computed at run time, the factor they are relative to.
    """
    if spec.has_factor:
        return fp4.tensor_factor(torch.tensor(max(-low, high))), None
    ends = torch.tensor([low, high], dtype=torch.float32)
    return numerics.range_qparams(ends[0], ends[1], spec, spec.scale_torch_dtype(torch.bfloat16))


def squared_error(seen: Distribution, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The sum of squared differences that quantizing makes, every value taken for the centre of its bin.

    Args:
        seen: the distribution.
        low, high: ranges, float32 ``[n]``.
        spec: the number format.

    Returns:
        float64 ``[n]``.
    """
    scale, zero = numerics.range_qparams(low, high, spec, spec.scale_torch_dtype(torch.bfloat16))
    values = seen.centers.float()[seen.counts > 0]
    counts = seen.counts[seen.counts > 0].double()
    errors = []
    for i in range(len(scale)):
        if zero is None:
            rounded = numerics.round_codes(values / scale[i], spec)
        else:
            least, most = spec.quant_min - float(zero[i]), spec.quant_max - float(zero[i])
            rounded = torch.round(values / scale[i]).clamp_(least, most)
        errors.append(rounded.mul_(scale[i]).sub_(values).double().square_() @ counts)
    return torch.stack(errors)


def range_sqnr_db(seen: Distribution, low: float, high: float, spec: QuantSpec) -> float:
    """Signal to quantization noise ratio of an activation quantized with a range, in dB; inf where it is all zeros."""
    if seen.low == seen.high == 0:
        return math.inf
    ends = torch.tensor([[low], [high]], dtype=torch.float32)
    noise = squared_error(seen, ends[0], ends[1], spec).item()
    signal = (seen.centers.square() @ seen.counts.double()).item()
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


def _admissible(low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """The least range of the kind a format has around another."""
    if spec.symmetric:
        largest = max(-low, high, 0.0)
        return -largest, largest
    return min(low, 0.0), max(high, 0.0)


def _percentile_range(seen: Distribution, spec: QuantSpec, percentile: float) -> tuple[float, float]:
    share = percentile / 100
    if spec.symmetric:
        largest = _quantile(seen.magnitudes(), share)
        return -largest, largest
    return _admissible(_quantile(seen, 1 - share), _quantile(seen, share), spec)


def _quantile(seen: Distribution, share: float) -> float:
    """The value below which a share of all values lies, taken as spread evenly over their bin."""
    below = seen.counts.cumsum(0).double()
    wanted = share * below[-1]
    place = min(int(torch.searchsorted(below, wanted)), len(below) - 1)
    inside = (wanted - (below[place] - seen.counts[place])) / seen.counts[place].clamp(min=1)
    value = (seen.first + place + float(inside)) * seen.width
    return min(max(value, seen.low), seen.high)


def _mse_range(seen: Distribution, spec: QuantSpec, full: tuple[float, float]) -> tuple[float, float]:
    """Fractions of the full range, down to a hundredth; the two ends in turn where they are free."""
    fractions = torch.tensor(_FRACTIONS, dtype=torch.float32)
    if spec.symmetric:
        ends = fractions * full[1]
        best = int(squared_error(seen, -ends, ends, spec).argmin())
        return float(-ends[best]), float(ends[best])
    low, high = full
    for _ in range(_ROUNDS):
        before = low, high
        ends = fractions * full[1]
        high = float(ends[int(squared_error(seen, torch.full_like(ends, low), ends, spec).argmin())])
        ends = fractions * full[0]
        low = float(ends[int(squared_error(seen, ends, torch.full_like(ends, high), spec).argmin())])
        if (low, high) == before:
            break
    return low, high


def _kl_range(seen: Distribution, spec: QuantSpec, full: tuple[float, float]) -> tuple[float, float]:
    """The histogram method of TensorRT, for one side (magnitudes, 128 levels) or two (256 levels).

    For every candidate range, the reference ``P`` is the histogram inside, what lies outside added to its outermost
    bins; the other one, ``Q``, is the histogram inside without that, gathered into as many levels as there are codes
    and spread evenly over the bins that were not empty. The range with the least ``KL(P || Q)`` is taken.

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017. It differs in the bins (powers of two), in taking 128
    candidates rather than every bin, and in adding to the outermost bin that is not empty: in a sparse tail the last
    one seldom holds anything, and the divergence would be infinite.
    """
    if spec.is_float:
        raise RecipeError(
            "the divergence of levels says nothing of float codes", got=f"kl, {spec}", remedy="use mse or minmax"
        )
    levels = 1 << (spec.bits - 1 if spec.symmetric else spec.bits)
    source = seen.magnitudes() if spec.symmetric else seen
    while len(source.counts) > _KL_BINS:
        source = source.coarsened(1)
    counts = source.counts.double()
    zero = min(max(-source.first, 0), len(counts))  # how many bins lie below zero
    above = len(counts) - zero
    least, divergence = full, math.inf
    for step in range(_KL_CANDIDATES):
        fraction = 1 - step / _KL_CANDIDATES
        start, stop = zero - math.ceil(zero * fraction), zero + math.ceil(above * fraction)
        if stop - start < levels:
            break
        found = _divergence(counts, start, stop, levels)
        if found < divergence:
            divergence = found
            low, high = (source.first + start) * source.width, (source.first + stop) * source.width
            least = _admissible(max(low, source.low), min(high, source.high), spec)
    return least


def _divergence(counts: Tensor, start: int, stop: int, levels: int) -> float:
    inside = counts[start:stop]
    present = inside.nonzero()[:, 0]
    if not len(present):
        return math.inf
    reference = inside.clone()
    reference[present[0]] += counts[:start].sum()
    reference[present[-1]] += counts[stop:].sum()
    level = torch.arange(stop - start) * levels // (stop - start)
    filled = (inside > 0).double()
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    places = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    spread = (mass / places.clamp(min=1))[level] * filled
    p, q = reference / reference.sum(), spread / spread.sum()
    return float(torch.xlogy(p, p).sum() - torch.xlogy(p, q).sum())  # p is 0 wherever q is
