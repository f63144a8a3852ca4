"""Recognizes attention masks by what they compute: a mask sub-graph is run on probes and compared with closed forms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.execute import Stretch
from qcompiler.graph import Graph, ancestors
from qcompiler.signature import BATCH, PAST, SEQUENCE, TOTAL

__all__ = ["MaskForm", "closed_form"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class MaskForm:
    """A mask as `attention` takes it: causal or not, a window, and a boolean padding mask ``[B, 1, 1, T]`` (a node)."""

    causal: bool
    window: int | None
    padding: fx.Node | None


def closed_form(graph: Graph, mask: fx.Node) -> MaskForm | str:
    """The closed form a mask equals on every probe, or the reason there is none.

    Probes vary batch, length, past length (0 included) and padding on either side; every integer constant of the sub-graph is
    tried as a sliding window and probed just beyond its length.
    """
    nodes = ancestors([mask])
    if any(node.op == "get_attr" and node.meta["dtype"].is_floating_point for node in nodes):
        return "the mask depends on weights"
    ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    if any(node.op == "placeholder" and ports[node].role == "ids" and _reads_values(node, nodes) for node in nodes):
        return "the mask depends on the token ids"
    stretch = Stretch(list(graph.fx.nodes), [mask])
    padding_input = next((node for node in nodes if node in ports and ports[node].role == "mask"), None)
    constants = sorted({c for node in nodes for c in _integers(node.args) if 1 < c < 1 << 20})
    probes = [(2, 4, 0), (2, 1, 5), (3, 3, 2)] if graph.signature.has_cache else [(2, 4, 0), (3, 1, 0), (1, 7, 0)]
    probes += [(1, 2, c + 1) if graph.signature.has_cache else (1, c + 2, 0) for c in constants if c < 1 << 14]
    observed = [(probe, *_run(graph, stretch, mask, probe, padding_input)) for probe in probes]
    for causal in (True, False):
        for window in (None, *constants) if causal else (None,):
            if all(
                torch.equal(allowed, _expected(padding, probe, causal, window).expand_as(allowed))
                for probe, allowed, padding in observed
            ):
                return MaskForm(causal, window, _padding_node(graph, padding_input))
    return "the mask is neither causal, nor a causal window, nor padding alone"


def _reads_values(ids: fx.Node, nodes: set[fx.Node]) -> bool:
    return any(user in nodes and user.target is not _aten.sym_size.int for user in ids.users)


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [abs(value)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _integers(item)]
    return []


def _run(
    graph: Graph, stretch: Stretch, mask: fx.Node, probe: tuple[int, int, int], padding_input: fx.Node | None
) -> tuple[Tensor, Tensor]:
    """What the mask allows on one probe, and the padding that went in (bool ``[B, T]``)."""
    batch, queries, past = probe
    total = past + queries
    padding = torch.ones(batch, total, dtype=torch.bool)
    if padding_input is not None and batch > 1:
        padding[1, : total // 3] = False
        padding[-1, total - 1 - total // 4 :] = False
        padding[-1, 0] = True
    sizes: dict[Any, int] = {BATCH: batch, SEQUENCE: queries, PAST: past, TOTAL: total}
    values: dict[fx.Node, Any] = {}
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        shape = [sizes.get(dim, dim) for dim in port.shape]
        if port.role == "positions":
            values[node] = torch.arange(past, total).expand(batch, queries)
        elif node is padding_input:
            values[node] = padding.long()
        elif port.role == "past":
            values[node] = torch.zeros(shape)  # type: ignore[arg-type]
        else:
            values[node] = torch.zeros(shape, dtype=getattr(torch, port.dtype))  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    result: Tensor = stretch.run(values, stretch.load(graph.weights.read, cpu), cpu)[mask]
    allowed = result if result.dtype == torch.bool else result > -1e4
    return allowed.expand(batch, -1, queries, total) if allowed.dim() == 4 else allowed, padding


def _expected(padding: Tensor, probe: tuple[int, int, int], causal: bool, window: int | None) -> Tensor:
    _, queries, past = probe
    allowed = padding[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        key = torch.arange(past + queries)
        query = torch.arange(past, past + queries)[:, None]
        allowed = allowed & (key <= query)
        if window is not None:
            allowed = allowed & (key > query - window)
    return allowed


def _padding_node(graph: Graph, source: fx.Node | None) -> fx.Node | None:
    """``attention_mask`` as a boolean ``[B, 1, 1, T]``; made once and shared by all layers."""
    if source is None:
        return None
    for user in source.users:
        if user.meta.get("padding") == "bool":
            (first,) = user.users
            (second,) = first.users
            return second
    batch, total = source.meta["shape"]
    last = graph.inputs[-1]
    with graph.fx.inserting_after(last):
        boolean = graph.fx.call_function(_aten.to.dtype, (source, torch.bool))
    boolean.meta.update(dtype=torch.bool, shape=(batch, total), padding="bool")
    previous = boolean
    for shape in ((batch, 1, total), (batch, 1, 1, total)):
        with graph.fx.inserting_after(previous):
            previous = graph.fx.call_function(_aten.unsqueeze.default, (previous, 1))
        previous.meta.update(dtype=torch.bool, shape=shape)
    return previous
