"""The JSON form of a graph, which holds no code."""

import copy
import json

import pytest
import torch
from torch import nn

from qcompiler.errors import ArtifactError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.ir.graph.beginnings import quantized, rebuilt, stored
from tests.models import FAMILIES, VOCABULARY, canonical_graph, copy_graph, language_inputs, operators, run

canonical = torch.ops.qcompiler


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family):
    graph = copy_graph(canonical_graph(family))
    site = graph.sites()[1]
    graph.schemes = {site.name: Scheme(QuantSpec("int4", group_size=16))}
    graph.set_weight(site, quantized(graph.weights.read(site.weight), QuantSpec("int4", group_size=16)))
    fields = stored(graph)
    other = rebuilt(fields, graph)
    assert stored(other) == fields
    assert (other.schemes, other.signature) == (graph.schemes, graph.signature)
    assert [s.name for s in other.sites()] == [s.name for s in graph.sites()]
    ids = torch.randint(VOCABULARY, (2, 5))
    values = language_inputs(graph, ids, torch.ones_like(ids))
    torch.testing.assert_close(run(other, **values), run(graph, **values), rtol=0, atol=0)
    other.fx.lint()


def test_every_kind_of_argument():
    class Odd(nn.Module):
        def forward(self, x):
            y = torch.where(x > 0, x, float("-inf")).to(torch.bfloat16)
            y = torch.full_like(y, 3, memory_format=torch.preserve_format) + y[:, : x.shape[0] // 2].sum()
            return torch.split(y, [1, 2], 1)[1]

    graph = canonicalize(capture_module(Odd(), (torch.randn(6, 3),)))
    assert '{"float": "-inf"}' in json.dumps(graph.to_dict())
    other = rebuilt(stored(graph), graph)
    x = torch.randn(4, 3)
    torch.testing.assert_close(run(other, input_0=x), run(graph, input_0=x), rtol=0, atol=0)


def test_what_has_no_place_in_a_file():
    graph = copy_graph(canonical_graph("bert"))
    with graph.fx.inserting_before(graph.fx.output_node()):
        node = graph.fx.call_function(print, (graph.outputs[0],))
    with pytest.raises(ArtifactError, match="cannot be stored"):
        graph.to_dict()
    node.target = torch.ops.aten.relu_.default
    with pytest.raises(ArtifactError, match="cannot be stored"):
        graph.to_dict()
    node.target, node.args = torch.ops.aten.relu.default, (object(),)
    with pytest.raises(ArtifactError, match="cannot be stored"):
        graph.to_dict()


def first_call(fields):
    return next(item for item in fields["nodes"] if item["op"] == "call_function")


def change_call(**changes):
    return lambda fields: first_call(fields).update(changes)


def change_meta(fields):
    first_call(fields)["meta"]["dtype"] = {"dtype": "load"}


HOSTILE = {
    "os.system": change_call(target="os.system"),
    "builtins": change_call(target="builtins.eval"),
    "operator.attrgetter": change_call(target="operator.attrgetter"),
    "torch.load": change_call(target="torch.load"),
    "unknown operator": change_call(target="aten.nothing.default"),
    "packet without overload": change_call(target="aten.add"),
    "dunder": change_call(target="aten.__class__.__init__"),
    "reads files": change_call(target="aten.from_file.default"),
    "writes files": change_call(target="aten.save.default"),
    "writes in place": change_call(target="aten.add_.Tensor"),
    "other library": change_call(target="quantized.add.default"),
    "not a string": change_call(target=["aten.add.Tensor"]),
    "call_module": change_call(op="call_module"),
    "call_method": change_call(op="call_method"),
    "a function as argument": change_call(args=[{"dtype": "load"}]),
    "an object as argument": change_call(args=[{"pickle": "gASV"}]),
    "two tags": change_call(args=[{"dtype": "float32", "node": "x"}]),
    "unknown node": change_call(args=[{"node": "nowhere"}]),
    "a function as dtype": change_meta,
    "no kwargs": lambda fields: first_call(fields).pop("kwargs"),
    "no nodes": lambda fields: fields.pop("nodes"),
    "nodes are no list": lambda fields: fields.update(nodes=3),
    "node is no object": lambda fields: fields["nodes"].insert(0, "node"),
    "no output": lambda fields: fields["nodes"].pop(),
    "no signature": lambda fields: fields.pop("signature"),
    "other ports": lambda fields: fields["signature"]["inputs"].pop(),
    "port without name": lambda fields: fields["signature"]["inputs"][0].pop("name"),
    "scheme": lambda fields: fields["schemes"].update(x={"weight": {"dtype": "int4", "unheard": 1}}),
    "unknown tensor": lambda fields: next(i for i in fields["nodes"] if i["op"] == "get_attr").update(target="../x"),
}


@pytest.fixture(scope="module")
def fields():
    return stored(canonical_graph("bert"))


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_refused(fields, change):
    fields = copy.deepcopy(fields)
    change(fields)
    with pytest.raises(ArtifactError):
        rebuilt(fields, canonical_graph("bert"))


def test_the_file_names_operators_only(fields):
    targets = {item["target"] for item in fields["nodes"] if item["op"] == "call_function"}
    assert all(target.split(".")[0] in ("aten", "qcompiler", "operator") for target in targets)
    assert operators(canonical_graph("bert")).keys() <= {target.rsplit(".", 1)[0] for target in targets}
