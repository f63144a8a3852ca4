"""`StreamedKernelModel`: kernels run in pieces, with the weights of one in memory at a time, to compare them once.

The module is built as ever, except that a `Deferred` stands for each weight. Its graph is cut in pieces; each becomes a
module of its own with the weights it reads, all texts go through it, and it is dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from qcompiler.ir import Around, Graph, Trimmer
from qcompiler.lowering.kernels.module.build import BuiltModule, build_module
from qcompiler.lowering.kernels.module.cpu_calls import call_directly
from qcompiler.lowering.kernels.module.deferred import Deferred
from qcompiler.lowering.kernels.module.model import KernelModel, choose_dtype
from qcompiler.lowering.kernels.target import ON_A_CPU

__all__ = ["PIECE_BYTES", "StreamedKernelModel", "lower_streamed"]

PIECE_BYTES = 32 << 20
"""Of packed weights in a piece; one product may have more."""


class StreamedKernelModel(KernelModel):
    """As `KernelModel`, for models that are too large for the memory.

    Whatever is asked for makes all weights anew; `run_together` once for many texts.

    Args:
        graph, device, dtype: as of `KernelModel`.
        piece_bytes: of weights in a piece; more where it cannot be cut between them.
    """

    def __init__(
        self, graph: Graph, device: torch.device, dtype: torch.dtype, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        super().__init__(graph, device, dtype)
        nodes = list(self.module.graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._results: tuple[Node, ...] = nodes[-1].args[0]
        loose = [node for node, slot in zip(self._inputs[3:], self.slots, strict=True) if not slot.is_buffer]
        self._longer = dict(zip(loose, self._results[1:], strict=True))
        self._pieces = _cut(self.module, self._results, self._longer, piece_bytes)

    def _build(self, graph: Graph, device: torch.device, dtype: torch.dtype) -> BuiltModule:
        return build_module(graph, device, dtype, is_deferred=True)

    def run_together(
        self, runs: Sequence[Sequence[Tensor]], around: Around = lambda _: nullcontext()
    ) -> Iterator[Tensor]:
        """See `qcompiler.protocol.RunsTogether`."""
        for logits, *_ in self._by_pieces([self._feed_run(parts) for parts in runs], around):
            yield logits

    def _feed_run(self, parts: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """Inputs for parts of one text; they write to the same buffers."""
        caches = self.new_cache(parts[0].shape[0], sum(ids.shape[1] for ids in parts)).tensors
        found: list[tuple[Any, ...]] = []
        length = 0
        for ids in parts:
            self._check(ids)
            start = torch.tensor([length], dtype=torch.int32, device=self.device)
            found.append((ids.to(self.device), start, length, *caches))
            length += ids.shape[1]
        return found

    def _run(self, ids: Tensor, start: Tensor, past: int, *caches: Tensor) -> Sequence[Tensor]:
        return next(self._by_pieces([[(ids, start, past, *caches)]]))

    def _by_pieces(
        self, runs: Sequence[Sequence[tuple[Any, ...]]], around: Around = lambda _: nullcontext()
    ) -> Iterator[Sequence[Tensor]]:
        """What `qcompiler.ir.run_by_segments` does, with modules."""
        memory = Trimmer()
        carried = [[dict(zip(self._inputs, given, strict=True)) for given in run] for run in runs]
        for piece in self._pieces:
            module = piece.make(self.module)
            if self.device.type == "cpu":
                call_directly(module)
            number = 0
            for run in carried:
                ahead: dict[Node, Any] = {}
                for at, values in enumerate(run):
                    if ahead:
                        values.update({past: ahead[self._longer[past]] for past in piece.grown})
                    with around(number), torch.no_grad():
                        results = module(*(values[node] for node in piece.inputs))
                    ahead = dict(zip(piece.outputs, results, strict=True))
                    run[at] = {node: value for node, value in {**values, **ahead}.items() if node in piece.alive}
                    if piece is self._pieces[-1]:
                        found, run[at] = [run[at][node] for node in self._results], {}
                        yield found
                    number += 1
            _empty(module)
            memory.trim()


@dataclass(frozen=True)
class _Piece:
    """Nodes that follow each other, and run while their weights are there.

    Attributes:
        nodes: in order.
        inputs: placeholders and nodes ahead whose values they take.
        outputs: those of them that are read behind.
        grown: caches that are no buffers and made longer here: parts of a text behind the first read what the part
            ahead gave.
        alive: what is read behind the piece.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    grown: tuple[Node, ...]
    alive: frozenset[Node]

    def make(self, whole: fx.GraphModule) -> fx.GraphModule:
        """A module of the piece, with its weights."""
        graph = fx.Graph()
        copies = {
            node: graph.placeholder(str(node.target) if node.op == "placeholder" else node.name) for node in self.inputs
        }
        members: dict[str, nn.Module | Tensor] = {}
        for node in self.nodes:
            for source in (*_stored(node), node):
                if source not in copies:
                    copies[source] = graph.node_copy(source, copies.__getitem__)
                if source.op in ("get_attr", "call_module") and source.target not in members:
                    member = getattr(whole, str(source.target))
                    members[str(source.target)] = member.make() if isinstance(member, Deferred) else member
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(members, graph)


def _empty(module: nn.Module) -> None:
    """Lets go of what a module holds: it is part of a cycle, and would go when that is collected."""
    for name in [name for name, _ in (*module.named_children(), *module.named_buffers(recurse=False))]:
        delattr(module, name)


def _stored(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _cut(
    module: fx.GraphModule, results: Sequence[Node], longer: Mapping[Node, Node], piece_bytes: int
) -> list[_Piece]:
    """Cuts the graph of a module; a cache that is no buffer is made longer in the piece that reads it first."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    place = {node: at for at, node in enumerate(nodes)}
    ends: dict[Node, int] = {}  # by the node that reads such a cache first, how far the piece goes at least
    for past, made in longer.items():
        if past.users:
            first = min(past.users, key=place.__getitem__)
            ends[first] = max(ends.get(first, -1), place.get(made, -1))
    groups: list[list[Node]] = [[]]
    read: set[str] = set()
    size, end = 0, -1

    def bytes_in(targets: set[str]) -> int:
        members = (getattr(module, target) for target in targets)
        return sum(member.size for member in members if isinstance(member, Deferred))

    for at, node in enumerate(nodes):
        members = {str(item.target) for item in (*_stored(node), node) if item.op in ("get_attr", "call_module")}
        if groups[-1] and at > end and size + bytes_in(members - read) > piece_bytes:
            groups.append([])
            read, size = set(), 0
        groups[-1].append(node)
        size += bytes_in(members - read)
        read |= members
        end = max(end, ends.get(node, -1))
    home = {node: number for number, group in enumerate(groups) for node in group}
    last = dict.fromkeys(results, len(groups))
    for node in reversed(nodes):
        for source in node.all_input_nodes:
            last[source] = max(last.get(source, -1), home[node])
    past_length = [node for node in module.graph.nodes if node.op == "placeholder"][2]
    last[past_length] = len(groups)  # which every piece takes
    pieces = []
    for number, group in enumerate(groups):
        sources = dict.fromkeys(s for node in group for s in node.all_input_nodes if s.op != "get_attr")
        inputs = dict.fromkeys([past_length, *(s for s in sources if home.get(s, -1) < number)])
        alive = frozenset(node for node, behind in last.items() if behind > number and home.get(node, -1) <= number)
        outputs = tuple(node for node in group if node in alive)
        grown = tuple(past for past, made in longer.items() if home.get(made) == number)
        pieces.append(_Piece(tuple(group), tuple(inputs), outputs, grown, alive))
    return pieces


def lower_streamed(graph: Graph, *, device: torch.device, dtype: str | None = None) -> StreamedKernelModel:
    """As `qcompiler.lowering.kernels.lower`, with the weights of one piece in memory at a time."""
    model = StreamedKernelModel(graph, device, choose_dtype(graph, device, dtype))
    if device.type == "cpu":
        model.report["notes"].append(ON_A_CPU)
    return model
