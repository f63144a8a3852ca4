"""Values for a graph's placeholders, made from token ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.errors import InputError
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import SEQUENCE, Port

__all__ = ["empty_cache", "feed", "feed_run", "feed_tensors"]


def feed(graph: Graph, ids: Tensor, past: Sequence[Tensor] | None = None) -> dict[fx.Node, Any]:
    """Inputs for a language model: all tokens visible, positions counted on from the cache.

    Args:
        graph: with an input of role ``ids``.
        ids: int64 ``[batch, length]``.
        past: the cache, in the order of the graph's ``past`` inputs; None for an empty one.

    Raises:
        InputError: if the graph takes no token ids, or not so many.
    """
    if graph.signature.input("ids") is None:
        raise InputError("this graph takes no token ids", got=[port.name for port in graph.signature.inputs])
    batch, length = ids.shape
    before = past[0].shape[2] if past else 0
    limit = graph.provenance.get("limits", {}).get(SEQUENCE)
    if limit is not None and length > limit:
        raise InputError(
            "the text is longer than the model allows", got=f"{length} tokens", expected=f"at most {limit}"
        )
    caches = iter(past or ())
    values: dict[fx.Node, Any] = {}
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        dtype = getattr(torch, port.dtype)
        if port.role == "ids":
            values[node] = ids.to(dtype)
        elif port.role == "mask":
            values[node] = ids.new_ones(batch, before + length, dtype=dtype)
        elif port.role == "positions":
            positions = torch.arange(before, before + length, device=ids.device, dtype=dtype)
            values[node] = positions.expand(batch, length)
        elif port.role == "past":
            values[node] = next(caches) if past else empty_cache(port, batch, ids.device)
        else:
            values[node] = torch.zeros_like(ids)
    return values


def feed_run(graph: Graph, pieces: Sequence[Tensor]) -> list[dict[fx.Node, Any]]:
    """Inputs for parts of one sequence, which go one after another through the cache.

    Args:
        graph: with an input of role ``ids``.
        pieces: int64 ``[batch, length]`` each.

    Returns:
        One for each piece, as `feed` gives them. Behind the first, caches have their shapes alone: what they hold is
        that of one number.
    """
    batches, before = [], 0
    ports = [port for port in graph.signature.inputs if port.role == "past"]
    for ids in pieces:
        past = [_shape_of_cache(port, ids.shape[0], before, ids.device) for port in ports] if before else None
        batches.append(feed(graph, ids, past))
        before += ids.shape[1]
    return batches


def empty_cache(port: Port, batch: int, device: torch.device) -> Tensor:
    """What a ``past`` port takes before the first token: ``[batch, heads, 0, width]`` of its dtype."""
    return _shape_of_cache(port, batch, 0, device)


def _shape_of_cache(port: Port, batch: int, length: int, device: torch.device) -> Tensor:
    """A tensor that takes no memory, as large as a cache."""
    _, heads, _, width = port.shape
    one = torch.zeros((), dtype=getattr(torch, port.dtype), device=device)
    return one.expand(batch, int(heads), length, int(width))


def feed_tensors(graph: Graph, tensors: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Inputs for any graph, one tensor per placeholder in order.

    Raises:
        InputError: if there are too few or too many.
    """
    if len(tensors) != len(graph.inputs):
        raise InputError(
            "a batch does not match the model's inputs",
            got=f"{len(tensors)} tensors",
            expected=", ".join(port.name for port in graph.signature.inputs),
        )
    return dict(zip(graph.inputs, tensors, strict=True))
