import pytest
import torch

from qcompiler.observers import CrossGram, Gram


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
