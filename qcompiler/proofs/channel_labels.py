"""Labels of channels: small integer tensors that stand for a value, and how shapes act on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qcompiler.ir import Dim

__all__ = ["PINNED", "Channels", "Labels", "Stop", "alike", "fixed_shape", "parts_of", "regrouped", "whole"]

PINNED = -1
Labels = Tensor | list[Tensor]
"""The labels of a value; of a node that gives several values, those of each."""


class Stop(Exception):
    """A reader that does not commute with a scale, for this reason."""


@dataclass
class Channels:
    """The labels given out in one walk: which must be equal, and which are pinned."""

    parent: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def give(self, count: int) -> Tensor:
        """New labels, int64 ``[count]``."""
        start = len(self.parent)
        self.parent += range(start, start + count)
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """The label that stands for all that are equal to this one."""
        while self.parent[label] != label:
            self.parent[label] = label = self.parent[self.parent[label]]
        return label

    def join(self, first: Tensor, second: Tensor) -> None:
        """Makes labels of one shape equal, element by element."""
        pairs = torch.stack([first.reshape(-1), second.reshape(-1)], 1).unique(dim=0)
        for one, other in pairs.tolist():
            self.parent[self.root(one)] = self.root(other)

    def pin(self, labels: Tensor, reason: str) -> None:
        """Keeps channels at scale 1; the first reason is remembered."""
        for label in labels[labels >= 0].unique().tolist():
            self.reasons.setdefault(label, reason)

    def free(self) -> Tensor:
        """int64 per label: the number of its free channel, or -1."""
        roots = [self.root(label) for label in range(len(self.parent))]
        pinned = {roots[label] for label in self.reasons}
        numbers: dict[int, int] = {}
        return torch.tensor([PINNED if r in pinned else numbers.setdefault(r, len(numbers)) for r in roots])


def parts_of(labels: Labels) -> list[Tensor]:
    """The labels of every value of a node."""
    return labels if isinstance(labels, list) else [labels]


def whole(labels: Mapping[fx.Node, Labels], node: object) -> Tensor:
    """The labels of a single value, or `Stop`."""
    found = labels.get(node)  # type: ignore[call-overload]
    if not isinstance(found, Tensor):
        raise Stop("it is read as a parameter of an operator")
    return found


def alike(labels: Tensor, axis: int, reason: str) -> Tensor:
    """The labels along one axis, of size 1 there; it stops where they differ."""
    first = labels.narrow(axis, 0, 1)
    if not bool((labels == first).all()):
        raise Stop(reason)
    return first


def regrouped(labels: Tensor, old: Sequence[Dim], new: Sequence[Dim]) -> Tensor:
    """The labels of a reshaped value: its axes are matched from the last, in groups of equal size.

    Within a group of fixed sizes they move as the data does; what remains in front must not carry any.
    """
    full, result = list[int](), list[int]()
    left, right = len(old), len(new)
    while left or right:
        end, stop = left, right
        left, right = max(left - 1, 0), max(right - 1, 0)
        while (sizes := (_size(old[left:end]), _size(new[right:stop])))[0] != sizes[1]:
            is_short = sizes[0][0] < sizes[1][0]
            if sizes[0][1] != sizes[1][1] or not (left if is_short else right):
                left = right = 0  # not to be told: all the rest is one group
                break
            left, right = (left - 1, right) if is_short else (left, right - 1)
        before, after = old[left:end], new[right:stop]
        if all(size == 1 for size in labels.shape[left:end]):
            before, after = [1] * len(before), [1] * len(after)
        elif not all(isinstance(size, int) for size in (*before, *after)):
            raise Stop("a reshape mixes channels with an axis that varies")
        full[:0], result[:0] = before, after  # type: ignore[assignment]
    return labels.expand(full).reshape(result)


def _size(sizes: Sequence[Dim]) -> tuple[int, list[str]]:
    """The product of some sizes: of those that are numbers, and the others."""
    return math.prod(size for size in sizes if isinstance(size, int)), sorted(s for s in sizes if isinstance(s, str))


def fixed_shape(node: fx.Node) -> list[int]:
    """The shape of a value, with 1 for sizes that vary."""
    return [size if isinstance(size, int) else 1 for size in node.meta["shape"]]
