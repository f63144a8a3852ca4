"""Embeddings of codes: as compressed-tensors and GGUF have them, and read back."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

import qcompiler as qc
from qcompiler.ir import Graph, quantized_tables, with_float_tables
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.numerics import QuantSpec
from qcompiler.passes import RTN, Assign, QuantizeEmbedding
from tests.frontend.checkpoints.comparing import assert_same_parts
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, save_source

TABLE = "model.embed_tokens"
GGUF = "checkpoint:format=gguf"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """With a head that is the embedding."""
    options: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "tie_word_embeddings": True}
    return qc.capture(save_source(tmp_path_factory.mktemp("tied"), **options))


def passes(embedding: QuantizeEmbedding) -> list[Any]:
    return [Assign("w4a16-g32"), embedding, RTN()]


def matrix(graph: Graph) -> np.ndarray:
    """What the table means."""
    found: np.ndarray = with_float_tables(graph).weights.read(f"{TABLE}.weight").numpy()
    return found


def assert_same_table(before: Graph, after: Graph) -> None:
    (first,), (second,) = quantized_tables(before), quantized_tables(after)
    assert (first.name, first.spec) == (second.name, second.spec)
    for name in first.parts:
        assert torch.equal(before.weights.read(name).double(), after.weights.read(name).double())


@pytest.mark.parametrize(
    ("embedding", "bits"),
    [(QuantizeEmbedding(8), 8), (QuantizeEmbedding(4), 4), (QuantizeEmbedding(8, group_size=32), 8)],
)
def test_compressed_tensors(embedding: QuantizeEmbedding, bits: int, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "", passes=passes(embedding))
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    np.testing.assert_array_equal(unpacking.packed_integers(tensors, TABLE, bits), matrix(result.graph))
    assert f"{TABLE}.weight" not in tensors
    settings = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = [item for item in settings.config_groups.values() if TABLE in item.targets]
    assert "Embedding" in scheme.targets  # engines ask by the class where they know no name
    parts = {part: tensors[f"{TABLE}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found = compressor.decompress(parts, scheme)["weight"]
    np.testing.assert_allclose(found.float().numpy(), matrix(result.graph), rtol=2**-8)
    (note,) = report["notes"]
    assert note.endswith("reads it back: transformers reads no table of codes, vLLM on GPUs")
    assert report["parity"]["max_difference"] < 1e-5
    again = qc.capture(directory)
    assert again.notes == []
    assert_same_table(result.graph, again)
    assert_same_parts(result.graph, again)
    assert "vllm serve" in (directory / "README.md").read_text()


def test_other_embeddings_are_left_out(write: Write, tmp_path: Path) -> None:
    source = qc.capture(save_source(tmp_path / "source", "gpt2"))
    directory, _, _ = write(source, "", passes=[QuantizeEmbedding(8)])
    settings = unpacking.read_config(directory)["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert {"transformer.wte", "Embedding"} <= set(group["targets"])
    assert "transformer.wpe" in settings["ignore"]
    before, after = unpacking.read_tensors(tmp_path / "source"), unpacking.read_tensors(directory)
    same = set(before) & set(after)
    assert {"transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.weight"} < same
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_what_vllm_looks_up() -> None:
    support = CheckpointTarget().supports_table
    assert support(QuantSpec("int8", "per_channel", None), 576).status == "fused"
    assert "whole words" in support(QuantSpec("int4", "per_channel", None), 100).reason
    asymmetric = support(QuantSpec("int8", "per_channel", None, symmetric=False), 576)
    assert (asymmetric.status, "symmetric integers" in asymmetric.reason) == ("writes-only", True)


def test_no_command_serves_rows_that_no_engine_looks_up(graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, "", passes=passes(QuantizeEmbedding(8, symmetric=False)))
    assert "vllm serve" not in (directory / "README.md").read_text()


def test_a_tied_head_of_compressed_tensors(tied: Graph, write: Write) -> None:
    directory, report, result = write(tied, "", passes=passes(QuantizeEmbedding(8)))
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    assert config["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight_packed"], tensors[f"{TABLE}.weight_packed"])
    assert any(note.startswith("embedding and output head have the same codes, twice") for note in report["notes"])
    assert report["ignored"] == []
    again = qc.capture(directory)
    assert_same_table(result.graph, again)
    assert_same_parts(result.graph, again)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    ("embedding", "kind"),
    [(QuantizeEmbedding(8, group_size=32), "Q8_0"), (QuantizeEmbedding(4), "Q4_0")],
)
def test_gguf(embedding: QuantizeEmbedding, kind: str, is_tied: bool, graph: Graph, tied: Graph, write: Write) -> None:
    directory, report, result = write(tied if is_tied else graph, "", GGUF, passes=passes(embedding))
    file = gguf.GGUFReader(directory / "model.gguf")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    stored = tensors["token_embd.weight"]
    assert stored.tensor_type.name == kind
    np.testing.assert_array_equal(gguf.dequantize(stored.data, stored.tensor_type), matrix(result.graph))
    assert ("output.weight" in tensors) is not is_tied
    assert unpacking.read_config(directory)["tie_word_embeddings"] is is_tied
    assert report["parity"]["max_difference"] < 1e-5
    for place in (directory, directory / "model.gguf"):
        again = qc.capture(place)
        assert_same_table(result.graph, again)
        assert_same_parts(result.graph, again)
    assert "lm_head" not in again.schemes or is_tied


def test_from_one_format_to_another(tied: Graph, write: Write, tmp_path: Path) -> None:
    directory, _, result = write(tied, "", GGUF, passes=passes(QuantizeEmbedding(8, group_size=32)))
    qc.lower(directory, "checkpoint", tmp_path / "other")
    assert_same_table(result.graph, qc.capture(tmp_path / "other"))
    report = qc.lower(directory, "onnx", tmp_path / "onnx")
    assert "the embedding table is float, of the same numbers, not codes" in report["notes"]


@pytest.mark.parametrize("layout", ["gptq", "awq", "modelopt"])
def test_layouts_of_layers_alone_get_a_float_table(layout: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "", f"checkpoint:format={layout}", passes=passes(QuantizeEmbedding(8)))
    stored = unpacking.read_tensors(directory)[f"{TABLE}.weight"]
    np.testing.assert_array_equal(stored.float().numpy(), matrix(result.graph))
    assert "the embedding table is float, of the same numbers, not codes" in report["notes"]
