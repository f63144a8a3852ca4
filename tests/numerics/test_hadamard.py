"""Hadamard matrices: orthogonal for every order that is made, and multiplied with factor by factor."""

import pytest
import torch

from qcompiler.numerics.hadamard import (
    block_order,
    factors_of,
    hadamard_matrix,
    multiply,
)

ORDERS = [order for order in range(1, 257) if factors_of(order) is not None]


@pytest.mark.parametrize("order", [*ORDERS, 344, 924])  # 7³ + 1, and twice 461 + 1
def test_matrices_are_orthogonal(order):
    matrix = hadamard_matrix(order)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_orders_of_which_there_is_one():
    assert {1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 76, 100, 108, 140, 148} <= set(ORDERS)
    missing = set(range(4, 257, 4)) - set(ORDERS)
    assert missing == {92, 116, 156, 172, 184, 188, 232, 236}  # known to others, but not from Paley
    assert not any(order % 4 for order in ORDERS[2:])


@pytest.mark.parametrize(
    ("width", "block", "factors"),
    [
        (768, 768, (64, 12)),
        (4096, 4096, (64, 64)),
        (11008, 11008, (32, 344)),
        (14336, 14336, (64, 8, 28)),
        (172, 4, (4,)),
        (184, 8, (8,)),
        (6, 2, (2,)),
        (7, 1, (1,)),
    ],
)
def test_the_largest_block(width, block, factors):
    assert block_order(width) == block
    assert factors_of(block) == factors


@pytest.mark.parametrize("block", [1, 2, 12, 64, 128, 192, 320])
def test_product(block):
    x = torch.randn(3, 2, 2 * block, dtype=torch.float64)
    matrix = hadamard_matrix(block).double() / block**0.5
    expected = (x.reshape(3, 2, 2, block) @ matrix).reshape(x.shape)
    assert torch.allclose(multiply(x, block), expected, rtol=0, atol=1e-12)


def test_product_keeps_dtype_and_empty_batches():
    assert multiply(torch.randn(2, 12).bfloat16(), 12).dtype == torch.bfloat16
    assert multiply(torch.empty(0, 24), 12).shape == (0, 24)


def test_an_order_of_which_there_is_none():
    for function in (hadamard_matrix, lambda order: multiply(torch.ones(order), order)):
        with pytest.raises(ValueError, match="order 6"):
            function(6)
