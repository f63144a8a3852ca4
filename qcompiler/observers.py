"""Statistics gathered from activations: ``update`` with a batch, ``merge`` with another process's, read ``result``."""

from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = ["Gram", "Statistic"]

_BLOCK = 256


class Statistic(Protocol):
    """What a pass may ask to be gathered at a value of the graph."""

    def update(self, batch: Tensor) -> None:
        """Takes one batch, ``[..., channels]``."""

    def merge(self, other: Self) -> None:
        """Adds what another instance has seen, and leaves that one alone."""


class Gram:
    """The second moment ``X.T @ X`` of the rows of an activation, as GPTQ's Hessian and AWQ's loss need it.

    Kept in float32 ``[channels, channels]``; only blocks on and above the diagonal are multiplied out.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.rows = 0

    def update(self, batch: Tensor) -> None:
        """Adds ``[..., channels]``."""
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
