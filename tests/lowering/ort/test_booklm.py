"""The model that is shipped: ONNX Runtime and onnxruntime-genai give the greedy tokens of the native artifact."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts.generation import Sampler, decode_stepwise
from qcompiler.artifacts.tokenizing import encode_prompt
from qcompiler.ir import Graph
from qcompiler.lowering.ort.reader import OrtArtifact
from qcompiler.protocol import Artifact

STEPS = 64
PROMPT = "The captain looked out over the sea, and said that the night was"


@pytest.fixture(scope="module")
def captured(booklm: Path) -> Graph:
    return qc.capture(booklm)


def greedy(artifact: Artifact, ids: Tensor) -> list[int]:
    return [int(token[0]) for token in decode_stepwise(artifact, ids[None], STEPS, Sampler(), 0)]


def greedy_in_genai(directory: Path, ids: Tensor) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + STEPS, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids.numpy().astype(np.int32))
    found: list[int] = []
    while not generator.is_done() and len(found) < STEPS:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def shares_bytes_with_the_head(path: Path) -> bool:
    model = onnx.load(path, load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    (table,) = (node.input[0] for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node.input[1] for node in reversed(model.graph.node) if node.op_type == "MatMulNBits")
    return table != head and places[table] == places[head]


@pytest.mark.parametrize(
    "name",
    [
        "w4a16-rtn+kv-int8-static+emb-int4",
        pytest.param("w4a16-rtn", marks=pytest.mark.slow),
        pytest.param("w8a16", marks=pytest.mark.slow),
        pytest.param("kv-int8-static", marks=pytest.mark.slow),
        pytest.param("kv-int4-static", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_in_both_runtimes(name: str, captured: Graph, booklm: Path, tmp_path: Path) -> None:
    text = (booklm.parent / "text" / "calibration.txt").read_text(encoding="utf-8")
    result = qc.compile(captured, name, qc.Calibration.from_text(text, samples=4, length=64), device="cpu")
    report = qc.lower(result, "ort", tmp_path / "out", accuracy_level=0, verify=False)
    assert report["operators"]["GroupQueryAttention"] == 8
    assert report["shared_caches"]
    if "emb-int4" in name:
        assert shares_bytes_with_the_head(tmp_path / "out" / "model.onnx")
    ids = encode_prompt(qc.artifacts.load_tokenizer(booklm), PROMPT)
    wanted = greedy(result.artifact(), ids)
    assert greedy(OrtArtifact(tmp_path / "out"), ids) == wanted
    assert greedy_in_genai(tmp_path / "out", ids) == wanted
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["search"]["past_present_share_buffer"]
    assert "position_ids" not in settings["model"]["decoder"]["inputs"]  # rows of tables are taken by place


def test_generate_by_the_command_line_opens_it(captured: Graph, booklm: Path, tmp_path: Path) -> None:
    result = qc.compile(captured, "w4a16-rtn", device="cpu")
    qc.lower(result, "ort", tmp_path / "out", verify=False)
    opened = qc.api.open_artifact(tmp_path / "out", exact=False)
    assert isinstance(opened, OrtArtifact)
    made = qc.generate(tmp_path / "out", PROMPT, max_new_tokens=4)
    assert len(made.tokens) == 4
    assert torch.isfinite(opened.forward(torch.tensor([[5, 6]]))).all()
