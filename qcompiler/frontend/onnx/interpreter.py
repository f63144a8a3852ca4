"""`Interpreter`: an ONNX graph as a module, its nodes computed one after the other by torch operators."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.errors import QCompilerError, UnsupportedModelError
from qcompiler.frontend.exporting import first_line
from qcompiler.frontend.onnx.call import Call, Operator
from qcompiler.frontend.onnx.nodes import Block, Node
from qcompiler.frontend.onnx.operators import OPERATORS
from qcompiler.frontend.onnx.values import MOST_KNOWN, Known, Unsupported, Value, as_number, as_tensor, known, shortest
from qcompiler.storage import WeightStore

__all__ = ["LINEAR", "Interpreter", "check_operators", "live"]

LINEAR = "qcompiler"
"""The domain of the one operator of ours, ``Linear``: x, weight ``[out, in]``, bias."""
_BY_TENSORS = ("QuantizeLinear", "DequantizeLinear")


def live(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that outputs need, in order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.outputs):
            kept.append(node)
            needed.update(_reads(node))
    return kept[::-1]


def _reads(node: Node) -> Iterator[str]:
    yield from node.inputs
    for value in node.attributes.values():
        if isinstance(value, Block):
            yield from value.outputs
            for inner in value.nodes:
                yield from _reads(inner)


def check_operators(nodes: list[Node], versions: Mapping[str, int], where: object) -> None:
    """Names all operators that have no function here, with how often each occurs.

    Raises:
        UnsupportedModelError: if there are some.
    """
    unknown: Counter[str] = Counter()
    for node in _all_nodes(nodes):
        if _function(node) is None and node.op != "If":
            unknown[f"{node.domain}::{node.op}" if node.domain else node.op] += 1
    missing = {node.domain for node in _all_nodes(nodes)} - {*versions, LINEAR}
    if unknown:
        raise UnsupportedModelError(
            "operators that are not read from ONNX",
            where=where,
            got=", ".join(f"{name} ({count})" for name, count in unknown.most_common()),
            expected="operators of exported language, vision and audio models",
            remedy="compile the model it was exported from",
        )
    if missing:
        raise UnsupportedModelError(
            "operators of a set that the file does not import", where=where, got=", ".join(sorted(missing))
        )


def _all_nodes(nodes: Iterable[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        for value in node.attributes.values():
            if isinstance(value, Block):
                yield from _all_nodes(value.nodes)


def _function(node: Node) -> Operator | None:
    if node.domain == LINEAR:
        return _linear
    return OPERATORS.get(node.domain, {}).get(node.op)


def _linear(call: Call) -> Value:
    return nn.functional.linear(call.tensor(0), call.tensor(1), call.optional_tensor(2))


class Interpreter(nn.Module):
    """Computes a graph.

    Stored tensors are its buffers, on meta unless it is asked for their values; those that may be shapes or are single
    numbers are read, and known while it is traced.

    Args:
        nodes: in order.
        inputs, outputs: names of values.
        store: what values are stored.
        versions: of operator sets.
        turned: names of values that are the transpose of a stored matrix, and its name.
        on_meta: whether stored tensors have no values.

    Attributes:
        stored: names in the store, by the names of the buffers.
    """

    def __init__(
        self,
        nodes: list[Node],
        inputs: Iterable[str],
        outputs: Iterable[str],
        store: WeightStore,
        versions: Mapping[str, int],
        *,
        turned: Mapping[str, tuple[str, bool]] | None = None,
        on_meta: bool = True,
    ) -> None:
        super().__init__()
        self._outputs = list(outputs)
        self._nodes, self._inputs = live(nodes, self._outputs), list(inputs)
        self._versions, self._turned = versions, turned or {}
        self.stored: dict[str, str] = {}
        self._buffer_of: dict[str, str] = {}
        self._constants: dict[str, Known] = {}
        wanted = {name for node in self._nodes for name in _reads(node)} | set(self._outputs)
        wanted |= {stored for name, (stored, _) in self._turned.items() if name in wanted}
        for name in store.names():
            if name in wanted:
                self._take(name, store, on_meta)
        self._uses = Counter(name for node in self._nodes for name in _reads(node))

    def _take(self, name: str, store: WeightStore, on_meta: bool) -> None:
        info = store.info(name)
        dtype = getattr(torch, info.dtype, torch.int8 if info.dtype.startswith("int") else torch.uint8)
        is_float = dtype.is_floating_point
        narrow = is_float and dtype.itemsize == 1
        computed = torch.float32 if is_float and dtype.itemsize in (2,) else dtype
        count = torch.Size(info.shape).numel()
        if not narrow and count <= (1 if is_float else MOST_KNOWN) and len(info.shape) <= 1:
            numbers = store.read(name, check_finite=False).reshape(-1).tolist()
            numbers = list(map(shortest, numbers)) if info.dtype == "float32" else numbers
            self._constants[name] = known(numbers, computed, info.shape)
        buffer = f"t{len(self.stored)}"
        self.stored[buffer], self._buffer_of[name] = name, buffer
        if on_meta:
            tensor = torch.empty(info.shape, dtype=computed, device="meta")
        else:
            tensor = store.read(name, check_finite=False).to(computed)
        self.register_buffer(buffer, tensor)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs.

        Args:
            inputs: in order.

        Raises:
            UnsupportedModelError: naming a node that cannot be computed.
        """
        device = next((tensor.device for tensor in (*inputs, *self.buffers())), torch.device("cpu"))
        values: dict[str, Value] = dict(zip(self._inputs, inputs, strict=True))
        self._run(self._nodes, values, device)
        return tuple(as_tensor(self._value(name, values), device) for name in self._outputs)

    def _run(self, nodes: list[Node], values: dict[str, Value], device: torch.device) -> None:
        for node in nodes:
            try:
                results = self._results(node, values, device)
            except QCompilerError:
                raise
            except Unsupported as reason:
                raise UnsupportedModelError(
                    "an operator is used in a way that is not read", where=self._where(node), got=reason
                ) from reason
            except Exception as error:  # torch refuses operands in many ways
                raise UnsupportedModelError(
                    "a node that cannot be computed from its inputs",
                    where=self._where(node),
                    got=first_line(error),
                    expected="shapes and dtypes that fit each other",
                ) from error
            for name, value in zip(node.outputs, results, strict=False):
                if name and value is not None:
                    values[name] = value

    def _results(self, node: Node, values: dict[str, Value], device: torch.device) -> tuple[Value | None, ...]:
        if node.op == "If" and node.domain == "":
            return self._chosen(node, values, device)
        by_tensors = node.op in _BY_TENSORS
        inputs = [self._value(name, values, by_tensors) if name else None for name in node.inputs]
        outputs = max((i + 1 for i, name in enumerate(node.outputs) if name and self._is_read(name)), default=1)
        function = _function(node)
        assert function is not None, node.op
        call = Call(inputs, node.attributes, self._versions.get(node.domain, 1), outputs, device)
        result = function(call)
        call.check_attributes()
        return result if isinstance(result, tuple) else (result,)

    def _chosen(self, node: Node, values: dict[str, Value], device: torch.device) -> tuple[Value | None, ...]:
        """The results of one branch; which is known while tracing."""
        holds = as_number(self._value(node.inputs[0], values), "a condition")
        block: Any = node.attributes["then_branch" if holds else "else_branch"]
        inner = dict(values)
        self._run(block.nodes, inner, device)
        return tuple(self._value(name, inner) for name in block.outputs)

    def _is_read(self, name: str) -> bool:
        return name in self._uses or name in self._outputs

    def _value(self, name: str, values: Mapping[str, Value], as_stored: bool = False) -> Value:
        if name in values:
            return values[name]
        if name in self._turned:
            stored, is_turned = self._turned[name]
            matrix: Tensor = self.get_buffer(self._buffer_of[stored])
            return matrix.t() if is_turned else matrix
        if name in self._constants and not as_stored:
            return self._constants[name]
        return self.get_buffer(self._buffer_of[name])

    @staticmethod
    def _where(node: Node) -> str:
        return node.called if node.op in node.called else f"{node.called} ({node.op})"
