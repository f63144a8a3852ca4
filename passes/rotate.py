"""`Rotate`: rotates what layers read, so that no channel stands out and few bits cover all of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompiler.ir import Graph, Site, is_op
from qcompiler.numerics import block_order
from qcompiler.proofs import (
    Refused,
    Rotation,
    find_heads,
    find_streams,
    online_inputs,
    rotate_heads,
    rotate_input,
    rotate_stream,
)
from qcompiler.protocol import (
    CANONICAL,
    FLOAT_ACTIVATIONS,
    FLOAT_WEIGHTS,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Skip,
)

__all__ = ["Rotate"]


@dataclass(frozen=True)
class Rotate(Pass):
    """Multiplies activations by orthogonal matrices, and weights by their inverses.

    A Hadamard matrix spreads an outlier over all channels, whose values come near a normal distribution. What the model
    computes stays the same. Where a rotation may go is proved on the graph (`qcompiler.proofs`); what cannot take one
    is left alone, with the reason. Norms that a stream passes lose their weights to the layers behind them, and
    ``layer_norm`` becomes ``rms_norm``. A table tied to the output projection is stored on its own from then on.

    Weights are rotated as they are read, so memory does not grow with depth. Where a width has no Hadamard matrix, the
    largest that divides it stands along the diagonal.

    Attributes:
        residual: rotate residual streams (with random signs).
        value_heads: rotate every head of values, and the output projection back.
        online_down: rotate, at run time, what no weight can: the input of a down projection, made by products and
            activation functions. A site whose scheme leaves its input in float is left alone.
        online_heads: rotate what attention gives at run time, too, across all heads: one head that stands out among
            others does not make the scale of all.

    Source: arXiv 2404.00456; norms and means after arXiv 2401.15024.
    """

    residual: bool = True
    value_heads: bool = True
    online_down: bool = True
    online_heads: bool = False

    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FLOAT_ACTIVATIONS})

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Proves everything first, on the graph as it is, then rewrites it."""
        streams, refused = find_streams(graph) if self.residual else ([], [])
        heads, refused_heads = find_heads(graph) if self.value_heads else ([], [])
        refused += refused_heads
        regions: list[dict[str, Any]] = []
        done = set[str]()
        for stream in streams:
            rotation = Rotation.random(stream.width, _generator(context.seed, stream.name))
            if rotation.block == 1:
                refused.append(_no_matrix(stream.name, stream.writers[0].name, stream.width))
                continue
            readers = [reader.site.name for reader in stream.readers]
            details: dict[str, Any] = {"norms": len(stream.norms), "mean removed": stream.is_centered}
            details["untied"] = rotate_stream(graph, stream, rotation)
            writers = [writer.name for writer in stream.writers]
            regions.append(_region("residual stream", writers, readers, stream.width, rotation.block, details))
            done.update(readers)
        for found in heads:
            size = found.rows.shape[1]
            rotation = Rotation.random(size, _generator(context.seed, found.values.name))
            if rotation.block == 1:
                refused.append(_no_matrix(f"values of {found.values.name}", found.values.name, size))
                continue
            rotate_heads(graph, found, rotation)
            names = [site.name for site in found.outputs]
            details = {"heads": len(found.rows)}
            regions.append(_region("value heads", [found.values.name], names, size, rotation.block, details))
            done.update(names)
        online = dict[fx.Node, list[Site]]()
        if self.online_heads:
            for site in (site for found in heads for site in found.outputs if _is_rounded(graph, site)):
                online.setdefault(site.inputs[0], []).append(site)
        if self.online_down:
            rounded = [s for s in graph.sites() if s.name not in done and _is_rounded(graph, s)]
            online |= online_inputs(graph, rounded)
        for value, sites in online.items():
            width, names = sites[0].in_features, [site.name for site in sites]
            if block_order(width) == 1:
                refused.append(_no_matrix(f"input of {names[0]}", names[0], width))
                continue
            rotate_input(graph, value, sites, block_order(width))
            regions.append(_region("at run time", [], names, width, block_order(width), {}))
            done.update(names)
        if self.residual and not streams and not refused:
            refused.append(Refused("residual stream", _whole(graph), "no embedding table begins a residual stream"))
        skips = tuple(Skip(item.where, self.name, f"{item.name} is not rotated: {item.reason}") for item in refused)
        return PassResult(bool(regions), skips=skips, regions=(*regions, *map(_refusal, refused)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/rotate/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _is_rounded(graph: Graph, site: Site) -> bool:
    """Whether a site's input is to be quantized, or nobody has said."""
    return site.name not in graph.schemes or graph.schemes[site.name].activation is not None


def _no_matrix(name: str, where: str, width: int) -> Refused:
    return Refused(name, where, f"no Hadamard matrix but that of order 1 divides {width} channels")


def _whole(graph: Graph) -> str:
    inputs = [node.name for node in graph.fx.nodes if is_op(node, torch.ops.qcompiler.linear.default)]
    return inputs[0] if inputs else "model"


def _region(
    kind: str, producers: Sequence[str], consumers: Sequence[str], width: int, block: int, details: dict[str, Any]
) -> dict[str, Any]:
    shown = [*consumers[:3], *(["..."] if len(consumers) > 3 else [])]
    return {
        "name": f"{kind} -> {', '.join(shown)}",
        "kind": f"rotation: {kind}",
        "producers": list(producers),
        "consumers": list(consumers),
        "channels": width,
        "status": "folded" if producers else "inserted",
        "reason": "" if block == width else f"no Hadamard matrix of order {width}: blocks of {block}",
        "details": {"block": block, **details},
    }


def _refusal(item: Refused) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": "rotation",
        "producers": [item.where],
        "consumers": [],
        "channels": 0,
        "status": "refused",
        "reason": item.reason,
        "details": {},
    }
