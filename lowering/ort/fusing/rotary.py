"""Rotary embeddings whose angles depend on positions alone: their cosines and sines as tables, one row a position."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Stretch, ancestors, is_op

__all__ = ["Tables", "rotary_tables"]

_rotary = torch.ops.qcompiler.rotary.default
_CPU = torch.device("cpu")
_FEW = 5


@dataclass(frozen=True)
class Tables:
    """Stored tables of one kind of rotary embedding.

    Attributes:
        positions: the input that a row is chosen by.
        cos, sin: names of float32 ``[length, H / 2]``.
        interleaved: whether neighbours are rotated together, instead of halves.
    """

    positions: fx.Node
    cos: str
    sin: str
    interleaved: bool


def rotary_tables(graph: Graph, length: int | None) -> dict[fx.Node, Tables]:
    """By ``rotary`` node, the tables that stand for its cosines and sines; stored among the graph's weights.

    They are computed by the graph itself, for all positions at once and, to see that each row depends on its own
    position alone, for some of them.
    """
    positions = next(
        (n for n, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role == "positions"), None
    )
    found: dict[fx.Node, Tables] = {}
    if positions is None or length is None:
        return found
    known: dict[tuple[object, ...], Tables | None] = {}
    for node in graph.fx.nodes:
        if not is_op(node, _rotary) or len({side.meta.get("shape", (None,))[-1] for side in node.args[:3]}) > 1:
            continue
        key = node.args[1:]
        if key not in known:
            known[key] = _tables(graph, node, positions, length, sum(item is not None for item in known.values()))
        if (tables := known[key]) is not None:
            found[node] = tables
    return found


def _tables(graph: Graph, node: fx.Node, positions: fx.Node, length: int, number: int) -> Tables | None:
    cos, sin, interleaved = node.args[1:]
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    sides = [cos, sin]
    inputs = {source for source in ancestors(sides) if source.op == "placeholder"}
    if inputs != {positions} or any(
        len(side.meta.get("shape", ())) != 4 or side.meta["shape"][1] != 1 for side in sides
    ):
        return None
    stretch = Stretch(list(graph.fx.nodes), sides)
    loaded = stretch.load(graph.weights.read, _CPU)

    def rows(wanted: Tensor) -> list[Tensor]:
        values = stretch.run({positions: wanted[None]}, loaded, _CPU)
        return [values[side].reshape(len(wanted), -1).float() for side in sides]

    whole = rows(torch.arange(length))
    some = torch.arange(min(_FEW, length)).flip(0)
    again = rows(some)
    halves = []
    for table, few in zip(whole, again, strict=True):
        if not torch.equal(table[some], few):
            return None
        if interleaved:
            first, second = table[:, ::2], table[:, 1::2]
        else:
            first, second = table.chunk(2, dim=1)
        if not torch.equal(first, second):
            return None
        halves.append(first.contiguous())
    names = [f"rotary.{number}.{kind}" for kind in ("cos", "sin")]
    for name, table in zip(names, halves, strict=True):
        graph.weights.set(name, table)
    return Tables(positions, names[0], names[1], bool(interleaved))
