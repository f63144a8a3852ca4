"""Choices of ranges against the same done plainly on the values themselves."""

import math

import pytest
import torch

from qcompiler import numerics
from qcompiler.errors import RecipeError
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.protocol.histograms import Histogram, MinMax
from qcompiler.protocol.ranges import (
    activation_qparams,
    check_range_method,
    choose_range,
    range_sqnr_db,
)

SIGNED = QuantSpec("int8", "per_tensor", None)
UNSIGNED = QuantSpec("int8", "per_tensor", None, symmetric=False)
E4M3 = QuantSpec("float8_e4m3fn", "per_tensor", None)
E5M2 = QuantSpec("float8_e5m2", "per_tensor", None)
SPECS = [SIGNED, UNSIGNED, E4M3, E5M2]


def heavy_tailed(size: int = 40_000) -> torch.Tensor:
    """Most values are small; a few are a hundred times as large, more of them positive."""
    values = torch.randn(size)
    values[: size // 200] = values[: size // 200].abs() * 30
    values[size // 200 : size // 100] *= 10
    return values


def observed(values, kind=Histogram):
    statistic = kind()
    statistic.update(values)
    return statistic


def rounded(values, low, high, spec):
    scale, zero = activation_qparams(low, high, spec)
    zero = None if zero is None else zero.reshape(1, 1)
    return numerics.fake_quantize(values.reshape(1, -1), scale.reshape(1, 1), zero, spec)[0]


def error(values, low, high, spec):
    return float((rounded(values, low, high, spec) - values).double().square().sum())


@pytest.mark.parametrize("kind", [MinMax, Histogram])
@pytest.mark.parametrize(
    ("values", "signed", "unsigned"),
    [
        ([-1.0, 3.0], (-3, 3), (-1, 3)),
        ([-5.0, 3.0], (-5, 5), (-5, 3)),
        ([2.0, 3.0], (-3, 3), (0, 3)),
        ([-2.0, -3.0], (-3, 3), (-3, 0)),
        ([0.0], (0, 0), (0, 0)),
    ],
)
def test_minmax_takes_all(kind, values, signed, unsigned):
    statistic = observed(torch.tensor(values), kind)
    assert choose_range(statistic, SIGNED, "minmax") == signed
    assert choose_range(statistic, E4M3, "minmax") == signed
    assert choose_range(statistic, UNSIGNED, "minmax") == unsigned


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_quantile_of_the_values(percentile):
    values = heavy_tailed()
    statistic = observed(values)
    width = statistic.result().width

    def near(end, values, share):
        """Between the neighbours of the value that stands at a share of all, give or take a bin."""
        ordered = values.sort().values
        place = round(share * len(values))
        around = ordered[max(place - 3, 0) : place + 2]
        return float(around[0]) - width <= end <= float(around[-1]) + width

    share = percentile / 100
    low, high = choose_range(statistic, SIGNED, "percentile", percentile=percentile)
    assert low == -high
    assert near(high, values.abs(), share)
    low, high = choose_range(statistic, UNSIGNED, "percentile", percentile=percentile)
    assert near(high, values, share)
    assert near(-low, -values, share)


@pytest.mark.parametrize("spec", [SIGNED, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("make", [heavy_tailed, lambda: torch.randn(40_000), lambda: torch.rand(40_000) - 0.2])
def test_mse_comes_near_the_best_symmetric_range(make, spec):
    values = make()
    largest = float(values.abs().max())
    candidates = [largest * 0.01 ** (step / 127) for step in range(128)]
    best = min(error(values, -end, end, spec) for end in candidates)
    low, high = choose_range(observed(values), spec, "mse")
    assert low == -high
    assert min(abs(high - end) for end in candidates) < 1e-4 * largest
    assert error(values, low, high, spec) <= 1.02 * best


@pytest.mark.parametrize("make", [heavy_tailed, lambda: torch.rand(40_000) - 0.2, lambda: torch.rand(20_000) + 1])
def test_mse_comes_near_the_best_pair_of_ends(make):
    values = make()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    grid = [0.01 ** (step / 31) for step in range(32)]
    best = min(error(values, low * a, high * b, UNSIGNED) for a in (grid if low else [1.0]) for b in grid)
    found = choose_range(observed(values), UNSIGNED, "mse")
    assert error(values, *found, UNSIGNED) <= 1.02 * best


def test_mse_clips_what_is_far_out_and_nothing_else():
    values = torch.randn(40_000)
    values[0] = 60.0
    low, high = choose_range(observed(values), UNSIGNED, "mse")
    assert 40 < high < 59
    assert low < 0.75 * float(values.min())
    even = torch.linspace(-1, 1, 10_001)
    assert choose_range(observed(even), SIGNED, "mse")[1] > 0.96


def naive_divergence(counts, start, stop, levels):
    """The reference distribution and its rounded form, bin by bin."""
    inside = counts[start:stop]
    reference = list(inside)
    present = [i for i, count in enumerate(inside) if count]
    reference[present[0]] += sum(counts[:start])
    reference[present[-1]] += sum(counts[stop:])
    spread = [0.0] * len(inside)
    for level in range(levels):
        members = [i for i in range(len(inside)) if i * levels // len(inside) == level]
        filled = [i for i in members if inside[i] > 0]
        for i in filled:
            spread[i] = sum(inside[j] for j in members) / len(filled)
    total, found = sum(reference), 0.0
    for p, q in zip(reference, spread, strict=True):
        if p:
            found += p / total * math.log(p / total / (q / sum(spread)))
    return found


@pytest.mark.parametrize("spec", [SIGNED, UNSIGNED], ids=str)
def test_kl_takes_the_least_divergent_candidate(spec):
    values = heavy_tailed(8000)
    seen = observed(values).result()
    source = seen.magnitudes() if spec.symmetric else seen
    while len(source.counts) > 2048:
        source = source.coarsened(1)
    counts = source.counts.tolist()
    levels = 128 if spec.symmetric else 256
    zero = max(-source.first, 0)
    found = {}
    for step in range(0, 128, 8):  # every eighth, to save time
        start = zero - math.ceil(zero * (1 - step / 128))
        stop = zero + math.ceil((len(counts) - zero) * (1 - step / 128))
        if stop - start >= levels:
            found[start, stop] = naive_divergence(counts, start, stop, levels)
    low, high = choose_range(observed(values), spec, "kl")
    start = math.floor(max(low, source.low) / source.width) - source.first
    stop = math.ceil(high / source.width) - source.first
    assert naive_divergence(counts, start, stop, levels) <= min(found.values()) + 1e-12
    assert 0.02 * seen.high < high < seen.high


def test_kl_cuts_off_a_single_value():
    values = torch.cat([torch.rand(5000), torch.tensor([10.0])])
    low, high = choose_range(observed(values), UNSIGNED, "kl")
    assert low == 0
    assert 1 < high < 5


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_sqnr_is_that_of_the_values(method, spec):
    values = heavy_tailed()
    statistic = observed(values)
    low, high = choose_range(statistic, spec, method)
    expected = numerics.sqnr_db(values, rounded(values, low, high, spec))
    assert range_sqnr_db(statistic.result(), low, high, spec) == pytest.approx(expected, abs=0.1)


def test_sqnr_of_zeros():
    assert range_sqnr_db(observed(torch.zeros(3)).result(), 0.0, 0.0, SIGNED) == math.inf


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_are_the_same_in_every_float_type(spec):
    scale, zero = activation_qparams(-3.0, 5.1, spec)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale.bfloat16()) == float(scale)
    assert float(scale.half()) == float(scale) or float(scale) < 2.0**-14
    assert (zero is None) == spec.symmetric
    if zero is not None:
        assert (zero.dtype, int(zero)) == (torch.uint8, round(3.0 / float(scale)))
    assert rounded(torch.tensor([5.1]), -3.0, 5.1, spec).item() == pytest.approx(
        5.1, rel=0.01 if spec != E5M2 else 0.13
    )


def test_what_is_refused():
    statistic = observed(torch.randn(10))
    for spec in (E4M3, E5M2):
        with pytest.raises(RecipeError, match="levels"):
            choose_range(statistic, spec, "kl")
    with pytest.raises(RecipeError, match="minmax, percentile, mse, kl"):
        check_range_method("entropy", 99.0)
    for percentile in (50.0, 100.1, -1.0):
        with pytest.raises(RecipeError, match="percentile"):
            check_range_method("mse", percentile)
    with pytest.raises(ValueError, match="needs a Histogram"):
        choose_range(observed(torch.randn(3), MinMax), SIGNED, "mse")


def test_the_factor_of_four_bit_floats_covers_the_range():
    factor, zero = activation_qparams(-3.0, 3.0, Scheme.parse("nvfp4").activation)
    assert (factor.dtype, factor.shape, zero) == (torch.float32, (), None)
    assert factor.item() == pytest.approx(3.0 / (6 * 448))
