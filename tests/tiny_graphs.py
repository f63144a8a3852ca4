"""Small graphs made by hand, in the form capture gives them, and an interpreter that is too simple to be wrong."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port, Signature
from qcompiler.storage.weights import WeightStore

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_PARTS: tuple[Literal["key", "value"], ...] = ("key", "value")


class Maker:
    """Adds nodes to a graph and random tensors to a store."""

    def __init__(self) -> None:
        self.fx = fx.Graph()
        self.weights = WeightStore()
        self._random = torch.Generator().manual_seed(7)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        if name not in self.weights:
            value = torch.randn(shape, generator=self._random) / shape[-1] ** 0.5
            self.weights.set(name, (value if len(shape) > 1 else 1 + 0.1 * value).to(dtype))
        node = self.fx.create_node("get_attr", name)
        node.meta.update(dtype=self.weights.read(name).dtype, shape=tuple(self.weights.info(name).shape))
        return node

    def linear(self, x: fx.Node, site: str, rows: int, columns: int, **options: Any) -> fx.Node:
        weight = self.tensor(f"{site}.weight", rows, columns, **options)
        node = self.call(_canonical.linear.default, x, weight, None)
        node.meta["weight_shape"] = (rows, columns)
        return node

    def norm(self, x: fx.Node, name: str, width: int) -> fx.Node:
        return self.call(_canonical.rms_norm.default, x, self.tensor(f"{name}.weight", width), 1e-6)

    def call(self, function: Any, *arguments: Any) -> fx.Node:
        return self.fx.call_function(function, arguments)

    def graph(self, inputs: list[Port], outputs: dict[Port, fx.Node]) -> Graph:
        self.fx.output(tuple(outputs.values()))
        names = self.weights.names()
        owned = [name for name in names if not any(names.index(t) < names.index(name) for t in self.weights.tied(name))]
        parameters = sum(self.weights.read(name).numel() for name in owned)
        signature = Signature(tuple(inputs), tuple(outputs))
        return Graph(self.fx, signature, self.weights, provenance={"source": "tiny", "parameters": parameters})


def other(name: str, *shape: int | str) -> Port:
    return Port(name, "other", "float32", shape)


def residual_mlp(blocks: int = 3, width: int = 8) -> Graph:
    """``x + down(relu(gate(n)) * up(n))`` with ``n = norm(x)``, one block after another; the first reads the input."""
    make = Maker()
    x = make.fx.placeholder("x")
    for i in range(blocks):
        normed = make.norm(x, f"{i}.norm", width)
        gate = make.call(_aten.relu.default, make.linear(normed, f"{i}.gate", 2 * width, width))
        up = make.linear(normed, f"{i}.up", 2 * width, width)
        down = make.linear(make.call(_aten.mul.Tensor, gate, up), f"{i}.down", width, 2 * width)
        x = make.call(_aten.add.Tensor, x, down)
    return make.graph([other("x", "batch", width)], {other("y", "batch", width): x})


def chain(sites: int = 3, width: int = 8) -> Graph:
    """Linear layers and nothing else: the first node of the graph is a site."""
    make = Maker()
    x = make.fx.placeholder("x")
    for i in range(sites):
        x = make.linear(x, f"{i}", width, width)
    return make.graph([other("x", "batch", width)], {other("y", "batch", width): x})


def language_model(
    layers: int = 2,
    width: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 32,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Graph:
    """A decoder with learned positions, a padding mask, grouped-query attention, a gated MLP and a cache."""
    make = Maker()
    head_size = width // heads
    ids, mask, positions = (make.fx.placeholder(name) for name in ("input_ids", "attention_mask", "position_ids"))
    past_shape = ("batch", kv_heads, "past_sequence", head_size)
    inputs = [
        Port("input_ids", "ids", "int64", ("batch", "sequence")),
        Port("attention_mask", "mask", "int64", ("batch", "past_sequence + sequence")),
        Port("position_ids", "positions", "int64", ("batch", "sequence")),
    ]
    caches: list[fx.Node] = []
    for layer in range(layers):
        for part in _PARTS:
            caches.append(make.fx.placeholder(f"past_{layer}_{part}"))
            inputs.append(Port(f"past_key_values.{layer}.{part}", "past", "float32", past_shape, layer, part))
    where = make.call(_aten.embedding.default, make.tensor("positions.weight", 64, width, dtype=dtype), positions)
    visible = make.call(_aten.to.dtype, mask, torch.bool)
    visible = make.call(_aten.unsqueeze.default, make.call(_aten.unsqueeze.default, visible, 1), 1)
    table = make.tensor("embedding.weight", vocab, width, dtype=dtype)
    x = make.call(_aten.add.Tensor, make.call(_aten.embedding.default, table, ids), where)
    present: dict[Port, fx.Node] = {}
    for layer in range(layers):
        normed = make.norm(x, f"{layer}.norm_1", width)
        parts = []
        for site, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            rows = make.linear(normed, f"{layer}.{site}", count * head_size, width, dtype=dtype)
            rows = make.call(_aten.unflatten.int, rows, -1, (count, head_size))
            parts.append(make.call(_aten.transpose.int, rows, 1, 2))
        for index, part in enumerate(_PARTS, 1):
            parts[index] = make.call(_canonical.kv_append.default, caches[2 * layer + index - 1], parts[index])
            shape = ("batch", kv_heads, "past_sequence + sequence", head_size)
            present[Port(f"present.{layer}.{part}", "present", "float32", shape, layer, part)] = parts[index]
        mixed = make.call(_canonical.attention.default, *parts, visible, head_size**-0.5, True)
        mixed = make.call(_aten.flatten.using_ints, make.call(_aten.transpose.int, mixed, 1, 2), 2, 3)
        x = make.call(_aten.add.Tensor, x, make.linear(mixed, f"{layer}.o", width, width, dtype=dtype))
        normed = make.norm(x, f"{layer}.norm_2", width)
        gate = make.call(_aten.silu.default, make.linear(normed, f"{layer}.gate", 2 * width, width, dtype=dtype))
        up = make.linear(normed, f"{layer}.up", 2 * width, width, dtype=dtype)
        down = make.linear(make.call(_aten.mul.Tensor, gate, up), f"{layer}.down", width, 2 * width, dtype=dtype)
        x = make.call(_aten.add.Tensor, x, down)
    if tied:
        make.weights.alias("head.weight", "embedding.weight")
    logits = make.linear(make.norm(x, "norm", width), "head", vocab, width, dtype=dtype)
    port = Port("logits", "logits", "float32", ("batch", "sequence", vocab))
    return make.graph(inputs, {port: logits, **present})


def token_batches(graph: Graph, sizes: tuple[int, ...] = (2, 2, 1), length: int = 6) -> list[Mapping[fx.Node, Tensor]]:
    """Inputs of a language model; always the same tokens, divided into batches of the given sizes."""
    from qcompiler.ir.feeding import feed

    vocab = int(graph.signature.outputs[0].shape[-1])
    ids = torch.randint(vocab, (sum(sizes), length), generator=torch.Generator().manual_seed(3))
    return [feed(graph, part) for part in ids.split(sizes)]


def input_batches(graph: Graph, count: int = 3, rows: int = 5) -> list[Mapping[fx.Node, Tensor]]:
    """Random inputs of a graph with one float input."""
    width = int(graph.signature.inputs[0].shape[-1])
    random = torch.Generator().manual_seed(3)
    return [{graph.inputs[0]: torch.randn(rows, width, generator=random)} for _ in range(count)]


def interpret(graph: Graph, batch: Mapping[fx.Node, Any]) -> dict[str, Any]:
    """The value of every node by name: the whole graph, node by node, weights in float32."""
    values: dict[fx.Node, Any] = {}
    for node in graph.fx.nodes:
        if node.op == "placeholder":
            values[node] = next(value for given, value in batch.items() if given.name == node.name)
        elif node.op == "get_attr":
            tensor = graph.weights.read(str(node.target))
            values[node] = tensor.float() if tensor.is_floating_point() else tensor
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            values[node] = node.target(*args)
    return {node.name: value for node, value in values.items()}
