"""What is written beside the quantized layers: float tensors, ties, configuration; and how much is in memory."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.contents import Contents, pack_words
from qcompiler.lowering.checkpoint.layers import build_source, written_layers
from qcompiler.passes import AWQ, GPTQ, RTN, Assign, InsertQDQ, Rotate, SmoothQuant
from qcompiler.protocol import Pass
from qcompiler.storage.safetensors_io import SafetensorsFile
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of, save_source


def ties(directory: Path) -> bool:
    return bool(unpacking.read_config(directory)["tie_word_embeddings"])


@pytest.fixture(scope="module")
def tied_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return qc.capture(save_source(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))


def test_float_tensors_are_those_of_the_source(source: Path, graph: Graph, write: Write) -> None:
    directory, *_ = write(graph, "w4a16-g32", verify=False)
    before, after = unpacking.read_tensors(source), unpacking.read_tensors(directory)
    kept = set(after) & set(before)
    assert {name for name in before if "norm" in name or "embed" in name or "head" in name} == kept
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    config = unpacking.read_config(directory)
    own = ("quantization_config", "qcompiler_version")
    assert {key: value for key, value in config.items() if key not in own} == unpacking.read_config(source)


def test_a_head_that_is_the_embedding(tied_graph: Graph, write: Write) -> None:
    directory, report, _ = write(tied_graph, "w4a16-g16")
    tensors = unpacking.read_tensors(directory)
    assert "model.embed_tokens.weight" in tensors  # where engines look for it
    assert "lm_head.weight" not in tensors
    assert ties(directory)
    assert report["parity"]["max_difference"] == 0


def test_a_quantized_head_that_was_the_embedding(tied_graph: Graph, write: Write) -> None:
    directory, report, result = write(tied_graph, "w4a16-g16", overrides={"lm_head": "w8a16"})
    tensors = unpacking.read_tensors(directory)
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    found = unpacking.packed_integers(tensors, "lm_head", 8)
    np.testing.assert_array_equal(found, native_weight(result.graph, "lm_head"))
    assert not ties(directory)
    assert report["parity"]["max_difference"] == 0


def test_a_head_that_a_rotation_parted_from_the_embedding(tied_graph: Graph, write: Write) -> None:
    directory, report, _ = write(tied_graph, "", passes=[Assign("w4a16-g16"), Rotate(online_down=False), RTN()])
    tensors = unpacking.read_tensors(directory)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not ties(directory)
    assert report["parity"]["max_difference"] < 1e-5


@pytest.mark.parametrize(
    "passes",
    [
        [Assign("w4a16-g32"), AWQ(), RTN()],
        [Assign("w4a16-g32"), GPTQ()],
        [Assign("w8a8-dynamic"), SmoothQuant(), InsertQDQ(observer=None), RTN()],
    ],
    ids=["awq", "gptq", "smooth"],
)
def test_scales_folded_into_norms(passes: list[Pass], graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "", passes=passes)
    name = "model.layers.0.input_layernorm.weight"
    written = unpacking.read_tensors(directory)[name]
    assert torch.equal(written, result.graph.weights.read(name))
    is_folded = len(passes) > 2
    assert written.dtype == (torch.float32 if is_folded else torch.bfloat16)
    note = "vectors (norms, biases) are float32, as they were rewritten; engines round them to bfloat16"
    assert any(note in sentence for sentence in report["notes"]) is is_folded
    assert report["parity"]["max_difference"] < (0.05 if "w8a8" in str(passes[0]) else 1e-5)


def test_a_new_tensor_is_refused(tmp_path: Path) -> None:
    """A rotation folds what the last norm adds into the head, which has no bias in the model."""
    source = save_source(tmp_path / "source", "gpt_neox")
    with pytest.raises(TargetError, match="no place for") as caught:
        qc.compile(source, [Assign("w4a16-g16"), Rotate(online_down=False), RTN()], targets=["checkpoint"])
    assert caught.value.where == "checkpoint: lm_head.bias"


def test_a_parameter_that_is_gone(graph: Graph, tmp_path: Path) -> None:
    result = compiled(graph, passes_of("w4a16-g32"), "checkpoint")
    result.graph.weights.remove("model.norm.weight")
    with pytest.raises(TargetError, match="not among the tensors") as caught:
        qc.lower(result, "checkpoint", tmp_path / "out")
    assert caught.value.where == "checkpoint: model.norm.weight"


def test_names_without_the_prefix_of_the_model(source: Path, tmp_path: Path) -> None:
    """Some checkpoints were saved from the model below the head; engines look for the names with its prefix."""
    bare = shutil.copytree(source, tmp_path / "bare")
    tensors = {name.removeprefix("model."): tensor for name, tensor in unpacking.read_tensors(source).items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    result = qc.compile(bare, passes_of("w4a16-g32"), targets=["checkpoint"])
    report = qc.lower(result, "checkpoint", tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight_packed" in unpacking.read_tensors(tmp_path / "out")
    assert report["parity"]["max_difference"] == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_source_that_is_gone(tied: bool, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tie_word_embeddings=tied)
    qc.compile(source, passes_of("w4a16-g16")).save(tmp_path / "native")
    direct = qc.compile(source, passes_of("w4a16-g16"))
    qc.lower(direct, "checkpoint", tmp_path / "direct", verify=False)
    shutil.rmtree(source)
    report = qc.lower(tmp_path / "native", "checkpoint", tmp_path / "out")
    assert report["parity"]["max_difference"] == 0
    first, second = (unpacking.read_tensors(tmp_path / name) for name in ("direct", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert unpacking.read_config(tmp_path / "direct") == unpacking.read_config(tmp_path / "out")


def test_encoders(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "bert")
    result = compiled(qc.capture(source), passes_of("w4a16-g16"), "checkpoint")
    report = qc.lower(result, "checkpoint", tmp_path / "out")
    tensors, name = unpacking.read_tensors(tmp_path / "out"), "bert.encoder.layer.0.attention.self.query"
    np.testing.assert_array_equal(unpacking.packed_integers(tensors, name, 4), native_weight(result.graph, name))
    assert "bert.embeddings.LayerNorm.bias" in tensors
    assert "parity" not in report
    assert any("predicts tokens, and this is none" in note for note in report["notes"])


def test_shards(graph: Graph, write: Write) -> None:
    directory, report, _ = write(graph, "w4a16-g32", "checkpoint:shard_bytes=9000")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(unpacking.read_tensors(directory))
    assert report["parity"]["max_difference"] == 0
    one, *_ = write(graph, "w4a16-g32")
    assert [path.name for path in one.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.fixture
def _little_garbage() -> Iterator[None]:
    """What is there already is no garbage: collecting looks at what comes alone, which takes a moment, not a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_little_garbage")
def test_one_tensor_at_a_time(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(graph, passes_of("w4a16-g32-asym"), "checkpoint").save(tmp_path / "native")
    result = qc.load(tmp_path / "native")
    read, alive, most = SafetensorsFile.read, list[Any](), [0, 0]

    def counted(self: SafetensorsFile, name: str, *options: Any) -> Tensor:
        gc.collect()
        tensor = read(self, name, *options)
        alive.append(weakref.ref(tensor))
        most[0], most[1] = max(most[0], sum(ref() is not None for ref in alive)), most[1] + 1
        return tensor

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    Contents(result.graph, build_source(result.graph), written_layers(result.graph))
    assert most == [0, 0]
    qc.lower(result, "checkpoint", tmp_path / "out", verify=False)
    assert most[0] <= 2
    assert most[1] == len(result.graph.weight_names()) - 1  # frequencies are the model's own


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("width", [1, 31, 32, 64, 75])
def test_words(bits: int, width: int) -> None:
    codes = torch.randint(1 << bits, (3, width), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (3, -(-width * bits // 32)))
    assert [unpacking.codes_of_words(row, bits, width) for row in words] == codes.tolist()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its norms multiply with ``1 + w``, which the graph has as one tensor."""
    return save_source(tmp_path_factory.mktemp("gemma"), "gemma2")


def test_norms_that_add_one(gemma: Path, write: Write) -> None:
    directory, report, _ = write(qc.capture(gemma), "w8a16")
    before, after = unpacking.read_tensors(gemma), unpacking.read_tensors(directory)
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 5
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(before[name], after[name]) for name in norms)
    assert report["parity"]["max_difference"] < 1e-5


def test_norms_that_add_one_to_what_a_pass_has_rewritten(gemma: Path, write: Write, tmp_path: Path) -> None:
    passes = [Assign("w4a16-g16"), AWQ(), RTN()]
    directory, report, result = write(qc.capture(gemma), "", passes=passes)
    name = "model.layers.0.input_layernorm.weight"
    before, after = unpacking.read_tensors(gemma)[name].float(), unpacking.read_tensors(directory)[name]
    assert float((before - after).abs().max()) > 0.01
    torch.testing.assert_close(after + 1, result.graph.weights.read(f"{name}.add"), rtol=0, atol=2**-22)
    assert report["parity"]["max_difference"] < 1e-4
    assert any("vectors (norms, biases) are float32" in note for note in report["notes"])
    result.save(tmp_path / "native")
    again = qc.lower(tmp_path / "native", "checkpoint", tmp_path / "again")
    assert again["parity"]["max_difference"] < 1e-4
