"""What was compiled is compared with what it was compiled from, and with nothing else."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qcompiler as qc
from qcompiler.artifacts.hf import HFArtifact
from qcompiler.artifacts.original import check_original
from qcompiler.errors import InputError
from qcompiler.passes import RTN
from tests.tiny_checkpoint import command, save_checkpoint, write_text

TOKENS = torch.arange(3, 67).view(1, 64)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    model = save_checkpoint(root / "model")
    result = qc.compile(model, [RTN(bits=4, group_size=16)])
    result.save(root / "out" / "native")
    qc.lower(result, "onnx", root / "out" / "onnx")
    torch.manual_seed(1)
    save_checkpoint(root / "other", layers=1)
    return root


def copied(places: Path, to: Path) -> Path:
    shutil.copytree(places / "model", to)
    return to


def retrained(directory: Path) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("form", [".", "native", "onnx"])
def test_another_model_is_refused(places, form, tmp_path):
    for other in (places / "other", retrained(copied(places, tmp_path / "retrained"))):
        with pytest.raises(InputError, match="not the model that the artifact was compiled from") as caught:
            qc.evaluate(places / "out" / form, tokens=TOKENS, against=other)
        assert caught.value.where == str(other)
        assert str(places / "model") in str(caught.value.expected)


@pytest.mark.parametrize("form", ["native", "onnx"])
def test_the_original_wherever_it_lies_and_in_however_many_files(places, form, tmp_path):
    moved = copied(places, tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(places / "model", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for original in (places / "model", moved, tmp_path / "sharded"):
        found = qc.evaluate(places / "out" / form, tokens=TOKENS, against=original)
        assert found.notes == ()
        assert found.kl_divergence > 0


def test_two_forms_of_one_model_are_compared(places):
    for ours, theirs in (("native", "onnx"), ("onnx", "native")):
        assert qc.evaluate(places / "out" / ours, tokens=TOKENS, against=places / "out" / theirs).notes == ()


def test_a_copy_in_another_dtype_is_noted(places, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(places / "model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "float32")
    for form in ("native", "onnx"):
        found = qc.evaluate(places / "out" / form, tokens=TOKENS, against=tmp_path / "float32")
        (note,) = found.notes
        assert "float32, the original in bfloat16" in note
        assert found.to_dict()["notes"] == [note]


def test_a_model_from_memory_is_noted(places, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(places / "model", dtype=torch.bfloat16)
    result = qc.compile(model, [RTN(bits=4, group_size=16)])
    (note,) = qc.evaluate(result, tokens=TOKENS, against=places / "model").notes
    assert "from memory" in note
    assert qc.evaluate(result, tokens=TOKENS, against=result).notes == ()


def test_what_nothing_here_compiled_is_not_judged(places):
    assert check_original(HFArtifact(places / "other"), HFArtifact(places / "model")) == ()
    plain = types.SimpleNamespace(path=None, provenance={})
    assert check_original(plain, HFArtifact(places / "model")) == ()
    (note,) = check_original(qc.load(places / "out").artifact(), plain)
    assert "another program" in note


def test_the_command_refuses_and_notes(places, tmp_path):
    text = write_text(tmp_path / "text.txt", words=300)
    outcome = command("evaluate", places / "out", "--text", text, "--against", places / "other", "--json")
    assert (outcome.status, outcome.error["type"]) == (2, "InputError")
    converted = copied(places, tmp_path / "converted")
    file = converted / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((converted / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (converted / "config.json").write_text(json.dumps({**config, key: "float16"}))
    shown = command("evaluate", places / "out", "--text", text, "--against", converted)
    assert shown.status == 0
    assert "note: whether" in shown.output
