"""Embedding tables: stored matrices that token ids choose rows of, in float and as codes.

``embedding(table, ids)`` becomes ``dequantize(embedding(codes, ids), embedding(scale, ids), ...)``: the rows that are
chosen are dequantized, and no others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir.graph import Graph, Site, is_op, is_quantized_weight, site_name
from qcompiler.numerics import QuantSpec

__all__ = ["Table", "float_tables", "has_codes_of_table", "quantize_table", "quantized_tables", "with_float_tables"]

_embedding = torch.ops.aten.embedding.default
_dequantize = torch.ops.qcompiler.dequantize.default
_PARTS = ("codes", "scale", "zero_point")


@dataclass(frozen=True)
class Table:
    """An embedding table.

    Attributes:
        weight: the name of its float matrix ``[rows, columns]``; codes, scales and zero points of a quantized one have
            it ahead of ``_codes``, ``_scale`` and ``_zero_point``.
        nodes: what gives the chosen rows in float.
        rows, columns: of the matrix.
        spec: its format; None: float.
    """

    weight: str
    nodes: tuple[fx.Node, ...]
    rows: int
    columns: int
    spec: QuantSpec | None = None

    @property
    def name(self) -> str:
        """The path of the module."""
        return site_name(self.weight)

    @property
    def parts(self) -> list[str]:
        """The names of what a quantized one is stored as."""
        assert self.spec is not None
        return [f"{self.weight}_{part}" for part in (_PARTS[:2] if self.spec.symmetric else _PARTS)]


def float_tables(graph: Graph) -> list[Table]:
    """The tables in float that token ids, as they come in, choose rows of."""
    ids = {node for node, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role == "ids"}
    found: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        is_choice = is_op(node, _embedding) and node.args[0].op == "get_attr" and node.args[1] in ids
        if is_choice and node.meta["dtype"].is_floating_point and not _is_part(node):
            found.setdefault(str(node.args[0].target), []).append(node)
    return [_float(graph, weight, nodes) for weight, nodes in found.items()]


def _float(graph: Graph, weight: str, nodes: list[fx.Node]) -> Table:
    rows, columns = graph.weights.info(weight).shape
    return Table(weight, tuple(nodes), rows, columns)


def quantized_tables(graph: Graph) -> list[Table]:
    """The tables that are codes."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.fx.nodes:
        if is_op(node, _dequantize) and is_op(node.args[0], _embedding):
            found.setdefault(str(node.args[0].args[0].target).removesuffix("_codes"), []).append(node)
    return [_quantized(graph, weight, nodes) for weight, nodes in found.items()]


def _quantized(graph: Graph, weight: str, nodes: list[fx.Node]) -> Table:
    codes, groups = graph.weights.info(f"{weight}_codes"), graph.weights.info(f"{weight}_scale").shape[1]
    zero, block = nodes[0].args[2], nodes[0].args[4]
    group: Any = None if groups == 1 else block
    granularity: Any = "per_channel" if group is None else "per_group"
    spec = QuantSpec(codes.dtype.removeprefix("u"), granularity, group, zero is None)
    rows, columns = codes.shape
    return Table(weight, tuple(nodes), rows, columns, spec)


def _is_part(node: fx.Node) -> bool:
    """Whether what is chosen are scales, or 8-bit floats, that are dequantized next."""
    return any(is_op(user, _dequantize) and node in user.args[:3] for user in node.users)


def quantize_table(graph: Graph, table: Table, spec: QuantSpec) -> None:
    """Lets the rows of a table come from codes, in place; the float matrix goes where nothing else reads it.

    Args:
        graph: whose store has the parts: codes ``[rows, columns]``, scales and zero points ``[rows, groups]``.
        table: in float.
        spec: its format: integers or 8-bit floats, with scales per channel (a row) or group.
    """
    quantized = Table(table.weight, table.nodes, table.rows, table.columns, spec)
    for node in table.nodes:
        old, ids = node.args[:2]
        with graph.fx.inserting_before(node):
            chosen = [_chosen(graph, name, ids, node) for name in quantized.parts]
        node.target = _dequantize
        zero = None if spec.symmetric else chosen[2]
        node.args = (chosen[0], chosen[1], zero, -1, spec.group_of(table.columns), torch.float32)
        node.kwargs = {}
        assert isinstance(old, fx.Node)
        if not old.users:
            graph.fx.erase_node(old)
    if table.weight not in graph.weight_names():
        graph.weights.remove(table.weight)


def _chosen(graph: Graph, name: str, ids: Any, like: fx.Node) -> fx.Node:
    stored = graph.stored_node(name)
    node = graph.fx.call_function(_embedding, (stored, ids))
    dtype = stored.meta["dtype"] if name.endswith("_codes") or not stored.meta["dtype"].is_floating_point else None
    node.meta.update(dtype=dtype or torch.float32, shape=(*like.meta["shape"][:-1], stored.meta["shape"][1]))
    return node


def has_codes_of_table(graph: Graph, site: Site) -> bool:
    """Whether a layer multiplies with the codes of an embedding table."""
    if not is_quantized_weight(site.nodes[0].args[1]):
        return False
    tied = graph.weights.tied(f"{site.weight}_codes")
    return any(f"{table.weight}_codes" in tied for table in quantized_tables(graph))


def with_float_tables(graph: Graph) -> Graph:
    """A copy of a graph whose tables are float matrices, computed from their codes when they are read."""
    copy = graph.copy()
    for table in quantized_tables(copy):
        spec = table.spec
        assert spec is not None
        arguments = (-1, spec.group_of(table.columns), torch.float32)

        def matrix(codes: Tensor, scale: Tensor, zero: Tensor | None = None, arguments: Any = arguments) -> Tensor:
            found: Tensor = torch.ops.qcompiler.dequantize(codes, scale.float(), zero, *arguments)
            return found

        shape = (table.rows, table.columns)
        copy.weights.derive(table.weight, tuple(table.parts), matrix, dtype="float32", shape=shape)
        for node in table.nodes:
            with copy.fx.inserting_before(node):
                stored = copy.stored_node(table.weight)
            node.target, node.args = _embedding, (stored, node.args[0].args[1])  # type: ignore[union-attr]
    copy.fx.eliminate_dead_code()
    return copy
