"""Recognizes attention masks by what they compute: a mask sub-graph is run on probes and compared with closed forms."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Dim,
    Graph,
    Port,
    Stretch,
    ancestors,
    is_op,
)

__all__ = ["MaskForm", "closed_form"]

_aten = torch.ops.aten
_CPU = torch.device("cpu")
_HIDDEN = -1e4
"""Added to a logit, this or less hides a key."""
_LARGEST_WINDOW = 1 << 20
_LONGEST_SMALL_PROBE = 7
_LARGEST_SQUARE = 1 << 10  # without a cache, a probe beyond a window has that many queries, too


@dataclass(frozen=True)
class MaskForm:
    """A mask as `attention` takes it: causal or not, a window, and a boolean padding mask ``[B, 1, 1, T]`` (a node)."""

    causal: bool
    window: int | None
    padding: fx.Node | None


class _Strange(Exception):
    """The mask has no closed form, for this reason."""


@dataclass(frozen=True)
class _Probe:
    """Sizes, and what the mask allowed there (bool ``[B, H or 1, S, T]``) for which padding (bool ``[B, T]``)."""

    queries: int
    past: int
    padding: Tensor
    allowed: Tensor


def closed_form(graph: Graph, mask: fx.Node) -> MaskForm | str:
    """The closed form a mask equals on every probe, or the reason there is none.

    Probes vary batch, length, past length (0 included), positions, and padding on either side. Every integer constant
    of the sub-graph may be a sliding window, give or take one, so lengths beyond each are probed; where the mask is cut
    out of a stored table, the whole table is.
    """
    try:
        return _closed_form(graph, mask)
    except _Strange as strange:
        return str(strange)


def _closed_form(graph: Graph, mask: fx.Node) -> MaskForm:
    nodes = ancestors([mask])
    ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    _check_sources(nodes, ports)
    padding_input = next((node for node in nodes if node in ports and ports[node].role == "mask"), None)
    tables = {size for node in nodes if node.op == "get_attr" for size in node.meta["shape"] if size > 2}
    constants = {c for node in nodes for c in _integers(node.args) if 1 < c < _LARGEST_WINDOW}
    longest = max(tables, default=0)
    if longest > _LONGEST_SMALL_PROBE:  # no probe reaches beyond the table
        constants = {c for c in constants if c + 3 <= longest}
    if graph.signature.has_cache:
        sizes = [(2, 4, 0), (2, 1, 5), (3, 3, 2), *((1, 2, c + 2) for c in constants), *((1, 2, t - 2) for t in tables)]
    else:
        sizes = [(2, 4, 0), (3, 1, 0), (3, 7, 0), *((1, c + 3, 0) for c in constants), *((1, t, 0) for t in tables)]
        if any(constant > _LARGEST_SQUARE for constant in constants | tables):
            raise _Strange(f"the mask uses numbers too large to be probed: {max(constants | tables)}")
    stretch = Stretch(list(graph.fx.nodes), [mask])
    loaded = stretch.load(graph.weights.read, _CPU)
    probes = []
    for batch, queries, past in sizes:
        for shift in (0, 1) if any(node in ports and ports[node].role == "positions" for node in nodes) else (0,):
            padding = _padding(batch, past + queries, padded=padding_input is not None)
            values = {node: _value(port, queries, past, padding, shift) for node, port in ports.items()}
            probes.append(_Probe(queries, past, padding, _allowed(stretch, loaded, values, mask, padding, queries)))
    seen = {int(probe.allowed[0, 0, -1].sum()) for probe in probes}  # by the last query
    candidates = sorted({c + step for c in constants for step in (-1, 0, 1) if c + step > 0} | (seen - {0}))
    for causal, window in ((True, None), *((True, window) for window in candidates), (False, None)):
        if all(_agrees(probe, causal, window) for probe in probes):
            return MaskForm(causal, window, None if padding_input is None else _padding_node(graph, padding_input))
    raise _Strange("the mask is neither causal, nor a causal window, nor padding alone")


def _check_sources(nodes: set[fx.Node], ports: dict[fx.Node, Port]) -> None:
    """Refuses masks that probes cannot exhaust: those that depend on weights or on values other than the padding."""
    for node in nodes:
        if node.op == "get_attr" and node.meta["dtype"].is_floating_point:
            raise _Strange("the mask depends on weights")
        reads_values = any(user in nodes and not is_op(user, _aten.sym_size.int) for user in node.users)
        if node in ports and reads_values and ports[node].role not in ("mask", "positions"):
            raise _Strange(f"the mask depends on the values of {ports[node].name}")


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [abs(value)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _integers(item)]
    return []


def _padding(batch: int, total: int, *, padded: bool) -> Tensor:
    """Which tokens are real: the first row has all, the second lacks some on the left, the third some on the right."""
    real = torch.ones(batch, total, dtype=torch.bool)
    if padded:
        real[1:2, : (total + 1) // 3] = False
        real[2:3, total - total // 3 :] = False
    return real


def _value(port: Port, queries: int, past: int, padding: Tensor, shift: int) -> Tensor:
    batch, total = padding.shape
    if port.role == "mask":
        return padding.long()
    if port.role == "positions":  # consecutive, or counted from the first real token, and far off
        counted = torch.arange(total).expand(batch, total) if not shift else (padding.long().cumsum(1) - 1).clamp(min=1)
        return counted[:, past:] + 7 * shift
    sizes: dict[Dim, int] = {BATCH: batch, SEQUENCE: queries, PAST: past, TOTAL: total}
    if any(isinstance(dim, str) and dim not in sizes for dim in port.shape):
        raise _Strange(f"the size of {port.name} is none of a language model's")
    return torch.zeros(
        [sizes[dim] if isinstance(dim, str) else dim for dim in port.shape], dtype=getattr(torch, port.dtype)
    )


def _allowed(
    stretch: Stretch, loaded: Any, values: dict[fx.Node, Any], mask: fx.Node, padding: Tensor, queries: int
) -> Tensor:
    """What the mask lets each query see, as bool ``[B, H or 1, S, T]``."""
    batch, total = padding.shape
    try:
        result: Tensor = stretch.run(values, loaded, _CPU)[mask]
        result = result[(None,) * (4 - result.dim())].expand(batch, -1, queries, total)
    except (RuntimeError, IndexError, ValueError) as error:
        raise _Strange(f"the mask cannot be computed on probes: {str(error).splitlines()[0]}") from error
    if result.dtype != torch.bool:
        hides = result <= _HIDDEN
        if not bool((hides | (result == 0)).all()):
            raise _Strange("the mask adds other values than zero and minus infinity")
        return ~hides
    return result


def _agrees(probe: _Probe, causal: bool, window: int | None) -> bool:
    total = probe.past + probe.queries
    expected = probe.padding[:, None, None, :].expand(-1, 1, probe.queries, -1)
    if causal:
        key, query = torch.arange(total), torch.arange(probe.past, total)[:, None]
        expected = expected & (key <= query)
        if window is not None:
            expected = expected & (key > query - window)
    return torch.equal(probe.allowed, expected.expand_as(probe.allowed))


def _padding_node(graph: Graph, source: fx.Node) -> fx.Node:
    """``attention_mask`` as a boolean ``[B, 1, 1, T]``; made once and shared by all layers."""
    batch, total = source.meta["shape"]
    steps: tuple[tuple[Any, tuple[Any, ...], tuple[Dim, ...]], ...] = (
        (_aten.to.dtype, (torch.bool,), (batch, total)),
        (_aten.unsqueeze.default, (1,), (batch, 1, total)),
        (_aten.unsqueeze.default, (1,), (batch, 1, 1, total)),
    )
    value, place = source, graph.inputs[-1]
    for target, rest, shape in steps:
        made = next((user for user in value.users if is_op(user, target) and user.args == (value, *rest)), None)
        if made is None:
            made = graph.fx.call_function(target, (value, *rest))
            made.meta.update(dtype=torch.bool, shape=shape)
        place.append(made)
        value = place = made
    return value
