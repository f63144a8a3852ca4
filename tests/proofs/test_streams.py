"""Residual streams that may be rotated, proved on several families, and who stands in the way; inputs at run time."""

import pytest
import torch

from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port
from qcompiler.proofs.streams import find_streams, online_inputs
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import Maker, residual_mlp

aten, canonical = torch.ops.aten, torch.ops.qcompiler
SHAPE = ("batch", "sequence", 8)


@pytest.mark.parametrize(
    ("family", "writers", "readers", "norms", "is_centered"),
    [
        ("llama", 5, 11, 5, False),
        ("qwen2", 5, 11, 5, False),
        ("granite", 5, 11, 5, False),  # embeddings and branches are multiplied by numbers
        ("gpt2", 6, 5, 5, True),  # learned positions write, too
        ("gpt_neox", 5, 5, 5, True),  # attention and feed-forward side by side
        ("mixtral", 11, 17, 5, False),  # 4 experts in each of 2 layers, and routers
    ],
)
def test_streams(family, writers, readers, norms, is_centered):
    graph = canonical_graph(family)
    (stream,), refused = find_streams(graph)
    assert not refused
    found = (len(stream.writers), len(stream.readers), len(stream.norms), stream.is_centered)
    assert found == (writers, readers, norms, is_centered)
    assert stream.width == 32
    output = graph.sites()[-1].name
    assert output in {reader.site.name for reader in stream.readers}
    assert all(reader.norm in stream.norms for reader in stream.readers)
    tables = [writer for writer in stream.writers if writer.is_table]
    assert tables[0].name == stream.name


@pytest.mark.parametrize(
    ("family", "where", "reason"),
    [
        ("gemma3", "model.layers.0.post_attention_layernorm.weight.add", "its weight scales channels apart"),
        ("olmo2", "model.layers.0.post_attention_layernorm", "its weight scales channels apart"),
        ("bloom", "transformer.h.0.input_layernorm", "another norm with a weight"),
    ],
)
def test_norms_with_weights_that_write_to_a_stream(family, where, reason):
    found, (refused,) = find_streams(canonical_graph(family))
    assert not found
    assert refused.where == where
    assert reason in refused.reason


def test_a_norm_that_writes_with_one_number_for_all_channels():
    graph = copy_graph(canonical_graph("olmo2"))
    for name in graph.weight_names():
        if "post_" in name:
            graph.weights.set(name, torch.full((32,), 0.7))
    (stream,), refused = find_streams(graph)
    assert not refused
    assert all(reader.norm is None or "post_" not in str(reader.norm.args[1]) for reader in stream.readers)
    graph.weights.set("model.layers.1.post_feedforward_layernorm.weight", torch.arange(32.0))
    found, (refusal,) = find_streams(graph)
    assert not found
    assert refusal.where == "model.layers.1.post_feedforward_layernorm"


class Stream:
    """``embedding → norm → up → relu → down → +``, with room for one more reader of the stream."""

    def __init__(self, norm: str = "rms") -> None:
        self.make = Maker()
        make = self.make
        ids = make.fx.placeholder("ids")
        ids.meta.update(dtype=torch.int64, shape=("batch", "sequence"))
        self.table = make.tensor("table.weight", 11, 8)
        self.start = self.described(make.call(aten.embedding.default, self.table, ids))
        self.norm = self.normed(self.start, norm)
        self.up = self.described(make.linear(self.norm, "up", 12, 8), 12)
        hidden = self.described(make.call(aten.relu.default, self.up), 12)
        self.down = self.described(make.linear(hidden, "down", 8, 12))
        self.end = self.described(make.call(aten.add.Tensor, self.start, self.down))

    def normed(self, x, kind, name="norm"):
        make = self.make
        if kind == "rms":
            return self.described(make.norm(x, name, 8))
        weight, bias = make.tensor(f"{name}.weight", 8), make.tensor(f"{name}.bias", 8)
        return self.described(make.call(canonical.layer_norm.default, x, weight, bias, 1e-6))

    @staticmethod
    def described(node, width=8):
        node.meta.update(dtype=torch.float32, shape=(*SHAPE[:-1], width))
        return node

    def graph(self, result=None) -> Graph:
        if result is None:
            result = self.described(self.make.linear(self.normed(self.end, "rms", "last"), "head", 5, 8), 5)
        port = Port("output", "other", "float32", result.meta["shape"])
        return self.make.graph([Port("ids", "ids", "int64", ("batch", "sequence"))], {port: result})


def test_the_hand_made_stream():
    (stream,), refused = find_streams(Stream().graph())
    assert not refused
    assert [writer.name for writer in stream.writers] == ["table.weight", "down"]
    assert [reader.site.name for reader in stream.readers] == ["up", "head"]


@pytest.mark.parametrize(
    ("reader", "where", "reason"),
    [
        (lambda s: s.described(s.make.call(aten.relu.default, s.end)), "relu_default_1", "aten.relu"),
        (lambda s: s.described(s.make.call(aten.mul.Tensor, s.end, s.make.tensor("scale", 8))), "mul_tensor", "mul"),
        (lambda s: s.described(s.make.call(aten.add.Tensor, s.end, 1.0)), "add_tensor_1", "a number is added"),
        (lambda s: s.described(s.make.call(aten.cat.default, [s.end, s.end], -1), 16), "cat_default", "its last axis"),
        (lambda s: s.described(s.make.call(aten.slice.Tensor, s.end, -1, 0, 8)), "slice_tensor", "aten.slice"),
        (lambda s: s.end, "add_tensor", "the graph returns it"),
    ],
)
def test_one_reader_that_does_not_commute_refuses_the_stream(reader, where, reason):
    stream = Stream()
    found, (refused,) = find_streams(stream.graph(reader(stream)))
    assert not found
    assert refused.where == where
    assert reason in refused.reason


def test_operators_on_other_axes_pass_a_rotation_on():
    stream = Stream()
    x = stream.described(stream.make.call(aten.mul.Tensor, stream.end, 0.5))
    x = stream.make.call(aten.transpose.int, x, 0, 1)
    x.meta.update(dtype=torch.float32, shape=("sequence", "batch", 8))
    x = stream.make.call(aten.reshape.default, x, [-1, 8])
    x.meta.update(dtype=torch.float32, shape=("batch*sequence", 8))
    head = stream.make.linear(x, "head", 5, 8)
    head.meta.update(dtype=torch.float32, shape=("batch*sequence", 5))
    (found,), refused = find_streams(stream.graph(head))
    assert not refused
    assert [(r.site.name, r.norm is None) for r in found.readers] == [("up", False), ("head", True)]


@pytest.mark.parametrize("first", ["rms", "layer"])
def test_the_mean_is_taken_out_only_where_nobody_sees_it(first):
    stream = Stream("layer")
    if first == "rms":  # another norm, which sees the mean
        head = stream.described(stream.make.linear(stream.normed(stream.end, "rms", "last"), "head", 5, 8), 5)
        where = "last"
    else:  # no norm at all
        head = stream.described(stream.make.linear(stream.end, "head", 5, 8), 5)
        where = "head"
    found, (refused,) = find_streams(stream.graph(head))
    assert not found
    assert refused.where == where
    assert "it sees the mean" in refused.reason


def test_shared_weights():
    stream = Stream()
    norm = stream.described(stream.make.call(canonical.rms_norm.default, stream.end, stream.norm.args[1], 1e-6))
    head = stream.described(stream.make.linear(norm, "head", 5, 8), 5)
    _, (refused,) = find_streams(stream.graph(head))
    assert (refused.where, refused.reason) == ("norm", "norm.weight is shared with another use")


def test_a_graph_without_a_stream():
    assert find_streams(residual_mlp()) == ([], [])


def test_inputs_that_no_weight_can_rotate():
    graph = canonical_graph("llama")
    found = online_inputs(graph, graph.sites())
    assert [[site.name for site in sites] for sites in found.values()] == [
        ["model.layers.0.mlp.down_proj"],
        ["model.layers.1.mlp.down_proj"],
    ]
    experts = online_inputs(canonical_graph("mixtral"), canonical_graph("mixtral").sites())
    assert all("down_proj" in site.name for sites in experts.values() for site in sites)
    assert len(experts) == 8
