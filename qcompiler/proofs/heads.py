"""Finds heads of values that may be rotated, which the output projection makes good.

Attention is linear in its values, and mixes no channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Site, is_op
from qcompiler.proofs.channel_labels import Channels, Labels, Stop
from qcompiler.proofs.channel_walk import ChannelWalk
from qcompiler.proofs.streams import PRODUCTS, SUMS, Refused, aten, canonical, is_row_factor

__all__ = ["Heads", "find_heads"]


@dataclass(frozen=True)
class Heads:
    """Heads of values that may be rotated.

    Attributes:
        values: the layer that makes them.
        rows: int64 ``[heads, size]``, the rows of each head.
        outputs: layers that read ``[..., heads * size]``, possibly each head several times.
    """

    values: Site
    rows: Tensor
    outputs: tuple[Site, ...]


class _HeadWalk(ChannelWalk):
    """Follows channels through operators that move them about, and through attention."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, None)
        self.heads: list[Tensor] = []

    def _pass_on(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        if is_op(node, aten.relu.default, *SUMS) or (is_op(node, *PRODUCTS) and not is_row_factor(node.args[1])):
            raise Stop(f"{node.name} does not commute with a rotation")
        if is_op(node, canonical.attention.default) and node.args[2] in labels:
            values = labels[node.args[2]]  # type: ignore[index]
            assert isinstance(values, Tensor)
            self.heads.append(values[0, :, 0])
        return super()._pass_on(node, labels, channels)

    def prove_heads(self, site: Site) -> Heads | Refused | None:
        """The heads a layer makes the values of; None for a layer whose output no attention reads as values."""
        (node,), channels = site.nodes, Channels()
        self.heads = []
        if not node.meta.get("shape"):
            return None
        given = channels.give(site.out_features)
        labels: dict[fx.Node, Labels] = {node: given.reshape([1] * (len(node.meta["shape"]) - 1) + [-1])}
        consumers, partners = self._follow(labels, channels)
        if not self.heads:
            return None
        name = f"values of {site.name}"
        reason = self._unfit(node)
        if len(self.heads) > 1 or partners:
            reason = reason or "several attentions read it"
        rows = self.heads[0]
        pinned = [channels.reasons[label] for label in rows.reshape(-1).tolist() if label in channels.reasons]
        if reason is None and pinned:
            reason = pinned[0]
        known = {tuple(row) for row in rows.tolist()}
        inside = set(rows.reshape(-1).tolist())
        readers = []
        for reader, read in consumers.items():
            if not inside.intersection(read.tolist()):
                continue
            readers.append(reader)
            whole = len(read) % rows.shape[1] == 0
            if not whole or not {tuple(part) for part in read.reshape(-1, rows.shape[1]).tolist()} <= known:
                reason = reason or f"{reader.name} does not read whole heads"
        if reason is None and not readers:
            reason = "no linear layer reads what attention gives"
        if reason is not None:
            return Refused(name, site.name, reason)
        unique = rows if len(known) == len(rows) else torch.tensor(sorted(known))  # repeated for grouped queries
        return Heads(site, unique, tuple(readers))


def find_heads(graph: Graph) -> tuple[list[Heads], list[Refused]]:
    """The heads of values that may be rotated, and those that must stay as they are."""
    walk = _HeadWalk(graph)
    results = [walk.prove_heads(site) for site in graph.sites() if len(site.nodes) == 1]
    found = [result for result in results if isinstance(result, Heads)]
    return found, [result for result in results if isinstance(result, Refused)]
