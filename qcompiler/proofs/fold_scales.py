"""Folds a scale into the weights of a region: producers divide by it, consumers multiply their columns."""

import torch
from torch import Tensor, fx

from qcompiler.errors import PipelineError
from qcompiler.ir import Graph
from qcompiler.proofs.region import Consumer, Region

__all__ = ["consumer_scale", "fold_scale", "input_factors", "per_channel"]


def fold_scale(graph: Graph, region: Region, scale: Tensor) -> None:
    """Rewrites the float weights of a region; the function of the graph stays the same.

    Args:
        graph: its weights are rewritten, in float32.
        region: of this graph, still in float.
        scale: float ``[region.size]``, positive and finite. What the consumers read becomes ``x / scale``.

    Raises:
        PipelineError: if the scale is not positive and finite, or of another size.
    """
    if tuple(scale.shape) != (region.size,) or not bool((scale > 0).all() and scale.isfinite().all()):
        raise PipelineError(
            "a region is scaled by positive finite numbers",
            where=region.name,
            got=f"{tuple(scale.shape)}, from {float(scale.min()):.3g} to {float(scale.max()):.3g}",
            expected=(region.size,),
        )
    for producer in region.producers:
        factor = _expanded(scale, producer.channels)
        for name in filter(None, (producer.weight, producer.bias)):
            tensor = graph.weights.read(name).float()
            shape = [-1] + [1] * (tensor.dim() - 1)
            graph.rewrite_float(name, tensor / factor.reshape(shape))
    for consumer in region.consumers:
        columns = consumer_scale(region, consumer, scale)
        graph.rewrite_float(consumer.site.weight, graph.weights.read(consumer.site.weight).float() * columns)


def consumer_scale(region: Region, consumer: Consumer, scale: Tensor) -> Tensor:
    """float32 ``[in_features]``: the factor of each column, 1 where the region has no say."""
    return _expanded(scale, consumer.channels)


def per_channel(region: Region, consumer: Consumer, values: Tensor, reduce: str) -> Tensor:
    """Reduces ``[in_features]`` to the region's channels: those that share a scale become one.

    Args:
        region: the region.
        consumer: one of its consumers.
        values: float ``[in_features]``.
        reduce: ``amax`` or ``mean``.

    Returns:
        float32 ``[region.size]``; 0 for channels the consumer does not read.
    """
    taken = consumer.channels >= 0
    result = torch.zeros(region.size)
    return result.scatter_reduce(0, consumer.channels[taken], values.float().cpu()[taken], reduce, include_self=False)


def input_factors(region: Region, scale: Tensor) -> dict[fx.Node, Tensor]:
    """What each value that the consumers read is multiplied by when a scale is folded, float32 ``[in_features]``."""
    return {
        value: 1 / consumer_scale(region, consumer, scale)
        for consumer in region.consumers
        for value in consumer.site.inputs
    }


def _expanded(scale: Tensor, channels: Tensor) -> Tensor:
    padded = torch.cat([scale.float().cpu(), torch.ones(1)])  # the last is for -1
    return padded[channels]
