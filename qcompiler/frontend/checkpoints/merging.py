"""Layers that transformers puts together when it loads them, put together as codes.

Checkpoints hold the experts of a mixture one by one, and of each the gate and up projections apart; models of
transformers have one tensor of all, which the canonical graph takes apart again, expert by expert. What happens to the
numbers on that way is known to the store; where a weight of the graph is the rows of some layers one below the other,
its codes and scales are so, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompiler.frontend.checkpoints.contents import PARTS, Checkpoint, Layer
from qcompiler.ir import Graph, Site
from qcompiler.numerics import QuantSpec
from qcompiler.storage import rearrangement

__all__ = ["merge_layers"]


def merge_layers(graph: Graph, site: Site, checkpoint: Checkpoint) -> tuple[Layer | None, Sequence[Layer]]:
    """Stores the parts of a weight that is made of layers of a checkpoint, beside the weight; no code is read.

    Args:
        graph: whose store gets the parts.
        site: with a float weight.
        checkpoint: as read.

    Returns:
        What the site is, and the layers that it is made of; None where it is made of none, or they cannot be merged.
    """
    found = rearrangement(graph.weights.version(site.weight), checkpoint.versions)
    if found is None:
        return None, ()
    layers = [checkpoint.versions[version] for version in found[0]]
    spec = _common_spec(layers, checkpoint) if _is_stacked(found[1], layers, site) else None
    if spec is None:
        return None, ()
    for part in PARTS:
        names = tuple(f"{layer.weight}_{part}" for layer in layers)
        if names[0] not in checkpoint.parts:
            continue
        info = checkpoint.parts.info(names[0])
        function, shape = _merging(part, layers, spec, info.shape)
        name = f"{site.weight}_{part}"
        graph.weights.derive(name, names, function, dtype=info.dtype, shape=shape, store=checkpoint.parts)
    rows = sum(layer.rows for layer in layers)
    return replace(layers[0], rows=rows, scheme=replace(layers[0].scheme, weight=spec)), layers


def _is_stacked(function: Callable[..., Tensor], layers: Sequence[Layer], site: Site) -> bool:
    """Whether a function puts matrices one below the other; tried on small ones whose numbers are all different."""
    shape = (sum(layer.rows for layer in layers), layers[0].columns)
    if shape != (site.out_features, site.in_features) or any(layer.columns != shape[1] for layer in layers):
        return False
    probes = torch.arange(len(layers) * 6.0).reshape(len(layers), 2, 3)
    try:
        return torch.equal(function(*probes), probes.flatten(0, 1))
    except Exception:  # an operation of transformers that wants shapes of its own
        return False


def _common_spec(layers: Sequence[Layer], checkpoint: Checkpoint) -> QuantSpec | None:
    """The format that layers have together; None where they differ in more than rows have scales of their own for."""
    first = layers[0]
    spec = first.scheme.weight
    assert spec is not None
    for layer in layers[1:]:
        pairs = (
            (first.order, layer.order),
            (first.input_scale, layer.input_scale),
            (first.input_zero_point, layer.input_zero_point),
            (first.input_multiplier, layer.input_multiplier),
        )
        if layer.scheme != first.scheme or not all(_is_equal(one, two) for one, two in pairs):
            return None
    if len(layers) == 1:
        return spec
    if spec.granularity == "per_block" and any(layer.rows % (spec.group_size or 1) for layer in layers[:-1]):
        return None
    if spec.has_factor and not _is_shared("factor", layers, checkpoint):
        return None
    if spec.granularity != "per_tensor" or all(
        _is_shared(part, layers, checkpoint) for part in ("scale", "zero_point")
    ):
        return spec
    return replace(spec, granularity="per_channel")


def _is_shared(part: str, layers: Sequence[Layer], checkpoint: Checkpoint) -> bool:
    """Whether layers of one format have the same part, or all of them none."""
    names = [f"{layer.weight}_{part}" for layer in layers]
    if names[0] not in checkpoint.parts:
        return True
    first, *others = (checkpoint.parts.read(name) for name in names)
    return all(torch.equal(first, other) for other in others)


def _is_equal(one: Tensor | None, two: Tensor | None) -> bool:
    return (one is None) == (two is None) and (one is None or two is None or torch.equal(one, two))


def _merging(
    part: str, layers: Sequence[Layer], spec: QuantSpec, shape: tuple[int, ...]
) -> tuple[Callable[..., Tensor], tuple[int, ...]]:
    """What makes one part of all of those of the layers, and its shape; ``shape`` is that of the first."""
    rows = [layer.rows for layer in layers]
    if len(layers) == 1 or part == "factor" or (not shape and spec.granularity == "per_tensor"):
        return lambda first, *_: first, shape
    if not shape:  # one number for a tensor: one for each of its rows
        return lambda *parts: torch.cat([t.expand(n) for t, n in zip(parts, rows, strict=True)]), (sum(rows),)
    if spec.granularity == "per_block" and part == "scale":
        side = spec.group_size or 1
        return lambda *parts: torch.cat(parts), (sum(-(-n // side) for n in rows), *shape[1:])
    return lambda *parts: torch.cat(parts), (sum(rows), *shape[1:])
