"""The plain script generates what `qcompiler generate` does, with ONNX Runtime alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import POSITIONS, command, save_checkpoint, write_text

FILE = Path(__file__).resolve().parents[2] / "examples" / "run_with_onnxruntime.py"
PROMPT = "The captain said"


def run(*arguments: object) -> str:
    """What the script prints, in a process of its own, started elsewhere."""
    line = [sys.executable, "-I", str(FILE), *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True, cwd="/").stdout


def test_it_needs_little() -> None:
    tree = ast.parse(FILE.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "numpy", "onnxruntime", "pathlib", "sys", "tokenizers"}
    lines = [line for line in FILE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 36


@pytest.mark.parametrize("cache", ["", "+kv-int8", "+kv-int4", "+kv-fp8"])
def test_it_prints_what_the_command_does(tmp_path: Path, cache: str) -> None:
    model, text = save_checkpoint(tmp_path / "model", layers=1), write_text(tmp_path / "text.txt")
    options = ("--calib", text, "--samples", 4, "--length", 32, "--to", "onnx")
    made = command("compile", model, "-r", f"w4a16-rtn{cache}", "-o", tmp_path / "out", *options)
    assert made.status == 0, made.errors
    folder = tmp_path / "out" / "onnx"
    whole = command("generate", folder, "--prompt", PROMPT, "--json").result
    assert len(set(whole["tokens"])) > 5  # a text that nothing but this model gives
    assert whole["prompt_tokens"] + len(whole["tokens"]) == POSITIONS  # it stops where the model's positions end
    assert run(folder, PROMPT) == f"{PROMPT}{whole['text']}\n"
    assert run(folder, PROMPT, 7) == command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 7).output

    settings = folder / "generation_config.json"
    last = whole["tokens"][9]
    settings.write_text(json.dumps({"eos_token_id": [1, last]}))
    ended = command("generate", folder, "--prompt", PROMPT, "--json").result
    assert ended["finish"] == "end"
    assert ended["tokens"] == whole["tokens"][: whole["tokens"].index(last) + 1]
    assert run(folder, PROMPT) == f"{PROMPT}{ended['text']}\n"
