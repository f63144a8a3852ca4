"""From transformers to ONNX by torch, and from there by AWQ and GPTQ to tokens of both of ONNX Runtime's runtimes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts.generation import Sampler, decode_stepwise
from qcompiler.protocol import Artifact
from tests.frontend.onnx.exported import export_model
from tests.tiny_checkpoint import command, save_checkpoint, write_text

STEPS = 24
SIDE_BY_SIDE = 2 * 4 + 1  # q, k and v; o; gate and up; down, of two layers; the head


def test_transformers_to_onnx_to_genai(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from transformers import AutoModelForCausalLM

    source, exported, out = save_checkpoint(tmp_path / "source"), tmp_path / "exported", tmp_path / "out"
    exported.mkdir()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    file = export_model(model, exported / "model.onnx")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, exported / name)
    text = write_text(tmp_path / "text.txt")
    sizes = ("--samples", 8, "--length", 32, "--set", "*=w4a16-g32", "--set", "*lm_head=w8a16")
    to = ("--to", "ort:accuracy_level=0", "-o", out, "--json")
    outcome = command("compile", file, "-r", "w4a16-awq-gptq", "--calib", text, *sizes, *to)
    assert outcome.status == 0, outcome.errors
    report = qc.load(out / "native").report.targets["ort"]
    assert report["operators"]["GroupQueryAttention"] == 2
    assert report["operators"]["MatMulNBits"] == SIDE_BY_SIDE

    ids = torch.randint(3, 4096, (9,), generator=torch.Generator().manual_seed(0))
    wanted = greedy(qc.load(out / "native").artifact(), ids)
    assert greedy(qc.open_artifact(out / "ort"), ids) == wanted
    settings = genai.GeneratorParams(loaded := genai.Model(str(out / "ort")))
    settings.set_search_options(max_length=len(ids) + STEPS, do_sample=False)
    generator = genai.Generator(loaded, settings)
    generator.append_tokens(ids.numpy().astype(np.int32))
    found: list[int] = []
    while not generator.is_done() and len(found) < STEPS:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == wanted[: len(found)]
    assert found


def greedy(artifact: Artifact, ids: Tensor) -> list[int]:
    return [int(token[0]) for token in decode_stepwise(artifact, ids[None], STEPS, Sampler(), 0)]
