"""The folder: names, files, what happens when something goes wrong, and memory."""

import errno
import json
import os
import subprocess
import sys

import onnx
import pytest
import torch

import qcompiler.lowering.onnx as target
from qcompiler.errors import InputError, MissingDependencyError, ResourceError, TargetError, VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port, Signature
from qcompiler.lowering.onnx import OnnxTarget, lower
from tests.lowering.onnx.harness import GraphMaker, open_session

aten = torch.ops.aten

CONFIG = {
    "model_type": "llama",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 64,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 300,
}


def decoder(config=None) -> Graph:
    """Something with the ports of a decoder."""
    maker = GraphMaker()
    ids = maker.input(torch.zeros(7, 5, dtype=torch.int64), "input_ids", role="ids")
    maker.input(torch.ones(7, 18, dtype=torch.int64), "attention_mask", role="mask")
    past = [
        maker.input(torch.zeros(7, 2, 13, 4), f"past_key_values.0.{part}", role="past", layer=0, part=part)
        for part in ("key", "value")
    ]
    hidden = maker.call(aten.embedding.default, maker.weight("embed.weight", torch.randn(300, 8)), ids)
    heads = maker.call(aten.view.default, hidden, [maker.size(ids, 0), maker.size(ids, 1), 2, 4])
    new = maker.call(aten.transpose.int, heads, 1, 2)
    present = [maker.call(torch.ops.qcompiler.kv_append.default, cache, new) for cache in past]
    logits = maker.call(torch.ops.qcompiler.linear.default, hidden, maker.weight("head.weight", torch.randn(300, 8)))
    graph = maker.graph(
        logits,
        *present,
        names=("logits", "present.0.key", "present.0.value"),
        roles=("logits", "present", "present"),
    )
    graph.provenance.update(config=config, parameters=4800)
    return graph


def load(path) -> onnx.ModelProto:
    return onnx.load(path / "model.onnx", load_external_data=False)


def test_ports_keep_their_names_types_and_symbolic_sizes(tmp_path):
    lower(decoder(), tmp_path / "out")
    graph = load(tmp_path / "out").graph

    def ports(values):
        return {
            v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        }

    total = "past_sequence + sequence"
    assert ports(graph.input) == {
        "input_ids": (onnx.TensorProto.INT64, ["batch", "sequence"]),
        "attention_mask": (onnx.TensorProto.INT64, ["batch", total]),
        "past_key_values.0.key": (onnx.TensorProto.FLOAT, ["batch", 2, "past_sequence", 4]),
        "past_key_values.0.value": (onnx.TensorProto.FLOAT, ["batch", 2, "past_sequence", 4]),
    }
    assert ports(graph.output) == {
        "logits": (onnx.TensorProto.FLOAT, ["batch", "sequence", 300]),
        "present.0.key": (onnx.TensorProto.FLOAT, ["batch", 2, total, 4]),
        "present.0.value": (onnx.TensorProto.FLOAT, ["batch", 2, total, 4]),
    }
    assert "head/MatMul" in {node.name for node in graph.node}


def test_float16_caches_are_float16_and_logits_float32(tmp_path, run_onnx):
    graph = decoder()
    lower(graph, tmp_path / "out", float_dtype="float16")
    session = open_session(tmp_path / "out")
    assert {p.name: p.type for p in session.get_inputs()}["past_key_values.0.key"] == "tensor(float16)"
    assert {p.name: p.type for p in session.get_outputs()} == {
        "logits": "tensor(float)",
        "present.0.key": "tensor(float16)",
        "present.0.value": "tensor(float16)",
    }
    ids = torch.randint(0, 300, (2, 3))
    caches = [torch.randn(2, 2, 4, 4) for _ in range(2)]
    logits, key, _ = run_onnx(graph, ids, torch.ones(2, 7, dtype=torch.int64), *caches, session=session)
    embedded = graph.weights.read("embed.weight")[ids]
    torch.testing.assert_close(logits, embedded @ graph.weights.read("head.weight").T, rtol=1e-2, atol=1e-2)
    assert torch.equal(key[:, :, :4], caches[0].half())


@pytest.mark.parametrize(("opset", "ir_version"), [(21, 10), (22, 10), (23, 11), (24, 12), (25, 13)])
def test_versions(opset, ir_version, tmp_path):
    report = lower(decoder(), tmp_path / "out", opset=opset)
    model = load(tmp_path / "out")
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)
    assert len(model.opset_import) == 1
    assert (report["opset"], report["ir_version"]) == (opset, ir_version)


@pytest.mark.parametrize("options", [{"opset": 20}, {"opset": 26}, {"float_dtype": "bfloat16"}])
def test_options_that_cannot_be_written(options, tmp_path):
    with pytest.raises(TargetError):
        lower(decoder(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_equal_graphs_give_equal_bytes(tmp_path):
    graph = decoder()
    for name in ("a", "b"):
        lower(graph, tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        if (tmp_path / "a" / file).exists():
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_input_or_a_value_may_be_an_output_several_times(maker, run_onnx, tmp_path):
    x = maker.input(torch.zeros(7, 5))
    y = maker.call(aten.neg.default, x)
    graph, value = maker.graph(x, y, y, x), torch.randn(2, 3)
    lower(graph, tmp_path / "out")
    session = open_session(tmp_path / "out")
    assert [port.name for port in session.get_outputs()] == [f"output_{i}" for i in range(4)]
    results = run_onnx(graph, value, session=session)
    assert [torch.equal(r, sign * value) for r, sign in zip(results, (1, -1, -1, 1), strict=True)] == [True] * 4


def test_a_port_named_like_a_value_keeps_its_name(maker, run_onnx):
    x = maker.input(torch.zeros(7, 5), "neg_default/Neg_output_0")
    graph = maker.graph(maker.call(aten.abs.default, maker.call(aten.neg.default, x)))
    assert torch.equal(run_onnx(graph, torch.full((2, 3), 2.0))[0], torch.full((2, 3), 2.0))


# --- the files beside the model ---------------------------------------------------------------------------------------


def test_companions_and_generation_config(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    files = {"config.json": CONFIG, "tokenizer.json": {"t": 1}, "generation_config.json": {"eos_token_id": [1, 3]}}
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    (source / "model.safetensors").write_bytes(b"not copied")
    report = lower(decoder(CONFIG), tmp_path / "out", companions=source)
    assert report["files"] == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert set(report["files"]) >= {"config.json", "tokenizer.json", "generation_config.json", "genai_config.json"}
    assert "model.safetensors" not in report["files"]
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert settings["model"] == {
        "type": "llama",
        "vocab_size": 300,
        "context_length": 64,
        "bos_token_id": 0,
        "eos_token_id": [1, 3],
        "pad_token_id": 1,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 4,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    assert settings["search"]["max_length"] == 64


@pytest.mark.parametrize(
    "fact", ["model_type", "eos_token_id", "bos_token_id", "max_position_embeddings", "hidden_size"]
)
def test_generation_config_states_no_guesses(fact, tmp_path):
    report = lower(decoder({k: v for k, v in CONFIG.items() if k != fact}), tmp_path / "out")
    assert "genai_config.json" not in report["files"]
    wanted = {"model_type": "type", "max_position_embeddings": "context_length"}.get(fact, fact)
    assert report["notes"] == [f"no genai_config.json: unknown {wanted}"]


def test_a_model_that_is_no_decoder_has_no_generation_config(maker, tmp_path):
    report = lower(maker.graph(maker.call(aten.neg.default, maker.input(torch.zeros(7, 5)))), tmp_path / "out")
    assert report["files"] == ["model.onnx", "model.onnx.data"]
    assert report["notes"] == []


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_output_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        lower(decoder(), tmp_path / "out")
    assert (tmp_path / "out" / "keep").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_directory_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    lower(decoder(), tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_output_where_nothing_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        lower(decoder(), tmp_path / "file" / "out")


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["interrupt", "disk full"]
)
def test_nothing_is_left_when_writing_fails(failure, tmp_path, monkeypatch):
    graph = decoder()

    def fail(*_):
        raise failure

    if isinstance(failure, OSError):
        monkeypatch.setattr(os, "write", fail)
    else:
        graph.weights.derive("embed.weight", ("embed.weight",), fail, dtype="float32", shape=(300, 8))
    with pytest.raises(ResourceError if isinstance(failure, OSError) else KeyboardInterrupt):
        lower(graph, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_the_checker_refuses_does_not_appear(maker, tmp_path):
    x = maker.input(torch.zeros(7, 5))
    node = maker.call(aten.neg.default, x)
    graph = maker.graph(node)
    graph.signature = Signature(graph.signature.inputs, (Port("y", "other", "float32", ("batch", 5, 6)),))
    with pytest.raises(VerificationError, match="checker"):
        lower(graph, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_found_without_weights(maker):
    def never(*_):
        raise AssertionError("read")

    graph = decoder()
    for name in graph.weight_names():
        graph.weights.derive(name, (name,), never, dtype="float32", shape=(300, 8))
    OnnxTarget().check_graph(graph)
    x = maker.input(torch.ones(7, 5))
    first = maker.call(torch.ops.aten.lgamma.default, x)
    graph = maker.graph(maker.call(torch.ops.aten.erfinv.default, first))
    with pytest.raises(TargetError, match="these operators have no ONNX form") as caught:
        OnnxTarget().check_graph(graph)
    assert caught.value.got == "aten.lgamma.default, aten.erfinv.default"


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [(aten.lgamma.default, (), "no ONNX form"), (aten.to.dtype, (torch.complex64,), "no ONNX dtype")],
)
def test_a_refusal_names_the_place_in_the_model(operator, arguments, message):
    graph = decoder()
    (logits, *_) = graph.outputs
    with graph.fx.inserting_after(logits):
        unknown = graph.fx.call_function(operator, (logits, *arguments))
    unknown.meta.update(logits.meta, **({"dtype": arguments[0]} if arguments else {}))
    logits.replace_all_uses_with(unknown, delete_user_cb=lambda user: user is not unknown)
    with pytest.raises(TargetError, match=message) as caught:
        OnnxTarget().check_graph(graph)
    assert str(caught.value.where) == f"{unknown.name}, near head.weight"


@pytest.mark.parametrize("package", ["onnx", "onnx_ir"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{target.__name__}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match="ONNX needs packages") as caught:
        lower(decoder(), tmp_path / "out")
    assert package in str(caught.value.got)


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, torch
from torch import fx
from qcompiler.ir.graph import Graph
from qcompiler.lowering.onnx import OnnxTarget, lower
from qcompiler.ir.signature import Port, Signature
from qcompiler.storage.weights import WeightStore

SIZE = 1024

def chain(layers):
    store, graph = WeightStore(), fx.Graph()
    store.set("seed", torch.zeros(1))
    node = graph.placeholder("x")
    node.meta.update(dtype=torch.float32, shape=("batch", SIZE))
    for i in range(layers):
        store.derive(f"{i}.weight", ("seed",), lambda s: torch.ones(SIZE, SIZE), dtype="float32", shape=(SIZE, SIZE))
        weight = graph.create_node("get_attr", f"{i}.weight")
        weight.meta.update(dtype=torch.float32, shape=(SIZE, SIZE))
        node = graph.call_function(torch.ops.qcompiler.linear.default, (node, weight))
        node.meta.update(dtype=torch.float32, shape=("batch", SIZE))
    graph.output((node,))
    x, y = (Port(name, "other", "float32", ("batch", SIZE)) for name in "xy")
    return Graph(graph, Signature((x,), (y,)), store)

for layers in (2, 24):
    lower(chain(layers), f"{sys.argv[1]}/{layers}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    two, many = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert (tmp_path / "24" / "model.onnx.data").stat().st_size == 24 * 4 << 20
    assert (many - two) / 1024 < 16  # MiB, of 96 written


@pytest.mark.parametrize("end", [1, [1, 3]])
def test_generation_config_of_a_nested_configuration(end, tmp_path):
    nested = {
        "model_type": "llama",
        "text_config": {**CONFIG, "eos_token_id": end},
        "vision_config": {"hidden_size": 3},
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text('{"eos_token_id": null}')
    lower(decoder(nested), tmp_path / "out", companions=source)
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert (settings["eos_token_id"], settings["pad_token_id"], settings["context_length"]) == (end, 1, 64)
    assert settings["decoder"]["hidden_size"] == 8
    metadata = {entry.key: entry.value for entry in load(tmp_path / "out").metadata_props}
    assert metadata["qcompiler.max_positions"] == "64"


@pytest.mark.parametrize("broken", ["{", "[]"])
def test_a_broken_generation_config(broken, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text(broken)
    with pytest.raises(InputError, match="not a JSON object"):
        lower(decoder(), tmp_path / "out", companions=source)
    assert not (tmp_path / "out").exists()
