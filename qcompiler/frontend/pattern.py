"""Local rewrites: a `Rule` starts at an anchor operator, checks what surrounds it, and says why it does not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from qcompiler.ir import Graph, is_op

__all__ = [
    "Miss",
    "Rule",
    "apply_rules",
    "arguments",
    "expect",
    "is_weight",
    "note",
    "other_operand",
    "replace",
    "shared_call",
]


class Miss(Exception):
    """The pattern does not fit here, for this reason."""


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: shown in reports.
        anchors: the operators it starts from.
        rewrite: called with the graph and an anchor node; rewrites and returns, or raises `Miss`.
    """

    name: str
    anchors: tuple[Any, ...]
    rewrite: Callable[[Graph, fx.Node], None]


def apply_rules(graph: Graph, rules: Sequence[Rule]) -> None:
    """Applies each rule once at each of its anchors, in order; misses are noted in ``graph.unrecognized``."""
    for rule in rules:
        for node in list(graph.fx.nodes):
            if is_op(node, *rule.anchors) and not node._erased:  # a rewrite may take other anchors along
                try:
                    rule.rewrite(graph, node)
                except Miss as miss:
                    note(graph, node, rule.name, str(miss))
        graph.fx.eliminate_dead_code()


def note(graph: Graph, node: fx.Node, pattern: str, reason: str) -> None:
    """Writes down, once, what was not recognised and why."""
    entry = {"node": node.name, "pattern": pattern, "reason": reason}
    if entry not in graph.unrecognized:
        graph.unrecognized.append(entry)


def arguments(node: fx.Node, required: int, *defaults: Any) -> tuple[Any, ...]:
    """The positional arguments of a call, those left out filled in from ``defaults``."""
    given: tuple[Any, ...] = tuple(node.args)
    return given + defaults[len(given) - required :]


def expect(node: object, *targets: Any, what: str) -> fx.Node:
    """``node`` if it calls one of ``targets``, else a `Miss` that says what was wanted."""
    if isinstance(node, fx.Node) and is_op(node, *targets):
        return node
    found = node.target if isinstance(node, fx.Node) else node
    raise Miss(f"expected {what}, found {found}")


def is_weight(node: object) -> TypeGuard[fx.Node]:
    """Whether a value is a stored tensor."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def other_operand(node: fx.Node, one: object) -> Any:
    """The operand of a two-operand node that is not ``one``."""
    first, second = node.args[:2]
    return second if first is one else first


def replace(graph: Graph, old: fx.Node, target: Any, args: tuple[Any, ...], **meta: Any) -> fx.Node:
    """Puts a call of ``target`` in the place of ``old``, which keeps its dtype and shape."""
    with graph.fx.inserting_before(old):
        new = graph.fx.call_function(target, args)
    new.meta.update(dtype=old.meta.get("dtype", torch.float32), shape=old.meta["shape"], **meta)
    old.replace_all_uses_with(new)
    graph.fx.erase_node(old)
    return new


def shared_call(graph: Graph, target: Any, args: tuple[Any, ...], shape: Any, dtype: torch.dtype | None) -> fx.Node:
    """A call right behind its operands; the one that is there already, where another layer has made it.

    Args:
        graph: which it belongs to.
        target: the operator.
        args: its arguments, at least one of them a node.
        shape: of the result.
        dtype: of the result; None for a size.
    """
    operands: list[fx.Node] = []
    fx.node.map_arg(args, operands.append)
    for user in operands[0].users:
        if is_op(user, target) and user.args == args and not user.kwargs:
            return user
    behind = max(operands)
    with graph.fx.inserting_after(graph.inputs[-1] if behind.op == "placeholder" else behind):
        node = graph.fx.call_function(target, args)
    if dtype is not None:
        node.meta.update(dtype=dtype, shape=shape)
    return node
