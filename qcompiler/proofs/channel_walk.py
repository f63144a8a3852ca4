"""Carries the numbers of channels through a graph, operator by operator; `qcompiler.proofs.regions` says what for."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Site, is_op
from qcompiler.proofs.channel_labels import (
    PINNED,
    Channels,
    Labels,
    Stop,
    alike,
    fixed_shape,
    parts_of,
    regrouped,
    whole,
)
from qcompiler.proofs.region import Consumer, Producer, Refusal, Region

__all__ = ["ChannelWalk", "may_produce"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler

_COMMUTING = (_aten.relu.default, _aten.neg.default)
"""``f(s x) = s f(x)`` for ``s > 0``, element by element."""
_MOVING = (
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.t.default,
)


def may_produce(node: fx.Node) -> bool:
    """Whether a node has a weight that the inverse of a scale could go into."""
    return is_op(node, _canonical.linear.default, _canonical.rms_norm.default, _canonical.layer_norm.default)


class ChannelWalk:
    """Carries labels through a graph.

    Args:
        graph: in canonical form.
        inside: the nodes that may take part; None for all.
    """

    def __init__(self, graph: Graph, inside: set[fx.Node] | None) -> None:
        self.graph, self.inside = graph, inside
        self._order = {node: index for index, node in enumerate(graph.fx.nodes)}
        self._sites = {node: site for site in graph.sites() for node in site.nodes}
        self._uses: dict[str, int] = {}
        for node in graph.fx.nodes:
            if node.op == "get_attr":
                self._uses[str(node.target)] = self._uses.get(str(node.target), 0) + len(node.users)
        self._caches = _caches(graph)

    def prove(self, first: fx.Node) -> Region | Refusal:
        """The region of a producer, or why there is none; it grows until every sum has producers on both sides."""
        starts = [first]
        while True:
            channels, labels = Channels(), dict[fx.Node, Labels]()
            made: list[tuple[fx.Node, Tensor]] = []
            name = self._producer_name(first)
            for start in starts:
                reason = self._unfit(start)
                if reason is not None:
                    return Refusal(name, reason if start is first else f"{self._producer_name(start)}: {reason}")
                given = channels.give(int(start.meta["shape"][-1]))
                made.append((start, given))
                labels[start] = given.reshape([1] * (len(start.meta["shape"]) - 1) + [-1])
            consumers, partners = self._follow(labels, channels)
            if not partners:
                return self._region(name, channels, made, consumers)
            assert not set(partners).intersection(starts), "a producer that takes part is labelled"
            starts += partners

    def _region(
        self,
        name: str,
        channels: Channels,
        made: list[tuple[fx.Node, Tensor]],
        consumers: dict[Site, Tensor],
    ) -> Region | Refusal:
        free = channels.free()
        read = {int(n) for labels in consumers.values() for n in free[labels].unique().tolist()} - {PINNED}
        if not read:
            return Refusal(name, next(iter(channels.reasons.values()), "no linear layer reads it"))
        number = torch.full((int(free.max()) + 1 + 1,), PINNED)  # the last one is for -1
        number[sorted(read)] = torch.arange(len(read))
        producers = tuple(self._producer(node, number[free[given]]) for node, given in made)
        readers = tuple(Consumer(site, number[free[labels]]) for site, labels in consumers.items())
        return Region(len(read), producers, readers, tuple(dict.fromkeys(channels.reasons.values())))

    def _producer(self, node: fx.Node, channels: Tensor) -> Producer:
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        assert isinstance(weight, fx.Node)
        return Producer(
            "linear" if node in self._sites else "norm",
            self._producer_name(node),
            node,
            str(weight.target),
            str(bias.target) if isinstance(bias, fx.Node) else None,
            channels,
        )

    def _producer_name(self, node: fx.Node) -> str:
        if node in self._sites:
            return self._sites[node].name
        weight = node.args[1]
        return str(weight.target).removesuffix(".weight") if isinstance(weight, fx.Node) else node.name

    def _unfit(self, node: fx.Node) -> str | None:
        """Why a norm or linear layer cannot take a scale in its outputs."""
        tensors = [argument for argument in node.args[1:3] if argument is not None and not isinstance(argument, float)]
        if node.args[1] is None:
            return "the norm has no weight to fold a scale into"
        for tensor in tensors:
            if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
                return "its weight is quantized already, or computed"
            if not self._owned(tensor):
                return f"{tensor.target} is shared with another use"
            if self.graph.weights.info(str(tensor.target)).shape[:1] != node.meta["shape"][-1:]:
                return f"{tensor.target} does not have one element or row for each channel"
        return None

    def _owned(self, tensor: fx.Node) -> bool:
        """Whether a stored tensor has one reader in the whole graph, tied names included."""
        names = [str(tensor.target), *self.graph.weights.tied(str(tensor.target))]
        return sum(self._uses.get(name, 0) for name in names) == 1

    def _follow(self, labels: dict[fx.Node, Labels], channels: Channels) -> tuple[dict[Site, Tensor], list[fx.Node]]:
        """Carries labels through the graph: the layers that absorb them, and producers that have to join in, if any."""
        consumers: dict[Site, Tensor] = {}
        pending = {user for node in labels for user in node.users}
        while pending:
            node = min(pending, key=lambda user: self._order[user])
            pending.discard(node)
            read = [source for source in node.all_input_nodes if source in labels]
            try:
                if self.inside is not None and node.op != "output" and node not in self.inside:
                    raise Stop("it is read beyond the cut between two segments")
                if node in self._sites:
                    self._absorb(node, labels, consumers)
                    continue
                if node.op == "output":
                    self._return(read)
                    continue
                labels[node] = self._pass_on(node, labels, channels)
                pending.update(node.users)
            except _Partners as wanted:
                return consumers, wanted.nodes
            except Stop as stop:
                for source in read:
                    for part in parts_of(labels[source]):
                        channels.pin(part, str(stop))
        return consumers, []

    def _absorb(self, node: fx.Node, labels: Mapping[fx.Node, Labels], consumers: dict[Site, Tensor]) -> None:
        site, source = self._sites[node], node.args[0]
        found = labels.get(source) if isinstance(source, fx.Node) else None
        weight = node.args[1]
        if (
            not isinstance(found, Tensor)
            or not isinstance(weight, fx.Node)
            or any(bias in labels for bias in node.args[2:])
        ):
            raise Stop(f"{site.name} reads it as a weight or a bias")
        if weight.op != "get_attr":
            raise Stop(f"{site.name} is quantized already")
        if not self._owned(weight):
            raise Stop(f"the weight of {site.name} is shared with another use")
        for axis in range(found.dim() - 1):
            found = alike(found, axis, f"{site.name} reads it along another axis")
        consumers[site] = found.reshape(-1).expand(site.in_features)

    def _return(self, read: Iterable[fx.Node]) -> None:
        """A cache may leave scaled, since it comes back scaled; nothing else may."""
        if not all(node in self._caches for node in read):
            raise Stop("the graph returns it")

    def _pass_on(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        rule = next((rule for targets, rule in _RULES if is_op(node, *targets)), None)
        if rule is not None and not node.kwargs:
            return rule(self, node, labels, channels)
        name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        options = f" with {', '.join(node.kwargs)}" if rule is not None else ""
        raise Stop(f"{name}{options} does not commute with a scale")

    # --- rules: labels of the result, or Stop ------------------------------------------------------------------------

    def _same(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        return whole(labels, node.args[0])

    def _cast(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """To a wide float alone: any other rounds, and what is rounded moves with the scale."""
        if node.meta["dtype"] not in (torch.float32, torch.float64):
            raise Stop(f"it is rounded to {str(node.meta['dtype']).removeprefix('torch.')}")
        return whole(labels, node.args[0])

    def _moved(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source = whole(labels, node.args[0])
        result: Tensor = node.target(source, *node.args[1:])  # type: ignore[operator]
        return result if result.dim() == len(node.meta["shape"]) else source  # an axis that varies is not squeezed

    def _reshaped(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source: Any = node.args[0]
        return regrouped(whole(labels, source), source.meta["shape"], node.meta["shape"])

    def _sliced(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source = whole(labels, node.args[0])
        axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if source.shape[axis] == 1:
            return source
        if any(isinstance(argument, fx.Node) for argument in node.args[2:]):
            raise Stop("a slice of channels whose bounds vary")
        sliced: Tensor = _aten.slice.Tensor(source, *node.args[1:])
        return sliced

    def _selected(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source, axis, index = whole(labels, node.args[0]), node.args[1], node.args[2]
        if source.shape[axis] == 1:  # type: ignore[index]
            return source.squeeze(axis)  # type: ignore[arg-type]
        if not isinstance(index, int):
            raise Stop("a selection of channels that varies")
        return source.select(axis, index)  # type: ignore[arg-type]

    def _split(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source, axis = whole(labels, node.args[0]), node.args[2] if len(node.args) > 2 else 0
        if source.shape[axis] == 1 or len(node.all_input_nodes) > 1:  # type: ignore[index]
            raise Stop("a split along an axis that varies")
        return list(node.target(source, *node.args[1:]))  # type: ignore[operator]

    def _item(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source = labels[node.args[0]]  # type: ignore[index]
        if not isinstance(source, list):
            raise Stop("an item of a single value")
        found: Tensor = source[int(node.args[1])]  # type: ignore[arg-type]
        return found

    def _expanded(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        return whole(labels, node.args[0]).expand(fixed_shape(node))

    def _joined(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        parts: Any = node.args[0]
        axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if not all(part in labels and isinstance(part.meta["shape"][axis], int) for part in parts):
            raise Stop("it is joined with other values")
        return torch.cat([whole(labels, part).expand(fixed_shape(part)) for part in parts], axis)

    def _multiplied(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """``(s a) b = s (a b)``: one factor may be scaled; the scale follows it as the product broadcasts."""
        first, second = node.args[:2]
        scaled = [factor for factor in (first, second) if factor in labels]
        if len(scaled) > 1:
            raise Stop("both factors of a product depend on it")
        if scaled[0] is not first and is_op(node, _aten.div.Tensor):
            raise Stop("it is a divisor")
        return whole(labels, scaled[0]).expand(fixed_shape(node))

    def _added(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """``s a + s b = s (a + b)``: both terms must be scaled, and alike."""
        first, second = node.args
        for one, other in ((first, second), (second, first)):
            if one not in labels:
                if self._may_join(one):
                    raise _Partners([one])  # type: ignore[list-item]
                where = f" at {one.name}" if isinstance(one, fx.Node) else ""
                raise Stop(f"it is added to a value that does not take the scale{where}")
            assert other is not None
        shape = fixed_shape(node)
        left, right = (whole(labels, term).expand(shape) for term in (first, second))
        channels.join(left, right)
        return left

    def _attended(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """Attention is linear in its values; grouped query heads read the same head of values."""
        reason = "attention is not linear in its queries, keys and mask"
        for operand in (*node.args[:2], *node.args[3:4]):
            for part in parts_of(labels.get(operand, [])):  # type: ignore[arg-type]
                channels.pin(part, reason)
        if node.args[2] not in labels:
            raise Stop(reason)
        values, heads = alike(whole(labels, node.args[2]), 2, "attention sums over it"), node.meta["shape"][1]
        if not isinstance(heads, int) or heads % values.shape[1]:
            raise Stop("the number of heads varies")
        return values.repeat_interleave(heads // values.shape[1], dim=1)

    def _appended(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """A cache: what was appended in earlier calls came from the same producer, scaled alike."""
        if node not in self._caches:
            raise Stop("a cache that does not come back as it was returned")
        return alike(whole(labels, node.args[1]), 2, "a cache grows along it")

    def _repeated(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        source, axis = whole(labels, node.args[0]), node.args[2] if len(node.args) > 2 else None
        if not isinstance(axis, int):
            raise Stop("a repetition that flattens its value")
        if source.shape[axis] == 1:
            return source
        if not isinstance(node.args[1], int):
            raise Stop("a repetition of channels that varies")
        return source.repeat_interleave(node.args[1], dim=axis)

    def _sent_to_expert(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """Some of the rows."""
        return alike(whole(labels, node.args[0]), 0, "rows that are scaled apart go to one expert")

    def _merged(self, node: fx.Node, labels: Mapping[fx.Node, Labels], channels: Channels) -> Labels:
        """Rows of all experts in one value: a channel has one scale in all of them."""
        parts: Any = node.args[0]
        lacking = [part for part in parts if part not in labels]
        if not all(self._may_join(part) for part in lacking):
            raise Stop("it is merged with rows that do not take the scale")
        if lacking:
            raise _Partners(lacking)
        merged = whole(labels, parts[0])
        for part in parts[1:]:
            if whole(labels, part).shape != merged.shape:
                raise Stop("it is merged with rows of another form")
            channels.join(merged, whole(labels, part))
        return merged

    def _may_join(self, node: object) -> bool:
        return isinstance(node, fx.Node) and may_produce(node) and (self.inside is None or node in self.inside)


class _Partners(Exception):
    """These producers must take the scale, too."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        super().__init__(", ".join(node.name for node in nodes))
        self.nodes = list(nodes)


def _caches(graph: Graph) -> set[fx.Node]:
    """Caches that come in again as they went out, and that nothing else reads when they come in."""
    past = {
        (port.layer, port.part): node
        for node, port in zip(graph.inputs, graph.signature.inputs, strict=True)
        if port.role == "past"
    }
    found = set[fx.Node]()
    for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
        source = past.get((port.layer, port.part)) if port.role == "present" else None
        if source is None or not is_op(node, _canonical.kv_append.default) or graph.outputs.count(node) > 1:
            continue
        readers = [user for user in source.users if not is_op(user, _aten.sym_size.int)]
        if readers == [node] and node.args[0] is source:
            found.add(node)
    return found


_RULES: tuple[tuple[tuple[Any, ...], Callable[..., Labels]], ...] = (
    (_COMMUTING, ChannelWalk._same),
    ((_aten.to.dtype,), ChannelWalk._cast),
    (_MOVING, ChannelWalk._moved),
    ((_aten.reshape.default,), ChannelWalk._reshaped),
    ((_aten.slice.Tensor,), ChannelWalk._sliced),
    ((_aten.select.int,), ChannelWalk._selected),
    ((_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.split.sizes), ChannelWalk._split),
    ((operator.getitem,), ChannelWalk._item),
    ((_aten.expand.default,), ChannelWalk._expanded),
    ((_aten.cat.default,), ChannelWalk._joined),
    ((_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor), ChannelWalk._multiplied),
    ((_aten.add.Tensor,), ChannelWalk._added),
    ((_canonical.attention.default,), ChannelWalk._attended),
    ((_canonical.kv_append.default,), ChannelWalk._appended),
    ((_aten.repeat_interleave.self_int,), ChannelWalk._repeated),
    ((_canonical.take_expert.default,), ChannelWalk._sent_to_expert),
    ((_canonical.merge_experts.default,), ChannelWalk._merged),
)
