"""Views of a graph, quantized weights in it, and its JSON form, which holds no code."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from qcompiler import numerics
from qcompiler.errors import ArtifactError, PipelineError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import Graph, activation_rounding, is_op, quantized_value
from qcompiler.ir.qtensor import Affine
from qcompiler.ir.walks import ancestors
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.models import FAMILIES, VOCABULARY, canonical_graph, copy_graph, language_inputs, operators, run

canonical = torch.ops.qcompiler


def quantized(weight, spec):
    scale, zero_point = numerics.min_max_qparams(weight.float(), spec, torch.float16)
    return Affine(numerics.quantize(weight.float(), scale, zero_point, spec), scale, zero_point, spec, torch.float16)


def stored(graph):
    """The JSON form, as it comes back from a file."""
    return json.loads(json.dumps(graph.to_dict(), allow_nan=False))


def rebuilt(fields, graph):
    return Graph.from_dict(fields, graph.weights, {})


# --- views ------------------------------------------------------------------------------------------------------------


def test_sites():
    graph = canonical_graph("llama")
    site = next(site for site in graph.sites() if site.name.endswith("layers.1.self_attn.k_proj"))
    assert (site.weight, site.out_features, site.in_features) == (f"{site.name}.weight", 16, 32)
    assert site.bias is None
    (x,) = site.inputs
    assert is_op(x, canonical.rms_norm.default)
    assert set(graph.weight_names()) >= {site.weight, "model.embed_tokens.weight", "model.norm.weight"}


def test_ancestors():
    graph = canonical_graph("llama")
    found = ancestors([graph.outputs[0]])
    assert set(graph.inputs) <= found
    assert graph.outputs[0] in found
    assert ancestors([graph.inputs[0]]) == {graph.inputs[0]}


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4", group_size=16),
        QuantSpec("int4", group_size=12),
        QuantSpec("int3", group_size=16, symmetric=False),
        QuantSpec("int8", "per_channel", None),
        QuantSpec("int8", "per_channel", None, symmetric=False),
        QuantSpec("int8", "per_tensor", None),
        QuantSpec("float8_e4m3fn", "per_channel", None),
        QuantSpec("float8_e5m2", group_size=12),
    ],
    ids=str,
)
def test_a_quantized_weight(spec):
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    graph = canonicalize(capture_module(model, (torch.randn(3, 32),)))
    site, other = graph.sites()
    weight = quantized(graph.weights.read(site.weight), spec)
    graph.set_weight(site, weight)
    assert site.weight not in graph.weights
    assert [s.name for s in graph.sites()] == [site.name, other.name]
    assert graph.weights.info(f"{site.weight}_codes").dtype == ("" if spec.symmetric else "u") + spec.dtype
    assert (f"{site.weight}_zero_point" in graph.weights) is not spec.symmetric
    with torch.no_grad():
        model[0].weight.copy_(weight.dequantize())
        x = torch.randn(5, 32)
        torch.testing.assert_close(run(graph, input_0=x)["output_0"], model(x))
    graph.fx.lint()
    with pytest.raises(PipelineError, match="quantized already"):
        graph.set_weight(graph.sites()[0], weight)
    with pytest.raises(PipelineError, match="wrong shape"):
        graph.set_weight(other, weight)


def test_quantizing_one_use_of_a_tied_weight_leaves_the_other():
    graph = copy_graph(canonical_graph("gpt2"))
    (head,) = [site for site in graph.sites() if site.name == "lm_head"]
    table = graph.weights.read("transformer.wte.weight")
    graph.set_weight(head, quantized(graph.weights.read(head.weight), QuantSpec("int4", group_size=16)))
    torch.testing.assert_close(graph.weights.read("transformer.wte.weight"), table, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-dynamic", "w8a8-dyntensor", "w4a4-clip90", "w4a4-actasym", "fp8"])
def test_a_quantized_input(name):
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    graph = canonicalize(capture_module(model, (torch.randn(3, 32),)))
    spec = Scheme.parse(name).activation
    last = graph.sites()[1]
    (value,) = last.inputs
    scale, zero = torch.tensor(0.02), None if spec.symmetric else torch.tensor(0, dtype=torch.uint8)
    if not spec.dynamic:
        graph.weights.set("scale", scale)
        graph.weights.set("zero", torch.tensor(0, dtype=torch.uint8))
    result = graph.quantize_input(
        value, last.nodes, spec, None if spec.dynamic else "scale", None if spec.dynamic or spec.symmetric else "zero"
    )
    graph.fx.lint()
    assert quantized_value(result) is value
    assert quantized_value(result.args[0]) is quantized_value(value) is quantized_value(7) is None
    assert activation_rounding(graph.fx.nodes) == {result, result.args[0]}
    assert graph.sites()[1].inputs == (result,)
    assert result.meta == {"dtype": torch.float32, "shape": value.meta["shape"]}
    assert result.args[0].meta == {"dtype": spec.code_dtype, "shape": value.meta["shape"]}
    along = -1 if spec.granularity == "per_token" else None
    with torch.no_grad():
        x = torch.randn(5, 32)
        hidden = model[1](model[0](x))
        if spec.dynamic:
            scale, chosen = canonical.choose_qparams(hidden, spec.code_dtype, along, spec.bits, spec.clip)
            zero = None if spec.symmetric else chosen
            assert result.args[1].meta["shape"] == ((*value.meta["shape"][:-1], 1) if along else ())
        place = (0, 0) if along is None else (-1, 6)
        codes = canonical.quantize(hidden, scale, zero, *place, spec.code_dtype, spec.bits)
        expected = model[2](canonical.dequantize(codes, scale, zero, *place, torch.float32))
        torch.testing.assert_close(run(graph, input_0=x)["output_0"], expected)
        assert (expected - model(x)).abs().max() > 1e-4
    again = rebuilt(stored(graph), graph)
    assert torch.equal(run(again, input_0=x)["output_0"], run(graph, input_0=x)["output_0"])
    with pytest.raises(PipelineError, match="quantized already"):
        graph.quantize_input(value, last.nodes, spec, "scale", None)


# --- JSON -------------------------------------------------------------------------------------------------------------


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


# --- float weights rewritten ------------------------------------------------------------------------------------------


def half_model():
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)).eval().bfloat16()
    return canonicalize(capture_module(model, (torch.randn(3, 8).bfloat16(),)))


def test_a_rewritten_tensor_is_float32_and_knows_its_source():
    graph = half_model()
    value = torch.randn(4, 8)
    assert graph.source_dtype("1.weight") == "bfloat16"
    graph.rewrite_float("1.weight", value)
    assert torch.equal(graph.weights.read("1.weight"), value)
    assert graph.weights.info("1.weight").dtype == "float32"
    graph.rewrite_float("1.weight", value.double() * 2)
    assert torch.equal(graph.weights.read("1.weight"), value * 2)
    assert graph.weights.info("1.weight").dtype == "float32"
    assert graph.source_dtype("1.weight") == "bfloat16"
    assert graph.source_dtype("0.weight") == "bfloat16"


@pytest.mark.parametrize("shape", [(8, 4), (4, 8, 1), (32,)])
def test_a_rewritten_tensor_keeps_its_shape(shape):
    graph = half_model()
    with pytest.raises(PipelineError, match=r"wrong shape\n  where: 1.weight"):
        graph.rewrite_float("1.weight", torch.ones(shape))
    assert graph.weights.info("1.weight").dtype == "bfloat16"
    assert not graph.source_dtypes


def test_matrices_are_rounded_in_the_end_and_vectors_are_not():
    graph = half_model()
    values = {name: torch.randn(shape) for name, shape in {"0.weight": (8,), "1.weight": (4, 8)}.items()}
    for name, value in values.items():
        graph.rewrite_float(name, value)
    untouched = graph.weights.version("1.bias")
    graph.round_rewritten()
    assert torch.equal(graph.weights.read("1.weight"), values["1.weight"].bfloat16())
    assert graph.weights.info("1.weight").dtype == "bfloat16"
    assert torch.equal(graph.weights.read("0.weight"), values["0.weight"])
    assert graph.weights.version("1.bias") is untouched
    version = graph.weights.version("1.weight")
    graph.round_rewritten()
    assert graph.weights.version("1.weight") is version


def test_what_a_pass_stores_by_itself_gets_the_dtype_of_the_model():
    graph = half_model()
    usual = graph.remember_dtypes()
    assert usual == "bfloat16"
    site = graph.sites()[0]
    graph.weights.set(site.weight, torch.randn(4, 8))
    assert graph.source_dtype(site.weight) == "bfloat16"  # and so are scales that are chosen now
    added = {"matrix": torch.randn(8, 8), "vector": torch.randn(8), "integers": torch.zeros(2, 2, dtype=torch.int8)}
    for name, value in added.items():
        graph.weights.set(name, value)
        with graph.fx.inserting_before(site.nodes[0]):
            graph.fx.create_node("get_attr", name)
    graph.round_rewritten(usual)
    dtypes = {name: graph.weights.info(name).dtype for name in (*added, site.weight)}
    assert dtypes == {"matrix": "bfloat16", "vector": "float32", "integers": "int8", "1.weight": "bfloat16"}
    assert torch.equal(graph.weights.read("matrix"), added["matrix"].bfloat16())


def test_scales_keep_the_dtype_that_was_chosen():
    graph = half_model()
    usual = graph.remember_dtypes()
    (site,) = graph.sites()
    weight = quantized(graph.weights.read(site.weight), QuantSpec("int4", group_size=4))
    graph.set_weight(site, replace(weight, scale_dtype=torch.float32))
    graph.round_rewritten(usual)
    assert graph.weights.info("1.weight_scale").shape == (4, 2)
    assert graph.weights.info("1.weight_scale").dtype == "float32"


def test_a_copy_is_changed_alone():
    graph = half_model()
    graph.notes.append("note")
    copied = graph.copy()
    x = torch.randn(3, 8)
    before = run(graph, input_0=x)["output_0"]
    assert torch.equal(run(copied, input_0=x)["output_0"], before)
    (site,) = copied.sites()
    copied.set_weight(site, quantized(copied.weights.read(site.weight), QuantSpec("int4", group_size=4)))
    copied.schemes["1"] = Scheme.parse("w4a16")
    for report in (copied.notes, copied.lost, copied.unrecognized):
        report.clear()
    copied.provenance["source"] = "another"
    assert torch.equal(run(graph, input_0=x)["output_0"], before)
    assert (graph.schemes, graph.notes) == ({}, ["note"])
    assert graph.provenance["source"] == "Sequential"
    assert [node.name for node in graph.fx.nodes if is_op(node, canonical.dequantize.default)] == []


def test_float32_models_are_not_rounded():
    graph = canonicalize(capture_module(nn.Linear(8, 4).eval(), (torch.randn(3, 8),)))
    graph.rewrite_float("weight", torch.ones(4, 8) / 3)
    version = graph.weights.version("weight")
    graph.round_rewritten()
    assert graph.weights.version("weight") is version
