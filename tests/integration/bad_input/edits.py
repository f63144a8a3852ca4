"""What tests of bad input do to models, and what they look for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import Outcome, command

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
SITE = WEIGHT.removesuffix(".weight")


def compile_to(tmp_path: Path, model: Path, *arguments: object, recipe: str = "w8a16") -> Outcome:
    return command("compile", model, "-r", recipe, "-o", tmp_path / "out", "--json", *arguments)


def check_error(outcome: Outcome, kind: str, *mentioned: str) -> None:
    """Exit status 2, one JSON object, the right type, and every word in it."""
    assert outcome.status == 2, outcome.errors
    assert outcome.fields["command"] == "compile"
    assert outcome.error["type"] == kind
    text = " ".join(outcome.error.values())
    for word in mentioned:
        assert word in text
    assert "Traceback" not in outcome.errors


def rewrite_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# --- weights ---------------------------------------------------------------------------------------------------------


def last_shard(model: Path) -> Path:
    found = sorted(model.glob("model-*.safetensors"))
    assert len(found) > 1
    return found[-1]
