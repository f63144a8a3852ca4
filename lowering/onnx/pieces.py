"""Cuts a written model where few values are alive, into pieces that are models themselves and share its weights.

The file alone is looked at, not the graph that it was written from. What is cut is what was written: every node that an
output depends on is in a piece.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

__all__ = ["Piece", "cut_model", "present_of"]

_TOKENS = ("input_ids", "token_type_ids")
_PAST, _PRESENT = "past_key_values.", "present."
_SIZES = ("Shape", "Size")

Kind = Literal["constant", "sizes", "cache", "tokens"]
"""What a value depends on: each kind also on those ahead of it, ``cache`` on what a cache holds."""
_KINDS: tuple[Kind, ...] = ("constant", "sizes", "cache", "tokens")


@dataclass(frozen=True)
class Piece:
    """A part of a model.

    Attributes:
        model: it, with the weights where they are.
        inputs: what it reads: inputs of the whole, values of pieces ahead.
        outputs: what pieces behind it read, and results of the whole.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def present_of(past: str) -> str:
    """The output that holds what the next run takes as an input."""
    return past.replace(_PAST, _PRESENT, 1)


def cut_model(model: onnx.ModelProto, most_bytes: int) -> list[Piece]:
    """The pieces, in the order in which they run.

    The first computes what depends on sizes, masks and positions alone; of caches, only the sizes matter to it. Nodes
    that depend on constants alone, or on a cache but no token, are in every piece that reads them. A cache is read and
    grows in one piece.

    Args:
        model: without subgraphs; its weights need not be loaded. Not changed.
        most_bytes: of stored weights, that are put into one piece; more where it cannot be cut between them.
    """
    return _Cutter(onnx.shape_inference.infer_shapes(model)).pieces(most_bytes)


class _Cutter:
    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self._model = model
        self._nodes = list(graph.node)
        self._reads = [[name for name in node.input if name] for node in self._nodes]
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._results = [port.name for port in graph.output]
        self._infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
        self._maker = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._kinds: dict[str, Kind] = dict.fromkeys(self._constants, "constant")
        for port in graph.input:
            is_cache = port.name.startswith(_PAST)
            self._kinds[port.name] = "tokens" if port.name in _TOKENS else "cache" if is_cache else "sizes"
        inputs = {port.name for port in graph.input}
        for node, reads in zip(self._nodes, self._reads, strict=True):
            kinds = [self._kinds[name] for name in reads]
            if node.op_type in _SIZES and inputs.issuperset(reads):
                kinds = ["sizes"]
            kind = max(kinds, key=_KINDS.index, default="constant")
            self._kinds.update(dict.fromkeys(node.output, kind))
        live = self._closure((self._maker[name] for name in self._results), _KINDS)
        self._main = [i for i in live if self._kind(i) == "tokens"]
        self._ahead = [i for i in live if self._kind(i) == "sizes"]

    def _kind(self, node: int) -> Kind:
        return self._kinds[self._nodes[node].output[0]]

    def _closure(self, nodes: Iterable[int], kinds: Sequence[Kind]) -> list[int]:
        """Nodes, and those of some kinds that they are computed from, in order."""
        found: set[int] = set()
        stack = list(nodes)
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                sources = (self._maker[name] for name in self._reads[i] if name in self._maker)
                stack.extend(source for source in sources if self._kind(source) in kinds)
        return sorted(found)

    def pieces(self, most_bytes: int) -> list[Piece]:
        """See `cut_model`."""
        owns = [self._ahead]
        start = 0
        for end in self._ends(most_bytes):
            owns.append(self._main[start : end + 1])
            start = end + 1
        results = {self._maker[name] for name in self._results}
        owns[-1] = [*owns[-1], *(i for i in results if self._kind(i) in ("constant", "cache"))]
        insides = [self._closure(own, ("constant", "cache")) for own in owns]
        found = []
        for place, (own, inside) in enumerate(zip(owns, insides, strict=True)):
            wanted = {name for later in insides[place + 1 :] for i in later for name in self._reads[i]}
            wanted.update(self._results)
            outputs = [name for i in sorted(own) for name in self._nodes[i].output if name in wanted]
            if outputs:
                found.append(self._piece(inside, outputs))
        return found

    def _piece(self, inside: list[int], outputs: list[str]) -> Piece:
        made = {name for i in inside for name in self._nodes[i].output}
        read = list(dict.fromkeys(name for i in inside for name in self._reads[i] if name not in made))
        inputs = [name for name in read if name not in self._constants]
        graph = onnx.helper.make_graph(
            [self._nodes[i] for i in inside],
            "piece",
            [self._infos[name] for name in inputs],
            [self._infos[name] for name in outputs],
            initializer=[self._constants[name] for name in read if name in self._constants],
            value_info=[self._infos[name] for name in sorted(made.difference(outputs)) if name in self._infos],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version, producer_name="qcompiler"
        )
        return Piece(model, tuple(inputs), tuple(outputs))

    def _ends(self, most_bytes: int) -> list[int]:
        """Places of the last node of each piece, among those that depend on tokens.

        They lie where as few values are alive as anywhere between the first and the last product with weights, and not
        between the first use of a cache and the node where it grows.
        """
        weights = [self._weights(i) for i in self._main]
        heavy = [at for at, own in enumerate(weights) if own and self._nodes[self._main[at]].op_type != "Gather"]
        if len(heavy) < 2:
            return [len(self._main) - 1]
        alive, closed = self._alive(), self._closed()
        fewest = min(alive[heavy[0] : heavy[-1]])
        ends: list[int] = []
        inside: dict[str, int] = {}
        previous = -1
        for at in [i for i in range(heavy[-1]) if alive[i] == fewest and i not in closed] + [len(self._main) - 1]:
            more = {name: size for own in weights[previous + 1 : at + 1] for name, size in own.items()}
            if inside and more and sum({**inside, **more}.values()) > most_bytes:
                ends.append(previous)
                inside = {}
            inside |= more
            previous = at
        return [*ends, previous]

    def _weights(self, node: int) -> dict[str, int]:
        """Bytes of the matrices that a node reads, also by way of nodes that depend on constants alone."""
        read = {name for i in self._closure([node], ("constant",)) for name in self._reads[i]}
        constants = (self._constants[name] for name in read if name in self._constants)
        return {tensor.name: _stored_bytes(tensor) for tensor in constants if len(tensor.dims) > 1}

    def _alive(self) -> list[int]:
        """For each node that depends on tokens, how many such values are read behind it or returned, caches apart."""
        last_reads = {name: at for at, i in enumerate(self._main) for name in self._reads[i]}
        kept = [name for name in self._results if not name.startswith(_PRESENT)]
        last_reads.update(dict.fromkeys(kept, len(self._main)))
        ends: dict[int, int] = {}
        count, found = 0, []
        for at, i in enumerate(self._main):
            for last in (last_reads.get(name, -1) for name in self._nodes[i].output):
                if last > at:
                    count += 1
                    ends[last] = ends.get(last, 0) + 1
            count -= ends.get(at, 0)
            found.append(count)
        return found

    def _closed(self) -> set[int]:
        """Places behind the first use of a cache and ahead of the node where it grows."""
        places = {name: at for at, i in enumerate(self._main) for name in self._nodes[i].output}
        found: set[int] = set()
        seen: set[str] = set()
        for at, i in enumerate(self._main):
            for past in {name for n in self._closure([i], ("constant", "cache")) for name in self._reads[n]} - seen:
                seen.add(past)
                if past.startswith(_PAST):
                    found.update(range(at, places.get(present_of(past), at)))
        return found


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)
