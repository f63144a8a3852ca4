"""Folds rotations into the weights that `streams` and `heads` have found, or puts in the operator ``hadamard``.

Nothing is computed before a tensor is read: memory does not grow with depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.ir import Graph, Site, is_op
from qcompiler.numerics import hadamard
from qcompiler.proofs.heads import Heads
from qcompiler.proofs.streams import Stream

__all__ = ["Rotation", "rotate_heads", "rotate_input", "rotate_stream"]

_canonical = torch.ops.qcompiler


@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal map ``x → (x * signs) H``, ``H`` being Hadamard matrices of order ``block`` along the diagonal.

    Attributes:
        signs: float32 ``[n]``, of ±1.
        block: divides n.
    """

    signs: Tensor
    block: int

    @classmethod
    def random(cls, width: int, generator: torch.Generator) -> "Rotation":
        """Random signs, and the largest matrices there are."""
        signs = torch.randint(2, (width,), generator=generator).float() * 2 - 1
        return cls(signs, hadamard.block_order(width))

    def __call__(self, x: Tensor) -> Tensor:
        """float32, the last axis rotated."""
        return hadamard.multiply(x.float() * self.signs.to(x.device), self.block)


def rotate_stream(graph: Graph, stream: Stream, rotation: Rotation) -> list[str]:
    """Rotates a residual stream: its norms first lose their weights, and with ``layer_norm`` all writers their mean.

    Args:
        graph: its weights are rewritten when they are read next.
        stream: of this graph.
        rotation: of ``stream.width`` channels.

    Returns:
        Tables that were tied to a linear layer and are stored on their own from now on.
    """
    untied = [name for writer in stream.writers if writer.is_table for name in _untie(graph, writer.nodes, stream)]
    columns = dict[str, Tensor]()
    for reader in stream.readers:
        norm, weight = reader.norm, reader.site.weight
        if norm is not None:
            bias = norm.args[2] if is_op(norm, _canonical.layer_norm.default) else None
            if isinstance(bias, fx.Node):
                _fold_shift(graph, reader.site, str(bias.target))
            scale = norm.args[1]
            if isinstance(scale, fx.Node):
                columns[reader.site.name] = graph.weights.read(str(scale.target)).float()
        factor = columns.get(reader.site.name)
        graph.derive_float(weight, lambda w, f=factor: rotation(w.float() if f is None else w.float() * f))

    def written(x: Tensor) -> Tensor:
        x = x.float()
        return rotation(x - x.mean(-1, keepdim=True) if stream.is_centered else x)

    for writer in stream.writers:
        if writer.is_table:
            graph.derive_float(_stored_name(writer.nodes[0]), written)
            continue
        graph.derive_float(writer.weight, lambda w: written(w.T).T)
        bias = writer.nodes[0].args[2] if len(writer.nodes[0].args) > 2 else None  # a norm's may have gone into it
        if isinstance(bias, fx.Node):
            graph.derive_float(str(bias.target), written)
    folded = {reader.norm for reader in stream.readers}
    for norm in stream.norms:
        _simplify_norm(graph, norm, stream.width, is_folded=norm in folded)
    return untied


def _untie(graph: Graph, nodes: Sequence[fx.Node], stream: Stream) -> list[str]:
    """Gives a table a tensor of its own where a linear layer goes by the same name; says which were tied."""
    stored = nodes[0] if nodes[0].op == "get_attr" else nodes[0].args[0]
    assert isinstance(stored, fx.Node)
    name = str(stored.target)
    read = {reader.site.weight for reader in stream.readers}
    same = {n for n in graph.fx.nodes if n.op == "get_attr" and n.target == name}
    others = {user for node in same for user in node.users} - set(nodes)
    if others and nodes[0].op != "get_attr":
        own = f"{name}.table"
        graph.weights.alias(own, name)
        for node in nodes:
            with graph.fx.inserting_before(node):
                copy = graph.fx.create_node("get_attr", own)
            copy.meta.update(stored.meta)
            node.update_arg(0, copy)
        return [name]
    return [name] if read.intersection(graph.weights.tied(name)) else []


def _stored_name(node: fx.Node) -> str:
    stored = node if node.op == "get_attr" else node.args[0]
    assert isinstance(stored, fx.Node)
    return str(stored.target)


def _fold_shift(graph: Graph, site: Site, shift: str) -> None:
    """``W (x + b) + c = W x + (W b + c)``: the bias of a norm goes into that of a layer, which may be new."""
    store, bias = graph.weights, site.bias
    sources = (site.weight, shift) if bias is None else (site.weight, shift, bias)

    def moved(weight: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
        product = weight.float() @ shift.float()
        return product if bias is None else product + bias.float()

    if bias is not None:
        graph.derive_float(bias, moved, sources)
        return
    bias = f"{site.name}.bias"
    while bias in store:
        bias += "_of_norm"
    store.derive(bias, sources, moved, dtype="float32", shape=(site.out_features,))
    with graph.fx.inserting_before(site.nodes[0]):
        node = graph.fx.create_node("get_attr", bias)
    node.meta.update(dtype=torch.float32, shape=(site.out_features,))
    for linear in site.nodes:
        linear.args = (*linear.args[:2], node)


def _simplify_norm(graph: Graph, norm: fx.Node, width: int, *, is_folded: bool) -> None:
    """A norm whose weight and bias have gone into its readers becomes ``rms_norm`` with a weight of ones."""
    weight, eps = norm.args[1], norm.args[-1]
    is_layer_norm = is_op(norm, _canonical.layer_norm.default)
    if not is_folded and not is_layer_norm:
        return  # its weight is one number for all channels
    if not isinstance(weight, fx.Node):
        name = f"{norm.name}.weight"
        graph.weights.set(name, torch.ones(width))
        with graph.fx.inserting_before(norm):
            weight = graph.fx.create_node("get_attr", name)
        weight.meta.update(dtype=torch.float32, shape=(width,))
    elif is_folded:
        graph.rewrite_float(str(weight.target), torch.ones(width))
    if is_layer_norm:
        unused: Any = norm.args[2]
        norm.target, norm.args = _canonical.rms_norm.default, (norm.args[0], weight, eps)
        if isinstance(unused, fx.Node) and not unused.users:
            graph.fx.erase_node(unused)


def rotate_heads(graph: Graph, heads: Heads, rotation: Rotation) -> None:
    """Rotates every head of values alike, and the columns of the layers that read what attention makes of them.

    Args:
        graph: its weights are rewritten when they are read next.
        heads: of this graph.
        rotation: of as many channels as a head has.
    """
    rows, size = heads.rows, heads.rows.shape[1]

    def made(x: Tensor) -> Tensor:  # a weight or a bias: the first axis is that of the outputs
        x = x.float()
        parts = x[rows].movedim(1, -1)  # [heads, in, size] or [heads, size]
        return x.index_put((rows,), rotation(parts).movedim(-1, 1))

    graph.derive_float(heads.values.weight, made)
    if heads.values.bias is not None:
        graph.derive_float(heads.values.bias, made)
    for site in heads.outputs:
        graph.derive_float(site.weight, lambda w: rotation(w.reshape(w.shape[0], -1, size)).reshape(w.shape))


def rotate_input(graph: Graph, value: fx.Node, sites: Sequence[Site], block: int) -> fx.Node:
    """Rotates a value at run time, and the columns of the layers that read it.

    Args:
        graph: rewritten.
        value: read by ``sites`` alone among the linear layers to be rotated.
        sites: their weights are in float.
        block: order of the Hadamard matrices.

    Returns:
        The new node.
    """
    rotated = graph.insert(_canonical.hadamard.default, value, [node for site in sites for node in site.nodes], block)
    for site in sites:
        graph.derive_float(site.weight, lambda w: hadamard.multiply(w.float(), block))
    return rotated
