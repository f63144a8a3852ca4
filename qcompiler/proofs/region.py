"""What a region is: producers and consumers that may share a scale."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx

from qcompiler.ir import Site

__all__ = ["Consumer", "Producer", "Refusal", "Region", "Regions"]


@dataclass(frozen=True)
class Producer:
    """A weight that takes the inverse of a region's scale.

    Attributes:
        kind: ``norm`` (the weight and bias of a norm) or ``linear`` (the rows and bias of a linear layer).
        name: the site of a linear layer, the weight of a norm without ``.weight``.
        node: the norm or the linear layer.
        weight, bias: names of the tensors.
        channels: int64 ``[outputs]``, the region's channel of each output, -1 for those that keep their scale.
    """

    kind: Literal["norm", "linear"]
    name: str
    node: fx.Node
    weight: str
    bias: str | None
    channels: Tensor


@dataclass(frozen=True)
class Consumer:
    """A linear layer whose columns take a region's scale.

    Attributes:
        site: the layer.
        channels: int64 ``[in_features]``, the region's channel of each input, -1 for those that keep their scale.
    """

    site: Site
    channels: Tensor


@dataclass(frozen=True)
class Region:
    """Producers and consumers that may share a scale: ``outputs / s`` here, ``columns * s`` there.

    Attributes:
        size: the number of scales that may be chosen freely.
        producers, consumers: who takes them.
        notes: channels that were left out, with the reason.
    """

    size: int
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Producers → consumers."""
        made = ", ".join(producer.name for producer in self.producers)
        return f"{made} -> {', '.join(consumer.site.name for consumer in self.consumers)}"


@dataclass(frozen=True)
class Refusal:
    """A producer whose outputs cannot be scaled, and why."""

    producer: str
    reason: str


@dataclass(frozen=True)
class Regions:
    """What `find_regions` found, in graph order, and what it refused."""

    found: tuple[Region, ...] = ()
    refused: tuple[Refusal, ...] = ()
