"""What comes in by name leaves by name, so that a quantized model drops into the place of the original."""

import onnx
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import NativeArtifact
from qcompiler.frontend.onnx import capture_onnx
from qcompiler.lowering.onnx import OnnxArtifact, lower
from qcompiler.lowering.onnx.folder import generation_config
from tests.frontend.onnx.exported import exported
from tests.models import model_of

NAMES = {"input_ids": "tokens", "attention_mask": "visible", "position_ids": "places", "logits": "scores"}


def renamed(name):
    if name.startswith(("past_key_values.", "present.")):
        when, layer, part = name.rsplit(".", 2)
        return f"{'old' if when.startswith('past') else 'new'}_{part[0]}_{layer}"
    return NAMES.get(name, name)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """The original file under names of its own, what was compiled of it, and the folder that was written."""
    folder = tmp_path_factory.mktemp("names")
    model = onnx.load(exported("llama"))
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
    for port in (*model.graph.input, *model.graph.output):
        port.name = renamed(port.name)
    model.metadata_props.add(key="licence", value="free")
    model.opset_import[0].version = 23
    onnx.save_model(model, folder / "model.onnx")
    graph = capture_onnx(folder / "model.onnx")
    compiled = qc.compile(graph, "w4a16-rtn").graph
    lower(compiled, folder / "out")
    return graph, compiled, folder / "out"


def test_ports_keep_their_names_and_roles(lowered):
    graph, _, _ = lowered
    roles = {port.name: (port.role, port.layer, port.part) for port in graph.signature.inputs}
    assert roles["tokens"][0] == "ids"
    assert roles["visible"][0] == "mask"
    assert roles["places"][0] == "positions"
    assert roles["old_k_1"] == ("past", 1, "key")
    assert roles["old_v_0"] == ("past", 0, "value")


def test_what_is_written_has_them_too(lowered):
    graph, _, out = lowered
    model = onnx.load(out / "model.onnx", load_external_data=False)
    assert [port.name for port in model.graph.input] == [port.name for port in graph.signature.inputs]
    assert [port.name for port in model.graph.output] == [port.name for port in graph.signature.outputs]
    assert model.opset_import[0].version == 23
    assert {entry.key: entry.value for entry in model.metadata_props}["licence"] == "free"


def test_it_runs_with_its_cache(lowered):
    _, compiled, out = lowered
    ours, native = OnnxArtifact(out), NativeArtifact(compiled)
    ids = torch.randint(0, 50, (2, 7))
    whole = native.forward(ids)
    torch.testing.assert_close(ours.forward(ids), whole, rtol=1e-3, atol=1e-4)
    _, cache = ours.prefill(ids[:, :5])
    last, _ = ours.step(ids[:, 5:], cache)
    torch.testing.assert_close(last, whole[:, 5:], rtol=1e-3, atol=1e-4)


def test_no_target_tells_genai_of_ports_that_it_does_not_know(lowered):
    _, compiled, _ = lowered
    config = {**model_of("llama").config.to_dict(), "bos_token_id": 0, "eos_token_id": 1}
    before = compiled.provenance.get("config")
    compiled.provenance["config"] = config
    try:
        settings, missing = generation_config(compiled, {}, shares_buffer=True)
    finally:
        compiled.provenance["config"] = before
    assert (settings, missing) == (None, ["how ports of other names are passed on"])
