"""Damaged models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.bad_input.edits import (
    INDEX,
    WEIGHT,
    check_error,
    compile_to,
    last_shard,
    rewrite_json,
    rewrite_weights,
)
from tests.tiny_checkpoint import write_text


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


def test_corrupt_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    with shard.open("r+b") as file:
        file.write(b"\xff" * 16)
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    shard.unlink()
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-gptq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(model: Path, tmp_path: Path, value: float, recipe: str) -> None:
    rewrite_weights(model, lambda tensors: tensors[WEIGHT].__setitem__((3, 5), value))
    text = write_text(tmp_path / "text.txt")
    outcome = compile_to(tmp_path, model, "--calib", text, "--samples", 2, "--length", 16, recipe=recipe)
    check_error(outcome, "WeightError", WEIGHT)


def test_weight_that_is_not_finite_is_named_before_anything_is_sampled_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*arguments: object, **options: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("qcompiler.artifacts.calibration.Calibration.bind", bind)
    rewrite_weights(model, lambda tensors: tensors[WEIGHT].__setitem__((3, 5), float("nan")))
    outcome = compile_to(tmp_path, model, "--samples", 2, "--length", 16, recipe="w4a16-gptq")
    check_error(outcome, "WeightError", WEIGHT)


def test_index_of_a_tensor_that_is_not_there(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded).name
    rewrite_json(sharded / INDEX, lambda fields: fields["weight_map"].update(ghost=shard))
    check_error(compile_to(tmp_path, sharded), "WeightError", "ghost", shard)


def test_index_that_leaves_the_directory(sharded: Path, tmp_path: Path) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][WEIGHT]
    shutil.copy(sharded / shard, tmp_path / "file")
    rewrite_json(sharded / INDEX, lambda fields: fields["weight_map"].update({WEIGHT: "../file"}))
    check_error(compile_to(tmp_path, sharded), "WeightError", "../file")


def test_tensor_missing(model: Path, tmp_path: Path) -> None:
    rewrite_weights(model, lambda tensors: tensors.pop(WEIGHT))
    check_error(compile_to(tmp_path, model), "WeightError", WEIGHT)


def test_tensor_of_another_shape(model: Path, tmp_path: Path) -> None:
    rewrite_weights(model, lambda tensors: tensors.update({WEIGHT: torch.zeros(95, 64, dtype=torch.bfloat16)}))
    check_error(compile_to(tmp_path, model), "WeightError", WEIGHT, "95")


def test_pickle_weights(model: Path, tmp_path: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    check_error(compile_to(tmp_path, model), "WeightError", "pytorch_model.bin", "safetensors")


# --- configuration, tokenizer, text ----------------------------------------------------------------------------------


def test_no_such_model(tmp_path: Path) -> None:
    check_error(compile_to(tmp_path, tmp_path / "nowhere"), "InputError", str(tmp_path / "nowhere"))


def test_missing_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    check_error(compile_to(tmp_path, model), "InputError", str(model), "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": "many"}'])
def test_broken_config(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    outcome = compile_to(tmp_path, model)
    assert outcome.error["type"] in ("InputError", "UnsupportedModelError")
    check_error(outcome, outcome.error["type"], str(model))


def test_vocabulary_smaller_than_the_tokenizer(model: Path, tmp_path: Path) -> None:
    rewrite_json(model / "config.json", lambda fields: fields.update(vocab_size=100))
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite_weights(model, lambda tensors: tensors.update({name: tensors[name][:100].clone() for name in embeddings}))
    text = write_text(tmp_path / "text.txt")
    outcome = compile_to(tmp_path, model, "--calib", text, "--length", 16, recipe="w4a16-gptq")
    check_error(outcome, "InputError", str(model), "4095", "100")
