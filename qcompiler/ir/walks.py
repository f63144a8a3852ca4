"""What a value depends on, and what depends on it."""

from collections.abc import Iterable

from torch.fx import Node

import qcompiler.ir.ops  # noqa: F401  (defines torch.ops.qcompiler)

__all__ = ["ancestors", "descendants"]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The given nodes and everything they are computed from."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def descendants(nodes: Iterable[Node]) -> set[Node]:
    """The given nodes and everything that is computed from them."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen
