"""Finds residual streams that may be rotated: an orthogonal matrix goes into weights and the function stays the same.

A residual stream is proved by closure. A value that an embedding table writes is said to be *in the frame*: its last
axis is to be multiplied by an orthogonal matrix ``Q``. Sums need all their terms in the frame; operators on other axes
pass it on; so does a norm, since ``|x Q| = |x|``, once its weight is folded into the columns of the layers that read
it. Linear layers and tables that write a value in the frame absorb ``Q`` in their rows, linear layers that read one
absorb its inverse in their columns. The walk follows the frame both ways until nothing is left. One operator that does
not commute refuses the whole stream, by name (arXiv 2401.15024, 2404.00456).

``layer_norm`` takes away the mean first, which does not commute with ``Q``. Where every reader of a stream is one, the
mean is taken out of all that is written to the stream instead, and it is ``rms_norm`` that is left.

`online_inputs` finds what no weight can rotate, and is to be rotated at run time. Heads of values are found by `heads`;
what is found here and there, `fold_rotations` rewrites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompiler.ir import Graph, Site, is_op

__all__ = [
    "PRODUCTS",
    "SUMS",
    "Reader",
    "Refused",
    "Stream",
    "Writer",
    "aten",
    "canonical",
    "find_streams",
    "is_row_factor",
    "online_inputs",
]

aten = torch.ops.aten
canonical = torch.ops.qcompiler
_NORMS = (canonical.rms_norm.default, canonical.layer_norm.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MOVES = (
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.repeat_interleave.self_int,
    aten.to.dtype,
    canonical.take_expert.default,
    canonical.merge_experts.default,
)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Writer:
    """What writes to a stream: a linear layer (its rows are rotated) or a table (its last axis is).

    Attributes:
        name: of the site, or of the tensor.
        weight: the tensor.
        is_table: an embedding table, or a stored tensor that is added as it is.
        nodes: linear layers, embeddings or the stored tensor.
    """

    name: str
    weight: str
    is_table: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads a stream, and the norm between them whose weight and bias go into it, if any."""

    site: Site
    norm: fx.Node | None


@dataclass(frozen=True)
class Stream:
    """A residual stream that may be rotated.

    Attributes:
        name: the first table that writes to it.
        width: channels.
        writers, readers: who absorbs the rotation.
        norms: the norms that read it.
        is_centered: whether they are ``layer_norm``: the mean is to be taken out of what the writers write.
    """

    name: str
    width: int
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    norms: tuple[fx.Node, ...]
    is_centered: bool


@dataclass(frozen=True)
class Refused:
    """What cannot be rotated: who stands in the way, and why."""

    name: str
    where: str
    reason: str


def find_streams(graph: Graph) -> tuple[list[Stream], list[Refused]]:
    """The residual streams that embedding tables begin, and those that must stay as they are."""
    walk = _StreamWalk(graph)
    found: list[Stream] = []
    refused: dict[tuple[str, str], Refused] = {}  # two tables may write to one stream
    seen = set[fx.Node]()
    for node in graph.fx.nodes:
        if is_op(node, aten.embedding.default) and node not in seen and node.meta["dtype"].is_floating_point:
            result = walk.prove(node)
            seen.update(walk.frame)
            if isinstance(result, Stream):
                found.append(result)
            else:
                refused.setdefault((result.where, result.reason), result)
    return found, list(refused.values())


class _Blocked(Exception):
    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where, self.reason = where, reason


class _StreamWalk:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sites = {node: site for site in graph.sites() for node in site.nodes}
        self.readers_of: dict[str, list[fx.Node]] = {}
        self.stored: dict[str, list[fx.Node]] = {}
        for node in graph.fx.nodes:
            if node.op == "get_attr":
                self.readers_of.setdefault(str(node.target), []).extend(node.users)
                self.stored.setdefault(str(node.target), []).append(node)
        self.frame: dict[fx.Node, None] = {}
        self._uniform: dict[fx.Node, bool] = {}

    def prove(self, start: fx.Node) -> Stream | Refused:
        """The stream that begins at an embedding; `frame` then holds what was reached."""
        self.frame, self.width = {}, int(start.meta["shape"][-1])
        self.pending = [start]
        self.writers: dict[str, Writer] = {}
        self.reading: dict[str, Site] = {}
        self.norms: dict[fx.Node, None] = {}
        name = _named(start.args[0])
        try:
            while self.pending:
                value = self.pending.pop(0)
                if value in self.frame:
                    continue
                self.frame[value] = None
                self._produce(value)
                for user in value.users:
                    self._consume(user, value)
            readers = tuple(self._reader(site) for site in self.reading.values())
            is_centered = any(is_op(norm, canonical.layer_norm.default) for norm in self.norms)
            if is_centered:
                self._check_centering()
        except _Blocked as blocked:
            return Refused(name, blocked.where, blocked.reason)
        return Stream(name, self.width, tuple(self.writers.values()), readers, tuple(self.norms), is_centered)

    # --- a value in the frame: where it comes from, and who reads it --------------------------------------------------

    def _produce(self, node: fx.Node) -> None:
        """Puts into the frame what a value in it is made from, or notes who writes it."""
        shape = node.meta.get("shape") or ()
        if node.op != "get_attr" and not shape:
            self._sources(node)  # says what it is
        if tuple(shape[-1:]) != (self.width,):
            raise _Blocked(_named(node), f"its last axis is not the stream's, of {self.width} channels")
        if is_op(node, aten.embedding.default) or node.op == "get_attr":
            self._write_table(node)
        elif node in self.sites:
            self._write_rows(self.sites[node])
        elif is_op(node, *_NORMS):
            self._pass_norm(node)
        elif is_op(node, *SUMS) and not node.kwargs and len(node.args) == 2:
            for term in node.args:
                if not isinstance(term, fx.Node):
                    raise _Blocked(node.name, "a number is added to the stream")
                norm = self._weighted(term)
                if norm is not None:
                    raise _Blocked(_norm_name(norm), "its weight scales channels apart, and its output is added")
                self.pending.append(term)
        else:
            self.pending += self._sources(node)

    def _consume(self, user: fx.Node, value: fx.Node) -> None:
        """Puts into the frame what is made from a value in it, or notes who reads it."""
        if is_op(user, aten.sym_size.int):
            return
        if user.op == "output":
            raise _Blocked(value.name, "the graph returns it")
        if user in self.sites:
            if user.args[0] is not value or value in user.args[1:]:
                raise _Blocked(self.sites[user].name, "it reads the stream as a weight or a bias")
            self.reading[self.sites[user].name] = self.sites[user]
            self.pending += self.sites[user].inputs
            return
        if is_op(user, *_NORMS) and (user.args[0] is not value or self._weighted(value) is not None):
            raise _Blocked(_norm_name(user), "it reads what another norm with a weight gives")
        self.pending.append(user)

    def _pass_norm(self, node: fx.Node) -> None:
        self.norms[node] = None
        for tensor in node.args[1:3]:
            if not isinstance(tensor, fx.Node):
                continue
            if tensor.op != "get_attr":
                raise _Blocked(_norm_name(node), "its weight is computed")
            if self.readers_of[str(tensor.target)] != [node]:
                raise _Blocked(_norm_name(node), f"{tensor.target} is shared with another use")
        self.pending.append(node.args[0])  # type: ignore[arg-type]

    def _write_table(self, node: fx.Node) -> None:
        stored = node if node.op == "get_attr" else node.args[0]
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or node.kwargs:
            raise _Blocked(node.name, "its table is computed")
        name = str(stored.target)
        nodes = []
        for user in self.readers_of[name]:
            if is_op(user, aten.embedding.default) and user.args[0].target == name:  # type: ignore[union-attr]
                nodes.append(user)
            elif user not in self.sites and node.op != "get_attr":
                raise _Blocked(name, f"it is shared with {user.name}")
        if node.op == "get_attr" and nodes:
            raise _Blocked(name, "it is an embedding table and added as it is")
        if node.op == "get_attr" and any(user in self.sites for user in node.users):
            raise _Blocked(name, "it is shared with a linear layer")
        self.writers[name] = Writer(name, name, True, tuple(nodes or self.stored[name]))
        self.pending += nodes or self.stored[name]

    def _write_rows(self, site: Site) -> None:
        self._check_owned(site)
        self.writers[site.name] = Writer(site.name, site.weight, False, site.nodes)
        self.pending += site.nodes

    def _check_owned(self, site: Site) -> None:
        weight = site.nodes[0].args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise _Blocked(site.name, "it is quantized already")
        for name, place in ((site.weight, 1), (site.bias, 2)):
            for user in self.readers_of[name] if name is not None else ():
                is_own = user in site.nodes and str(user.args[place].target) == name  # type: ignore[union-attr]
                is_table = place == 1 and is_op(user, aten.embedding.default)
                if not is_own and not is_table:
                    raise _Blocked(site.name, f"{name} is shared with {user.name}")

    def _reader(self, site: Site) -> Reader:
        self._check_owned(site)
        norms = {self._weighted(value) for value in site.inputs}
        if len(norms) > 1:
            raise _Blocked(site.name, "it reads what norms of different weights give")
        return Reader(site, norms.pop())

    def _check_centering(self) -> None:
        """The mean may be taken out only if nobody sees it."""
        for norm in self.norms:
            if is_op(norm, canonical.rms_norm.default):
                raise _Blocked(_norm_name(norm), "it sees the mean of the stream, which others take away")
        for site in self.reading.values():
            if any(self._norm_behind(value) is None for value in site.inputs):
                raise _Blocked(site.name, "it sees the mean of the stream, which norms take away")

    # --- norms, and operators on other axes ---------------------------------------------------------------------------

    def _norm_behind(self, value: fx.Node) -> fx.Node | None:
        """The norm whose output a value is, moved about."""
        while not is_op(value, *_NORMS):
            if value.op != "call_function" or value in self.sites or is_op(value, *SUMS, aten.embedding.default):
                return None
            sources = self._sources(value)
            norms = {self._norm_behind(source) for source in sources[1:]}
            if norms and norms != {self._norm_behind(sources[0])}:
                raise _Blocked(value.name, "it joins what different norms give")
            value = sources[0]
        return value

    def _weighted(self, value: fx.Node) -> fx.Node | None:
        """The norm behind a value, if it scales channels apart or shifts them."""
        norm = self._norm_behind(value)
        if norm is None or self._is_uniform(norm):
            return None
        return norm

    def _is_uniform(self, norm: fx.Node) -> bool:
        if norm not in self._uniform:
            weight, bias = norm.args[1], norm.args[2] if is_op(norm, canonical.layer_norm.default) else None
            values = [
                self.graph.weights.read(str(t.target)) if isinstance(t, fx.Node) and t.op == "get_attr" else None
                for t in (weight, bias)
            ]
            is_scaled = values[0] is not None and bool((values[0] != values[0].reshape(-1)[0]).any())
            is_shifted = values[1] is not None and bool((values[1] != 0).any())
            self._uniform[norm] = not is_scaled and not is_shifted
        return self._uniform[norm]

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """What an operator that leaves the last axis alone, and is linear, takes along it."""
        taken = _sources_along_last(node)
        if taken is None:
            name = str(node.target).removesuffix(".default") if node.op == "call_function" else node.op
            raise _Blocked(node.name, f"{name} does not commute with a rotation")
        return taken


def _sources_along_last(node: fx.Node) -> list[fx.Node] | None:
    """The operands that an operator carries over, last axis for last axis; None where it does anything else."""
    if node.op != "call_function" or node.kwargs or not node.args:
        return None
    first: Any = node.args[0]
    sources = list(first) if isinstance(first, (list, tuple)) else [first]
    if not all(isinstance(source, fx.Node) and source.meta.get("shape") for source in sources):
        return None
    rank, width = len(sources[0].meta["shape"]), (node.meta.get("shape") or ())[-1:]
    if any(source.meta["shape"][-1:] != width for source in sources):
        if is_op(node, aten.mul.Tensor) and is_row_factor(first):
            return [node.args[1]] if isinstance(node.args[1], fx.Node) else None
        return None
    second: Any = node.args[1] if len(node.args) > 1 else None
    if is_op(node, *PRODUCTS):
        return sources if is_row_factor(second) else None
    if is_op(node, aten.to.dtype):
        return sources if second in (torch.float32, torch.float64) else None
    if is_op(node, aten.reshape.default, aten.expand.default, aten.neg.default):
        return sources
    if is_op(node, canonical.take_expert.default, canonical.merge_experts.default):
        return sources
    if is_op(node, aten.permute.default):
        return sources if second[-1] % rank == rank - 1 else None
    axes: tuple[int, ...]
    if is_op(node, aten.transpose.int):
        axes = tuple(node.args[1:3])  # type: ignore[arg-type]
    elif is_op(node, aten.unsqueeze.default):
        return sources if second % (rank + 1) != rank else None
    elif is_op(node, aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.cat.default):
        axes = (second or 0,)
    elif is_op(node, aten.repeat_interleave.self_int):
        axes = (node.args[2],) if len(node.args) > 2 and isinstance(node.args[2], int) else (-1,)
    elif is_op(node, aten.sum.dim_IntList, aten.mean.dim) and isinstance(second, (list, tuple)) and second:
        axes = tuple(second)
    else:
        return None
    return sources if all(axis % rank != rank - 1 for axis in axes) else None


def is_row_factor(value: object) -> bool:
    """A number, or one number for each row."""
    if isinstance(value, fx.Node):
        return value.meta.get("shape") is not None and tuple(value.meta["shape"][-1:]) in ((), (1,))
    return isinstance(value, (int, float))


def _named(node: object) -> str:
    is_stored = isinstance(node, fx.Node) and node.op == "get_attr"
    return str(node.target) if is_stored else str(node)  # type: ignore[attr-defined]


def _norm_name(norm: fx.Node) -> str:
    weight = norm.args[1]
    return str(weight.target).removesuffix(".weight") if isinstance(weight, fx.Node) else norm.name


# --- rotations at run time --------------------------------------------------------------------------------------------


def online_inputs(graph: Graph, sites: Sequence[Site]) -> dict[fx.Node, list[Site]]:
    """Values made by products and functions of elements, which no weight can rotate, and who of ``sites`` reads them.

    Only sites whose weight nobody else reads, with one input each; sums (a stream) and norms are left out.
    """
    linear = {node for site in graph.sites() for node in site.nodes}
    walk = _StreamWalk(graph)
    found: dict[fx.Node, list[Site]] = {}
    for site in sites:
        users = walk.readers_of.get(site.weight, [])
        if len(site.inputs) != 1 or not set(users) <= set(site.nodes):
            continue
        value = source = site.inputs[0]
        while is_op(source, *_MOVES):
            source = source.args[0]  # type: ignore[assignment]
        is_computed = source.op == "call_function" and source not in linear
        if is_computed and not is_op(source, *_NORMS, *SUMS, canonical.attention.default, aten.embedding.default):
            found.setdefault(value, []).append(site)
    return found
