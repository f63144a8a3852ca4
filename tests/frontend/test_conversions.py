"""Checkpoints that transformers takes apart or puts together while it loads them give the same tensors, read lazily."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcompiler.errors import WeightError
from qcompiler.frontend.capture import capture_directory
from qcompiler.frontend.conversions import source_names
from qcompiler.frontend.skeleton import bind_checkpoint, build_on_meta
from qcompiler.storage.safetensors_io import SafetensorsFile
from qcompiler.storage.weights import WeightStore
from tests.models import build, copy_graph

EXPERTS = 4


def bound(directory):
    store = WeightStore.from_directory(directory)
    model, computed = build_on_meta(directory, json.loads((directory / "config.json").read_text()), False)
    return bind_checkpoint(store, model, computed).weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A mixture of experts as published: every matrix of every expert a tensor of its own, under another name."""
    directory = tmp_path_factory.mktemp("mixtral")
    build("mixtral").save_pretrained(directory)
    names = load_file(directory / "model.safetensors")
    assert sum("experts.3." in name for name in names) == 2 * 3
    assert not any("gate_up" in name for name in names)
    return directory


def test_tensors_are_those_of_the_loaded_model(checkpoint):
    store, model = bound(checkpoint), build("mixtral")
    expected = dict(model.named_parameters())
    assert expected.keys() <= set(store.names())
    for name, value in expected.items():
        assert torch.equal(store.read(name), value.detach()), name
        assert store.info(name).shape == tuple(value.shape)


@pytest.fixture
def watched(monkeypatch):
    """The names of the tensors that are read whole."""
    read = []
    original = SafetensorsFile.read

    def watch(self, name, *rest):
        read.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(SafetensorsFile, "read", watch)
    return read


def test_the_matrices_of_one_expert_are_read_alone(checkpoint, watched):
    store, name = bound(checkpoint), "model.layers.1.mlp.experts.gate_up_proj"
    assert watched == []
    store.slice("one", name, 2)
    part = store.read("one")
    assert len(watched) == 2
    assert all("layers.1." in source and "experts.2." in source for source in watched)
    assert torch.equal(part, store.read(name)[2])


def test_a_directory_and_a_module_give_one_graph(checkpoint):
    graph = copy_graph(capture_directory(checkpoint))
    model = build("mixtral")
    for name, value in model.named_parameters():
        assert torch.equal(graph.weights.read(name), value.detach())


def test_a_missing_expert_is_named(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError):
        capture_directory(tmp_path)


def test_fingerprints_sample_the_files_alone(checkpoint, watched):
    first, second = bound(checkpoint), bound(checkpoint)
    assert first.fingerprint() == second.fingerprint()
    assert watched == []


def test_what_checkpoints_call_experts() -> None:
    model = build("mixtral", layers=1).to("meta")
    stacks = {name: len(value) for name, value in model.named_parameters() if value.dim() == 3}
    found = source_names(model, stacks)
    base = "model.layers.0.block_sparse_moe"
    assert found.renamed["model.layers.0.mlp.gate.weight"] == f"{base}.gate.weight"
    assert found.renamed["model.norm.weight"] == "model.norm.weight"
    assert found.experts.keys() == stacks.keys()
    parts = [(part.name, float(part.first), float(part.rows)) for part in found.experts[min(stacks, key=len)][3]]
    assert parts == [(f"{base}.experts.3.w2.weight", 0, 1)]
    parts = [(part.name, float(part.first), float(part.rows)) for part in found.experts[max(stacks, key=len)][1]]
    assert parts == [(f"{base}.experts.1.w1.weight", 0, 0.5), (f"{base}.experts.1.w3.weight", 0.5, 0.5)]


def test_experts_that_checkpoints_have_as_the_model_does() -> None:
    model = build("gpt_oss", layers=1).to("meta")
    stacks = {name: len(value) for name, value in model.named_parameters() if value.dim() == 3}
    assert stacks
    assert source_names(model, stacks).experts == {}
