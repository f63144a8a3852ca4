"""The model card: what it tells of a compilation, and which engines it names."""

from pathlib import Path

import pytest
import torch

import qcompiler as qc
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.layers import Layer
from qcompiler.lowering.checkpoint.serving import serving_commands
from qcompiler.numerics import Scheme
from qcompiler.passes import GPTQ, RTN
from tests.lowering.checkpoint.conftest import Write
from tests.models import VOCABULARY


def test_what_was_measured(graph: Graph, tmp_path: Path) -> None:
    rows = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(3))
    result = qc.compile(graph, [GPTQ(bits=4, group_size=32)], qc.Calibration.from_tokens(rows, samples=4))
    assert result.report.held_out is not None
    written = qc.lower(result, "checkpoint", tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert '1. `assign(scheme="w4a16", group_size=32)`\n2. `gptq(bits=4, group_size=32, act_order=true, ' in card
    calibration = result.report.calibration or {}
    assert f"Calibrated on {calibration['samples']} rows of up to 24 tokens that were given." in card
    found = result.report.held_out
    assert f"On {found['tokens']} tokens that calibration did not see" in card
    assert f"| perplexity | {found['reference_perplexity']:.2f} | {found['perplexity']:.2f} |" in card
    assert f"per token | 0 | {found['kl_divergence']:.4f} |" in card
    assert f"{written['weight_bytes'] / 1e6:,.1f} MB of weights" in card
    assert written["weight_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "vllm serve PATH" in card


def test_what_nobody_measured(graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, "w4a16-g32", verify=False)
    assert result.report.calibration is None
    card = (directory / "README.md").read_text()
    assert "Nothing in it is calibrated." in card
    assert "## Measured" not in card
    result.manifest["recipe"] = []  # as of a checkpoint of another program
    qc.lower(result, "checkpoint", directory.parent / "again", verify=False)
    assert "## Recipe" not in (directory.parent / "again" / "README.md").read_text()


def test_tokens_that_measured_alone(graph: Graph, tmp_path: Path) -> None:
    rows = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    result = qc.compile(graph, [RTN(bits=4, group_size=32)], qc.Calibration.from_tokens(rows))
    qc.lower(result, "checkpoint", tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing in it is calibrated." in card
    assert "## Measured" in card


@pytest.mark.parametrize(
    ("layout", "scheme", "engines"),
    [
        ("compressed-tensors", "w4a16-g32", "vLLM SGLang"),
        ("compressed-tensors", "w3a16-g32", "vLLM"),
        ("compressed-tensors", "w8a8-dynamic", "vLLM SGLang"),
        ("compressed-tensors", "fp8-tensor", "vLLM SGLang"),
        ("compressed-tensors", "fp8-dynamic", "vLLM SGLang TensorRT-LLM"),
        ("compressed-tensors", "nvfp4", "vLLM SGLang TensorRT-LLM"),
        ("compressed-tensors", "nvfp4a16", "vLLM SGLang"),
        ("compressed-tensors", "mxfp4a16", "vLLM TensorRT-LLM"),
        ("gptq", "w4a16-g32", "vLLM SGLang TensorRT-LLM"),
        ("awq", "w4a16-g32-asym", "vLLM SGLang TensorRT-LLM"),
        ("modelopt", "w4a16-g32", "TensorRT-LLM"),
        ("modelopt", "fp8-dynamic", "vLLM SGLang TensorRT-LLM"),
        ("gguf", "w4a16-g32", "llama.cpp"),
    ],
)
def test_who_takes_it(layout: str, scheme: str, engines: str) -> None:
    parsed = Scheme.parse(scheme)
    assert parsed.weight is not None
    layer = Layer("up", 64, 64, parsed.weight, parsed.activation)
    found = serving_commands(layout, [layer], is_fused=True)
    assert list(found) == engines.split()
    assert all("PATH" in command for command in found.values())
    assert serving_commands(layout, [layer], is_fused=False) == {}


def test_nobody_takes_it(graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, "w4a16-g16", verify=False)
    assert "No engine is known to have kernels for these formats" in (directory / "README.md").read_text()
