"""Engines as they run; needs a GPU, its driver and TensorRT. Nobody has run this yet: make test-gpu."""

import runpy
import sys

import pytest
import torch

import qcompiler

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank, and"
TOKENS = 64
TOLERANCE = 2 * 2e-2  # of the largest logit: what float16 may change in either of two that are compared
COARSE = 0.1  # as much of bfloat16, or of attention in 8-bit floats


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("recipe", "options", "tolerance"),
    [
        ("w4a16-rtn", "", TOLERANCE),
        ("w8a16", "", TOLERANCE),
        ("w8a8-dynamic", "", TOLERANCE),
        ("fp8-dynamic", "", TOLERANCE),
        ("w4a16-rtn+kv-int8", "", TOLERANCE),
        ("w4a16-rtn+emb-int8", "", TOLERANCE),
        ("w4a16-rtn", ",float=bfloat16", COARSE),
        ("fp8-dynamic+kv-fp8-static", ",attention=fp8", COARSE),
    ],
)
def test_an_engine_continues_as_the_native_artifact_would(booklm, tmp_path, monkeypatch, recipe, options, tolerance):
    """Prompt and tokens, one by one through the cache: each is one of the most likely of the native artifact's."""
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    if recipe.startswith("fp8") and int(capability) < 89:
        pytest.skip("float8 needs SM 89")
    result = qcompiler.compile(booklm, recipe)
    qcompiler.lower(result, f"tensorrt:sm={capability},strict=true{options}", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["run.py", PROMPT, "--tokens", str(TOKENS)])
    ran = runpy.run_path(str(tmp_path / "out" / "run.py"))
    prompt, tokens = ran["ids"], torch.tensor(ran["tokens"])
    assert len(prompt) > 1
    assert 0 < len(tokens) <= TOKENS
    logits = result.artifact().forward(torch.tensor([prompt + ran["tokens"]]))[0, len(prompt) - 1 : -1]
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    assert behind.max() <= tolerance * logits.abs().max()
