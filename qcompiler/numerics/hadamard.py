"""Hadamard matrices: orthogonal, all entries of one size, so that a product with one spreads every value over all.

A matrix of order ``2^k t`` is the Kronecker product of Sylvester's of order ``2^k`` and Paley's of order ``t`` (J.
Math. Phys. 12, 1933), which exists for ``t = q + 1`` where ``q = 3 mod 4``, and ``t = 2 (q + 1)`` where ``q = 1 mod
4``, for every prime power ``q``. The product with a vector goes factor by factor and never forms the whole matrix.
"""

import functools
import itertools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["block_order", "factors_of", "hadamard_matrix", "multiply"]

_LARGEST_FACTOR = 64
"""Sylvester's matrices up to this order are multiplied with as they are."""
_LARGEST_PALEY = 2048


def block_order(width: int) -> int:
    """The largest divisor of ``width`` for which there is a matrix here; 1 where there is no other (odd widths)."""
    divisors = (width // n for n in range(1, width + 1) if width % n == 0)
    return next(order for order in divisors if factors_of(order) is not None)


@functools.cache
def factors_of(order: int) -> tuple[int, ...] | None:
    """Orders of the Kronecker factors, from the left: powers of two, then one of Paley's; None where there is none.

    Args:
        order: positive; 1 and 2 count.
    """
    odd = order
    while odd % 2 == 0:
        odd //= 2
    paley = odd
    while paley > 1 and _paley_field(paley) is None:
        paley *= 2
        if order % paley or paley > _LARGEST_PALEY:
            return None
    rest = order // paley
    factors: list[int] = []
    while rest > _LARGEST_FACTOR:
        factors.append(_LARGEST_FACTOR)
        rest //= _LARGEST_FACTOR
    factors += [rest] if rest > 1 else []
    return (*factors, *([paley] if paley > 1 else [])) or (1,)


def hadamard_matrix(order: int) -> Tensor:
    """A matrix of ±1 with orthogonal rows, float32 ``[order, order]``; the same at every call.

    Raises:
        ValueError: where none is known here.
    """
    factors = factors_of(order)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {order}")
    result = torch.ones(1, 1)
    for factor in factors:
        result = torch.kron(result, _factor(factor))
    return result


def multiply(x: Tensor, block: int) -> Tensor:
    """``x @ H / sqrt(block)`` for every ``block`` elements of the last axis: an orthogonal map.

    Args:
        x: floating point ``[..., n]``, n a multiple of ``block``.
        block: an order of which `factors_of` knows a matrix.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: if ``block`` is no such order.
    """
    factors = factors_of(block)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of order {block}")
    shape, result = x.shape, x
    for factor in factors:  # each time the first axis of a block is multiplied and goes behind the others
        matrix = _factor(factor).to(x.device, x.dtype) / factor**0.5
        blocks = (*shape[:-1], shape[-1] // block, factor, block // factor)
        result = result.reshape(blocks).transpose(-1, -2) @ matrix
    return result.reshape(shape)


@functools.lru_cache(maxsize=64)
def _factor(order: int) -> Tensor:
    with _disable_current_modes():  # what is kept holds numbers, even if it is first wanted where shapes are traced
        return _paley(order) if order & (order - 1) else _sylvester(order)


def _sylvester(order: int) -> Tensor:
    result = torch.ones(1, 1)
    while len(result) < order:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    return result


def _paley_field(order: int) -> int | None:
    """The prime power of which Paley's construction makes a matrix of this order."""
    if order % 4:
        return None
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and _prime_power(q) is not None:
            return q
    return None


def _paley(order: int) -> Tensor:
    q = _paley_field(order)
    assert q is not None
    character = _characters(q)
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = 1
    core[1:, 1:] = character
    if q % 4 == 3:  # the character is odd: a skew matrix
        core[1:, 0] = -1
        return torch.eye(order) + core
    core[1:, 0] = 1  # the character is even: a symmetric conference matrix, doubled
    on, off = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, on) + torch.kron(torch.eye(q + 1), off)


def _characters(q: int) -> Tensor:
    """float32 ``[q, q]``: whether ``a - b`` is a square (1) or not (-1) in the field of ``q`` elements; 0 for a = b."""
    field = _prime_power(q)
    assert field is not None
    prime, degree = field
    elements = list(itertools.product(range(prime), repeat=degree))
    modulus = _irreducible(prime, degree)
    squares = {_product(a, a, modulus, prime) for a in elements if any(a)}
    chi = torch.tensor([0.0 if not any(a) else 1.0 if a in squares else -1.0 for a in elements])
    digits = torch.tensor(elements)
    differences = (digits[:, None] - digits[None]) % prime
    return chi[differences @ prime ** torch.arange(degree - 1, -1, -1)]


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``q = p^k``, p prime; None where q is no such number."""
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    degree, rest = 0, q
    while rest > 1 and rest % prime == 0:
        degree, rest = degree + 1, rest // prime
    return (prime, degree) if q > 1 and rest == 1 else None


@functools.cache
def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """The lower coefficients of a monic polynomial without factors, constant first.

    Up to degree 3, one without a root has none; beyond, every product of two smaller ones is struck out.
    """
    candidates = list(itertools.product(range(prime), repeat=degree))
    if degree <= 3:
        if degree == 1:
            return (0,)
        for low in candidates:
            if all((sum(c * x**i for i, c in enumerate(low)) + x**degree) % prime for x in range(prime)):
                return low
    reducible = set()
    for left in range(1, degree // 2 + 1):
        for a in itertools.product(range(prime), repeat=left):
            for b in itertools.product(range(prime), repeat=degree - left):
                whole = _times((*a, 1), (*b, 1), prime)
                reducible.add(whole[:degree])
    return next(low for low in candidates if low not in reducible)


def _times(a: tuple[int, ...], b: tuple[int, ...], prime: int) -> tuple[int, ...]:
    result = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] = (result[i + j] + x * y) % prime
    return tuple(result)


def _product(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """The product of two polynomials modulo the one with leading coefficient 1 and these lower ones."""
    degree, result = len(modulus), list(_times(a, b, prime))
    while len(result) > degree:
        lead = result.pop()
        for i, c in enumerate(modulus):
            result[len(result) - degree + i] = (result[len(result) - degree + i] - lead * c) % prime
    return tuple(result)
