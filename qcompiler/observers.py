"""Statistics gathered from activations: ``update`` with a batch, ``merge`` with another process's, read ``result``."""

from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

__all__ = ["CrossGram", "Gram", "Statistic"]

_BLOCK = 256


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

    def merge(self, other: "CrossGram") -> None:
        """Adds the other's sum."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)

    def result(self) -> Tensor:
        """float32 ``[channels, channels]``; not divided by the number of rows."""
        if self._sum is None:
            raise ValueError("nothing was observed")
        return self._sum
