"""The dtype and the symbolic shape of what an operator gives, found by running it on tensors without values.

Sizes that vary are symbols there. What is known of them is what torch's own tracing assumes: that they are larger than
one, and differ from each other and from all fixed sizes.
"""

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from qcompiler.errors import PipelineError
from qcompiler.ir.graph.nodes import is_stored
from qcompiler.ir.signature import Dim, Port

__all__ = ["Described", "ShapeRun", "symbolic_size"]

_LEAST_HINT = 5
"""Symbols are taken for primes from here on where an operator asks for a size, or compares two."""
_ARITHMETIC: dict[type[ast.operator], Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@dataclass(frozen=True)
class Described:
    """What is known of a tensor ahead of running a graph.

    Attributes:
        dtype: of its elements.
        shape: sizes as in `Port`.
    """

    dtype: torch.dtype
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(map(str, self.shape))}]"


class ShapeRun:
    """Runs operators on tensors without values, one after another; equal symbols are equal sizes in all of them.

    Args:
        ports: of the graph's placeholders, for those that say nothing of themselves.
    """

    def __init__(self, ports: Mapping[Node, Port]) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # brings sympy along

        self._ports = ports
        self._env = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._symbols: dict[str, Any] = {}
        self._hints: dict[Any, int] = {}
        self._texts: dict[Any, str] = {}
        self._values: dict[Node, Any] = {}

    def describe(self, node: Node) -> Any:
        """A node's value as `Described`, or what else it is (a size, several tensors)."""
        return self._described(self._value(node))

    def call(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Mapping[Node, Described] | None = None
    ) -> Any:
        """What a call would give; see `describe`.

        Args:
            target: an operator.
            args, kwargs: its arguments; nodes stand for their values, and `Described` for tensors that do not exist.
            given: other descriptions of some nodes.

        Raises:
            PipelineError: if the operator does not take them.
        """
        given = given or {}

        def value(item: Any) -> Any:
            if isinstance(item, Node):
                return self._tensor(given[item]) if item in given else self._value(item)
            return self._tensor(item) if isinstance(item, Described) else item

        positional = tuple(_map(item, value) for item in args)
        named = {key: _map(item, value) for key, item in kwargs.items()}
        return self._described(self._run(target, positional, named))

    def _value(self, node: Node) -> Any:
        """A node's value; one that says nothing of itself is computed from those ahead of it."""
        if node not in self._values:
            self._values[node] = self._known(node)
        return self._values[node]

    def _known(self, node: Node) -> Any:
        dtype, shape = node.meta.get("dtype"), node.meta.get("shape")
        if node in self._ports and (dtype is None or shape is None):
            dtype, shape = getattr(torch, self._ports[node].dtype), self._ports[node].shape
        if dtype is not None and shape is not None:
            if is_stored(node) and dtype.is_floating_point:
                dtype = torch.float32  # whatever a weight is stored in, it is computed with in float32
            return self._tensor(Described(dtype, tuple(shape)))
        if node.op != "call_function":
            raise PipelineError("nothing is known of the shape of a value", where=node.name)
        args, kwargs = (_map(item, self._value, Node) for item in (node.args, dict(node.kwargs)))
        return self._run(node.target, args, kwargs)

    def _run(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            with torch.no_grad(), self._mode:
                result = target(*args, **kwargs)
            if self._env.replacements:  # a symbol was taken for what it happens to be as large as
                raise ValueError("a size that varies would have to be equal to another one")
            return result
        except Exception as error:  # of any kind, as the operator likes
            lines = str(error).strip().splitlines() or [""]
            raise PipelineError(
                "an operator does not take these arguments",
                where=target,
                got=", ".join(str(self._described(item)) for item in args),
                expected=f"what it can compute with ({type(error).__name__}: {lines[0]})",
            ) from error

    def _tensor(self, described: Described) -> Tensor:
        with self._mode:
            return torch.empty([self._size(dim) for dim in described.shape], dtype=described.dtype)

    def _size(self, dim: Dim) -> Any:
        if isinstance(dim, int):
            return dim
        expression = self._expression(dim)
        self._texts.setdefault(expression, dim)
        return self._env.create_symintnode(expression, hint=int(expression.xreplace(self._hints)))

    def _expression(self, text: str) -> Any:
        """Sums and products of names and numbers; whatever else a size may be is a symbol as a whole."""

        def built(tree: ast.expr) -> Any:
            if isinstance(tree, ast.Name):
                return self._symbol(tree.id)
            if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
                return tree.value
            if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
                return _ARITHMETIC[type(tree.op)](built(tree.left), built(tree.right))
            raise SyntaxError(text)

        try:
            return built(ast.parse(text, mode="eval").body)
        except SyntaxError:
            return self._symbol(f"({text})")

    def _symbol(self, name: str) -> Any:
        if name not in self._symbols:
            import sympy  # type: ignore[import-untyped]
            from torch._dynamo.source import ConstantSource
            from torch.fx.experimental.symbolic_shapes import DimDynamic

            hint = int(sympy.nextprime(max(self._hints.values(), default=_LEAST_HINT - 1)))
            symbol = self._env.create_symbol(
                hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            self._symbols[name], self._hints[symbol] = symbol, hint
        return self._symbols[name]

    def _described(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Described(value.dtype, tuple(self._dim(size) for size in value.shape))
        if isinstance(value, torch.SymInt):
            return self._dim(value)
        return tuple(map(self._described, value)) if isinstance(value, (list, tuple)) else value

    def _dim(self, size: Any) -> Dim:
        names = {str(symbol): name for name, symbol in self._symbols.items()}
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            if expression in self._texts:
                return self._texts[expression]
            if any(str(symbol) not in names for symbol in expression.free_symbols):
                raise PipelineError("a size depends on the values of a tensor, and cannot be told ahead", got=size)
        return symbolic_size(size, names)


def _map(item: Any, function: Any, kinds: Any = object) -> Any:
    """An argument with what it holds replaced, in lists and dictionaries, too."""
    if isinstance(item, (list, tuple)):
        parts = [_map(part, function, kinds) for part in item]
        return parts if isinstance(item, list) else tuple(parts)
    if isinstance(item, dict):
        return {key: _map(part, function, kinds) for key, part in item.items()}
    return function(item) if isinstance(item, kinds) else item


def symbolic_size(size: Any, symbols: Mapping[str, Dim]) -> Dim:
    """A size that torch traced as an expression of our symbols.

    Args:
        size: a number or a ``SymInt``.
        symbols: torch's symbols → ours.
    """
    if isinstance(size, int):
        return size
    import sympy

    expression = size.node.expr
    names = {s: sympy.Symbol(str(symbols.get(str(s), s))) for s in expression.free_symbols}
    return str(expression.subs(names, simultaneous=True))
