"""Layers of a quantized checkpoint become quantized sites of a graph: the nodes that a compilation would leave."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.checkpoints.caches import place_caches
from qcompiler.frontend.checkpoints.contents import PARTS, USE_ORIGINAL, Checkpoint, Layer
from qcompiler.frontend.checkpoints.merging import merge_layers
from qcompiler.ir import Graph, Site, float_tables, quantize_table
from qcompiler.numerics import QuantSpec
from qcompiler.storage import WeightStore

__all__ = ["check_linear", "place_layers"]

_SHOWN = 4
_select = torch.ops.aten.index_select.default
_mul = torch.ops.aten.mul.Tensor
_Readers = dict[tuple[object, ...], list[tuple[Site, fx.Node]]]


def check_linear(checkpoint: Checkpoint, weights: WeightStore, model: nn.Module) -> None:
    """Refuses codes in the place of anything but the weight of a linear layer, or an embedding.

    Args:
        checkpoint: as read.
        weights: its float tensors by the names of the model.
        model: on meta.

    Raises:
        UnsupportedModelError: naming the layer.
    """
    for name in weights.names():
        layer, (path, _, attribute) = checkpoint.versions.get(weights.version(name)), name.rpartition(".")
        if layer is None:
            continue
        module = model.get_submodule(path)
        if not isinstance(module, (nn.Linear, nn.Embedding)) or attribute != "weight":
            raise UnsupportedModelError(
                "a quantized module is no linear layer, and no embedding",
                where=layer.name,
                got=type(module).__name__,
                expected="Linear or Embedding",
                remedy=USE_ORIGINAL,
            )


def place_layers(graph: Graph, checkpoint: Checkpoint, unused: Iterable[str]) -> None:
    """Gives each site of a canonical graph, in place, the codes that the checkpoint has of it; none is read.

    Layers that transformers merges, such as the gate and up projections of an expert, are merged as codes
    (`qcompiler.frontend.checkpoints.merging`). Where that cannot be, and where codes are no site of the graph, they
    stay float weights, computed from their codes; a note says so.

    Args:
        graph: whose float weights are those of ``checkpoint.floats``.
        checkpoint: as read.
        unused: stored names that the model has no place for.
    """
    placed = set[str]()
    names = {checkpoint.floats.version(name): name.removesuffix(".weight") for name in checkpoint.floats.names()}
    stored = {site.name: names.get(graph.weights.version(site.weight), site.name) for site in graph.sites()}
    orders: _Readers = {}
    found: list[tuple[Site, Layer]] = []
    for site in graph.sites():
        layer = checkpoint.versions.get(graph.weights.version(site.weight))
        if layer is not None:
            for part in PARTS:
                if f"{layer.weight}_{part}" in checkpoint.parts:
                    graph.weights.alias(f"{site.weight}_{part}", f"{layer.weight}_{part}", checkpoint.parts)
            sources: Sequence[Layer] = [layer]
        else:
            layer, sources = merge_layers(graph, site, checkpoint)
        if layer is None:
            continue
        assert layer.scheme.weight is not None
        graph.set_stored_weight(site, layer.scheme.weight)
        graph.schemes[site.name] = layer.scheme
        placed.update(source.weight for source in sources)
        found.append((site, layer))
        if layer.order is not None:
            for node in site.nodes:
                orders.setdefault((node.args[0], tuple(layer.order.tolist())), []).append((site, node))
    for (_, order), readers in orders.items():
        _select_columns(graph, readers, torch.tensor(order))
    _multiply_inputs(graph, found)
    _round_inputs(graph, found)
    place_caches(graph, checkpoint, stored)
    placed.update(_place_tables(graph, checkpoint))
    rest = [name.removesuffix(".weight") for name in checkpoint.layers if name not in placed.union(unused)]
    if rest:
        note = "layers that are no linear layer of the graph by themselves are taken as float weights"
        graph.notes.append(_sentence(note, rest))
    unrounded = [name for name in rest if checkpoint.layers[f"{name}.weight"].scheme.activation is not None]
    if unrounded:
        graph.lost.append(_sentence("inputs stay in float of layers that are taken as float weights", unrounded))
    graph.notes += [_sentence(text, modules) for text, modules in checkpoint.notes.items()]
    graph.lost += [_sentence(text, modules) for text, modules in checkpoint.lost.items()]


def _place_tables(graph: Graph, checkpoint: Checkpoint) -> Iterator[str]:
    """Gives embedding tables the codes that the checkpoint has of them; their names in it."""
    for table in float_tables(graph):
        layer = checkpoint.versions.get(graph.weights.version(table.weight))
        spec = None if layer is None or layer.order is not None else layer.scheme.weight
        if layer is None or spec is None or spec.is_fp4 or spec.granularity not in ("per_channel", "per_group"):
            continue
        graph.weights.alias(f"{table.weight}_codes", f"{layer.weight}_codes", checkpoint.parts)
        shape = (table.rows, -(-table.columns // spec.group_of(table.columns)))
        for part in PARTS[1 : 2 if spec.symmetric else 3]:
            name = f"{layer.weight}_{part}"
            graph.weights.derive(
                f"{table.weight}_{part}",
                (name,),
                lambda tensor, shape=shape: tensor.reshape(shape),
                dtype=checkpoint.parts.info(name).dtype,
                shape=shape,
                store=checkpoint.parts,
            )
        quantize_table(graph, table, spec)
        yield layer.weight


def _sentence(text: str, modules: list[str]) -> str:
    if not modules:
        return text
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return f"{text}: {', '.join(modules[:_SHOWN])}{more}"


def _select_columns(graph: Graph, readers: list[tuple[Site, fx.Node]], order: Tensor) -> None:
    """Puts the columns of a value in the order of the codes, ahead of layers whose codes have it."""
    name, nodes = f"{readers[0][0].name}.input_order", _in_order(graph, readers)
    graph.weights.set(name, order)
    value = nodes[0].args[0]
    assert isinstance(value, fx.Node)
    with graph.fx.inserting_before(nodes[0]):
        stored = graph.stored_node(name)
    graph.insert(_select, value, nodes, -1, stored)


def _multiply_inputs(graph: Graph, found: list[tuple[Site, Layer]]) -> None:
    """Multiplies values by vectors, once for all layers that read one value with the same vector."""
    groups: _Readers = {}
    for site, layer in found:
        if layer.input_multiplier is not None:
            for node in site.nodes:
                groups.setdefault((node.args[0], tuple(layer.input_multiplier.tolist())), []).append((site, node))
    for (_, numbers), readers in groups.items():
        nodes = _in_order(graph, readers)
        value, name = nodes[0].args[0], f"{readers[0][0].name}.input_multiplier"
        assert isinstance(value, fx.Node)
        assert isinstance(numbers, tuple)
        graph.insert(_mul, value, nodes, tensors={name: torch.tensor(numbers)})


def _round_inputs(graph: Graph, found: list[tuple[Site, Layer]]) -> None:
    """Rounds inputs, once for all layers that round one value with the same scale."""
    groups: _Readers = {}
    layers = {}
    for site, layer in found:
        spec = layer.scheme.activation
        if spec is None:
            continue
        numbers = tuple(None if t is None else t.item() for t in (layer.input_scale, layer.input_zero_point))
        for node in site.nodes:
            groups.setdefault((node.args[0], spec, *numbers), []).append((site, node))
        layers[site.name] = layer
    for readers in groups.values():
        first = readers[0][0].name
        _round_input(graph, layers[first], first, _in_order(graph, readers))


def _round_input(graph: Graph, layer: Layer, site: str, nodes: list[fx.Node]) -> None:
    spec: QuantSpec | None = layer.scheme.activation
    value, names = nodes[0].args[0], list[str | None]()
    assert spec is not None
    assert isinstance(value, fx.Node)
    for part, number in (("scale", layer.input_scale), ("zero_point", layer.input_zero_point)):
        names.append(None if number is None else f"{site}.input_{part}")
        if number is not None:
            graph.weights.set(f"{site}.input_{part}", number)
    graph.quantize_input(value, nodes, spec, *names)


def _in_order(graph: Graph, readers: list[tuple[Site, fx.Node]]) -> list[fx.Node]:
    place = {node: index for index, node in enumerate(graph.fx.nodes)}
    return sorted((node for _, node in readers), key=place.__getitem__)
