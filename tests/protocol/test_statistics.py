import math

import pytest
import torch

from qcompiler.errors import CalibrationError
from qcompiler.protocol.histograms import Histogram, MinMax
from qcompiler.protocol.statistics import AbsMax, CrossGram, Gram, HeadRange, Rescalable, RowSample


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_equals_the_product(width, dtype):
    batches = [torch.randn(2, 3, width).to(dtype), torch.randn(7, width).to(dtype), torch.randn(width).to(dtype)]
    gram = Gram()
    for batch in batches:
        gram.update(batch)
    rows = torch.cat([batch.reshape(-1, width) for batch in batches]).double()
    result = gram.result()
    assert gram.rows == len(rows) == 14
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(result, result.T)


def test_cross_gram_equals_the_product():
    pairs = [(torch.randn(2, 3, 300), torch.randn(2, 3, 300)), (torch.randn(4, 300), torch.randn(4, 300))]
    cross = CrossGram()
    for batch, reference in pairs:
        cross.update(batch, reference)
    rows, expected = (torch.cat([pair[i].reshape(-1, 300) for pair in pairs]).double() for i in (0, 1))
    torch.testing.assert_close(cross.result().double(), expected.T @ rows, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reference"):
        cross.update(torch.ones(1, 300))


@pytest.mark.parametrize("kind", [Gram, CrossGram])
@pytest.mark.parametrize("sizes", [(10,), (4, 6), (1, 0, 9), (2, 3, 5)])
def test_merge_in_any_split(kind, sizes):
    rows, reference = torch.randn(10, 40), torch.randn(10, 40)
    whole = kind()
    whole.update(rows, reference)
    merged = kind()
    for part, expected in zip(rows.split(sizes), reference.split(sizes), strict=True):
        one = kind()
        if len(part):
            one.update(part, expected)
        before = one._sum
        merged.merge(one)
        merged.merge(kind())  # one that saw nothing
        assert one._sum is before
    torch.testing.assert_close(merged.result(), whole.result())
    if kind is Gram:
        assert merged.rows == 10


@pytest.mark.parametrize("kind", [Gram, CrossGram])
def test_merge_copies(kind):
    first, second = kind(), kind()
    second.update(torch.ones(1, 3), torch.ones(1, 3))
    first.merge(second)
    first.update(torch.ones(1, 3), torch.ones(1, 3))
    assert second.result().tolist() == torch.ones(3, 3).tolist()


@pytest.mark.parametrize("kind", [Gram, CrossGram])
def test_nothing_was_observed(kind):
    with pytest.raises(ValueError, match="nothing was observed"):
        kind().result()


def test_a_batch_without_rows():
    gram = Gram()
    gram.update(torch.empty(0, 4))
    assert gram.rows == 0
    assert not gram.result().any()


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_absmax_per_channel():
    batches = [torch.randn(2, 3, 6), torch.randn(4, 6).bfloat16(), torch.empty(0, 6)]
    seen = AbsMax()
    for batch in batches:
        seen.update(batch)
    rows = torch.cat([batch.reshape(-1, 6).float() for batch in batches])
    assert torch.equal(seen.result(), rows.abs().amax(0))
    assert seen.result().dtype == torch.float32
    other = AbsMax()
    other.update(-3 * torch.ones(1, 6))
    other.merge(seen)
    other.merge(AbsMax())
    assert torch.equal(other.result(), seen.result().clamp(min=3))


def test_minmax():
    seen, other = MinMax(), MinMax()
    seen.update(torch.tensor([[1.5, -0.5]]))
    seen.update(torch.empty(0, 2))
    assert seen.result() == (-0.5, 1.5)
    other.update(torch.tensor([-2.0]).bfloat16())
    seen.merge(other)
    seen.merge(MinMax())
    assert seen.result() == (-2.0, 1.5)


def histogram(*batches):
    seen = Histogram()
    for batch in batches:
        seen.update(batch)
    return seen.result()


def equal(a, b):
    same = (a.first, a.width, a.low, a.high) == (b.first, b.width, b.low, b.high)
    return same and torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e-5])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_histogram_counts_every_value_in_its_bin(magnitude, offset):
    values = torch.randn(5000) * magnitude + offset
    seen = histogram(values)
    assert math.log2(seen.width) % 1 == 0
    assert (seen.low, seen.high) == (float(values.min()), float(values.max()))
    assert len(seen.counts) <= Histogram.bins
    naive = [0] * len(seen.counts)
    for value in values.tolist():
        naive[math.floor(value / seen.width) - seen.first] += 1
    assert seen.counts.tolist() == naive
    assert seen.counts[0] > 0
    assert seen.counts[-1] > 0
    if offset < magnitude:  # else float32 has no more values than that in the range
        assert len(seen.counts) > Histogram.bins / 2 - 2
    middle = seen.centers[0]
    assert seen.first * seen.width < middle < (seen.first + 1) * seen.width


@pytest.mark.parametrize("sizes", [(4000,), (1, 3999), (1000, 2000, 1000), (3000, 10, 990)])
def test_histogram_does_not_depend_on_batches_or_merges(sizes):
    values = torch.randn(4000) * torch.logspace(-3, 2, 4000)  # the range grows all the way
    whole = histogram(values)
    assert equal(histogram(*values.split(sizes)), whole)
    assert equal(histogram(values.flip(0)), whole)
    merged = Histogram()
    for part in reversed(values.split(sizes)):
        one = Histogram()
        one.update(part.reshape(1, -1))
        before = one.result()
        merged.merge(one)
        merged.merge(Histogram())
        assert one.result() is before
    assert equal(merged.result(), whole)


def test_histogram_of_zeros_and_of_one_value():
    assert not Histogram().has_seen
    zeros = histogram(torch.zeros(3), torch.zeros(2))
    assert (zeros.counts.tolist(), zeros.low, zeros.high) == ([5], 0.0, 0.0)
    grown = histogram(torch.zeros(3), torch.tensor([0.0, 1000.0]))
    assert (int(grown.counts[0]), int(grown.counts[-1]), int(grown.counts.sum())) == (4, 1, 5)
    same = histogram(torch.full((4,), 3e30))
    assert same.counts.tolist() == [4]
    assert same.first * same.width <= same.low < (same.first + 1) * same.width


def test_coarser_bins_and_magnitudes():
    values = torch.randn(3000) - 0.3
    fine = histogram(values)
    coarse = fine.coarsened(3)
    assert coarse.width == 8 * fine.width
    expected = torch.zeros_like(coarse.counts)
    for value in values.tolist():
        expected[math.floor(value / coarse.width) - coarse.first] += 1
    assert torch.equal(coarse.counts, expected)
    folded = fine.magnitudes()
    assert folded.high == float(values.abs().max())
    naive = torch.zeros_like(folded.counts)
    for value in values.abs().tolist():
        naive[math.floor(value / fine.width)] += 1
    assert torch.equal(folded.counts, naive)


@pytest.mark.parametrize("kind", [MinMax, Histogram])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ranges_of_what_is_not_finite(kind, value):
    with pytest.raises(CalibrationError, match="not finite"):
        kind().update(torch.tensor([1.0, value]))


@pytest.mark.parametrize("kind", [AbsMax, MinMax, Histogram])
def test_no_range_was_observed(kind):
    with pytest.raises(ValueError, match="nothing was observed"):
        kind().result()


# --- rows, and rescaling ----------------------------------------------------------------------------------------------


def sampled(*batches):
    seen = RowSample()
    for batch in batches:
        seen.update(batch)
    return seen


@pytest.mark.parametrize("count", [1, 255, 511, 512, 513, 1024, 1500, 5000])
def test_a_sample_of_rows_is_evenly_spaced(count):
    rows = torch.arange(float(count))[:, None].expand(count, 3)
    seen = sampled(rows)
    stride = 1
    while -(-count // stride) >= 2 * RowSample.wanted:
        stride *= 2
    assert torch.equal(seen.result(), rows[::stride])
    assert seen.rows == count
    assert min(count, RowSample.wanted) <= len(seen.result()) < 2 * RowSample.wanted


@pytest.mark.parametrize("sizes", [(1700,), (1, 1699), (511, 1, 1188), (600, 0, 600, 500), (7,) * 242 + (6,)])
def test_a_sample_does_not_depend_on_batches(sizes):
    rows = torch.randn(1700, 4)
    seen = sampled(*(part.reshape(1, -1, 4) for part in rows.split(sizes)))
    assert torch.equal(seen.result(), sampled(rows).result())


def test_merged_samples():
    first, second = torch.randn(700, 4), torch.randn(3000, 4)
    few, many = sampled(first), sampled(second)
    kept = many.result().clone()
    merged = sampled(first)
    merged.merge(many)
    assert torch.equal(many.result(), kept)
    assert merged.rows == 3700
    assert RowSample.wanted <= len(merged.result()) < 2 * RowSample.wanted
    stride = round(3000 / len(kept))
    for part in (first[::stride], kept):  # thinned alike: the shares of what was seen are kept
        assert any(torch.equal(merged.result()[i : i + 8], part[:8]) for i in range(len(merged.result())))
    back = many
    back.merge(few)
    assert len(back.result()) == len(kept) + len(first[::stride])
    empty = RowSample()
    empty.merge(few)
    assert torch.equal(empty.result(), few.result())
    few.merge(RowSample())
    assert few.rows == 700


@pytest.mark.parametrize("kind", [Gram, CrossGram, AbsMax, RowSample])
def test_rescaled_statistics_are_those_of_rescaled_values(kind):
    batches = [torch.randn(40, 5), torch.randn(3, 7, 5)]
    factor = torch.tensor([2.0, 0.5, 3.0, 1.0, 0.1])
    seen, expected = kind(), kind()
    assert isinstance(seen, Rescalable)
    seen.rescale(factor)  # nothing was seen yet
    for batch in batches:
        seen.update(batch, 2 * batch)
        expected.update(batch * factor, 2 * batch * factor)
    seen.rescale(factor)
    torch.testing.assert_close(seen.result(), expected.result())


@pytest.mark.parametrize("kind", [Gram, AbsMax, RowSample])
def test_rows_are_counted(kind):
    seen, other = kind(), kind()
    seen.update(torch.ones(2, 3, 4))
    seen.update(torch.empty(0, 4))
    other.update(torch.ones(5, 4))
    seen.merge(other)
    assert seen.rows == 11


@pytest.mark.parametrize("kind", [MinMax, Histogram])
def test_what_cannot_be_rescaled(kind):
    assert not isinstance(kind(), Rescalable)


def test_no_rows_were_sampled():
    with pytest.raises(ValueError, match="nothing was observed"):
        RowSample().result()


def test_ranges_of_heads():
    batches = [torch.randn(2, 3, 5, 4), torch.randn(1, 3, 300, 4)]
    whole, parts = HeadRange(), [HeadRange(), HeadRange()]
    for batch, part in zip(batches, parts, strict=True):
        whole.update(batch)
        part.update(batch)
    flat = torch.cat([batch.transpose(1, 2).flatten(0, 1) for batch in batches])
    for seen in (whole, parts[0]):
        if seen is parts[0]:
            seen.merge(parts[1])
        assert seen.rows == 310
        low, high = seen.result()
        assert torch.equal(low, flat.amin(0))
        assert torch.equal(high, flat.amax(0))
    kept = whole.tokens()
    assert kept.shape == (1, 3, 310, 4)
    assert torch.equal(kept[0].transpose(0, 1), flat)


def test_ranges_of_heads_refuse_what_is_not_finite():
    seen = HeadRange()
    seen.update(torch.zeros(2, 3, 0, 4))
    with pytest.raises(ValueError, match="nothing"):
        seen.result()
    with pytest.raises(CalibrationError, match="not finite"):
        seen.update(torch.full((1, 1, 1, 1), float("nan")))
