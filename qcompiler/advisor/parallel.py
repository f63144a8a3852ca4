"""Tensor parallelism as arithmetic: what each of several GPUs holds, and what does not divide among them.

Layers are divided by output or input channels, embedding and head by words, caches by heads of keys and values; norms
and routers are held by all. Where there are fewer heads of keys and values than GPUs, each holds a copy of one.
"""

import math
from collections.abc import Mapping

from qcompiler.advisor.footprint import Footprint
from qcompiler.advisor.shapes import ModelShape
from qcompiler.numerics import Scheme

__all__ = ["COUNTS", "divided", "undivided"]

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Of GPUs that are tried."""
_HELD_BY_ALL = ("others", "router")


def divided(shape: ModelShape, parts: Mapping[str, float], cache: float, activations: float, gpus: int) -> Footprint:
    """What one of ``gpus`` holds.

    Args:
        shape: of the model.
        parts: bytes of weights by part.
        cache: bytes of all caches.
        activations: bytes of a step on one GPU; the residual stream is held by all, and so they are not divided.
        gpus: how many.
    """
    weights = sum(size if part in _HELD_BY_ALL else size / gpus for part, size in parts.items())
    heads = math.ceil(shape.kv_heads / gpus)
    return Footprint(weights, cache * heads / shape.kv_heads, activations)


def undivided(shape: ModelShape, scheme: Scheme, gpus: int) -> tuple[str, ...]:
    """What does not divide among GPUs, as sentences; engines refuse all but the last two."""
    found = []
    if shape.heads % gpus:
        found.append(f"{shape.heads} heads do not divide by {gpus}")
    if shape.intermediate % gpus:
        found.append(f"an MLP of {shape.intermediate} channels does not divide by {gpus}")
    group = None if scheme.weight is None else scheme.weight.group_size
    inner = shape.intermediate // gpus
    if group is not None and not shape.intermediate % gpus and inner % group:
        found.append(f"{inner} channels of the MLP on each do not divide into groups of {group}")
    if shape.kv_heads % gpus and gpus % shape.kv_heads:
        found.append(f"{shape.kv_heads} heads of keys and values and {gpus} GPUs do not divide each other")
    elif gpus > shape.kv_heads:
        found.append(f"{shape.kv_heads} heads of keys and values are held {gpus // shape.kv_heads} times")
    if shape.vocab % gpus:
        found.append(f"{shape.vocab} words do not divide by {gpus}: tables are padded")
    return tuple(found)
