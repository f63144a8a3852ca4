"""What a value depends on, and what depends on it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch.fx import Node

import qcompiler.ir.ops  # noqa: F401  (defines torch.ops.qcompiler)

if TYPE_CHECKING:
    from qcompiler.ir.graph import Graph

__all__ = ["ancestors", "descendants", "nearest_sites"]


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


def nearest_sites(graph: "Graph", nodes: Iterable[Node]) -> set[str]:
    """The names of the linear layers met first on the way back from some nodes, these included."""
    site_of = {node: site.name for site in graph.sites() for node in site.nodes}
    found: set[str] = set()
    stack = list(nodes)
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in site_of:
            found.add(site_of[node])
            continue
        fresh = set(node.all_input_nodes) - seen
        seen |= fresh
        stack.extend(fresh)
    return found
