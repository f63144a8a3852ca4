"""The file as ``gguf`` and transformers read it: values bit for bit, names, settings; and models without a place."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import qcompiler as qc
from qcompiler.artifacts import NativeArtifact
from qcompiler.errors import MissingDependencyError, TargetError
from qcompiler.frontend import interleave
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.lowering.checkpoint.gguf import check_model, supports
from qcompiler.lowering.checkpoint.gguf.architectures import architecture_of
from qcompiler.lowering.checkpoint.gguf.metadata import context_length, rope_factors
from qcompiler.numerics import Scheme
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of, save_source
from tests.models import build

TARGET = "checkpoint:format=gguf"
LAYER = "model.layers.0"
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down", "mlp.gate_proj": "ffn_gate"}
HEADS = {"attn_q": 4, "attn_k": 2}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {**PLAIN, "factor": 4.0, "original_max_position_embeddings": 24}
YARN = {**SCALED, "rope_type": "yarn"}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
IDS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(5))
TYPES = {"w8a16": "Q8_0", "w4a16": "Q4_0", "mxfp4a16": "MXFP4"}


def read(directory: Path) -> tuple[gguf.GGUFReader, dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(directory / "model.gguf")
    return reader, {tensor.name: tensor for tensor in reader.tensors}


def setting(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def turned(weight: np.ndarray, place: str) -> np.ndarray:
    """Rows of q and k in the order of neighbouring pairs, one by one."""
    if place not in HEADS:
        return weight
    half = len(weight) // HEADS[place] // 2
    heads = [weight[start : start + 2 * half] for start in range(0, len(weight), 2 * half)]
    return np.concatenate([np.stack([head[i + half * part] for i in range(half) for part in (0, 1)]) for head in heads])


@pytest.mark.parametrize("scheme", ["w8a16-g32", "w8a16-channel", "w8a16-tensor", "w4a16-g32", "w4a16-g64", "mxfp4a16"])
def test_values(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme, TARGET)
    reader, tensors = read(directory)
    kind = TYPES[scheme.partition("-")[0]]
    for name, place in NAMES.items():
        tensor = tensors[f"blk.0.{place}.weight"]
        weight = native_weight(result.graph, f"{LAYER}.{name}")
        assert tensor.tensor_type.name == kind
        assert tensor.shape.tolist() == [weight.shape[1], weight.shape[0]]
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), turned(weight, place))
    assert setting(reader, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{kind}{'_MOE' * (kind == 'MXFP4')}"]
    repeats = scheme not in ("w8a16-g32", "w4a16-g32", "mxfp4a16")
    assert any("of more than 32 weights" in note for note in report["notes"]) is repeats


def test_minima_are_zero_points_as_far_as_float16_holds_them(graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "w4a16-g32-asym", TARGET)
    _, tensors = read(directory)
    largest = []
    for name, place in NAMES.items():
        tensor = tensors[f"blk.0.{place}.weight"]
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = turned(native_weight(result.graph, f"{LAYER}.{name}"), place)
        minima = tensor.data.reshape(len(wanted), -1, 20)[:, :, 2:4].copy().view(np.float16).astype(np.float32)
        assert tensor.tensor_type.name == "Q4_1"
        off = np.abs(found - wanted).reshape(len(wanted), -1, 32)
        assert (off <= 2.0**-11 * np.abs(minima) + 1e-7).all()
        largest.append(off.max())
    assert max(largest) > 0  # of odd zero points above 8, as scales of bfloat16 have 8 bits and float16 11
    assert any("Q4_1 has minima" in note for note in report["notes"])


def test_what_stays_float(source: Path, graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, "w8a16-g32", TARGET)
    _, tensors = read(directory)
    embedding = graph.weights.read("model.embed_tokens.weight")
    stored = tensors["token_embd.weight"]
    assert stored.tensor_type.name == tensors["output.weight"].tensor_type.name == "BF16"
    np.testing.assert_array_equal(gguf.dequantize(stored.data, stored.tensor_type), embedding.float().numpy())
    norm = tensors["blk.0.attn_norm.weight"]
    assert norm.tensor_type.name == "F32"
    np.testing.assert_array_equal(norm.data, graph.weights.read(f"{LAYER}.input_layernorm.weight").float().numpy())
    assert len(tensors) == 12


def test_settings(graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, "w8a16-g32", TARGET)
    reader, _ = read(directory)
    found = {key.removeprefix("llama."): setting(reader, key) for key in reader.fields if key.startswith("llama.")}
    assert found == {
        "context_length": 48,
        "vocab_size": 61,
        "block_count": 1,
        "embedding_length": 64,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
    }
    assert setting(reader, "general.architecture") == "llama"
    assert setting(reader, "tokenizer.ggml.model") == "none"
    assert sorted(path.name for path in directory.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.gguf",
    ]
    assert CheckpointTarget.wrote(directory)


def foreign_logits(directory: Path, ids: Tensor) -> Tensor:
    config = AutoConfig.from_pretrained(directory, gguf_file="model.gguf")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(directory / "model.gguf", return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    model.tie_weights()
    with torch.inference_mode():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_transformers_computes_what_was_compiled(
    family: str, options: dict[str, Any], tmp_path: Path, write: Write
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, **options}
    graph = qc.capture(save_source(tmp_path / "source", family, **sizes))
    directory, _, result = write(graph, "w8a16-g32", TARGET)
    (directory / "config.json").unlink()  # the file tells all by itself
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(5))
    wanted = result.artifact().forward(ids)
    assert ("output.weight" in read(directory)[1]) is ("tie_word_embeddings" not in options)
    if "attention_bias" in options:  # transformers' reader leaves out the biases of llama
        _, tensors = read(directory)
        bias = graph.weights.read(f"{LAYER}.self_attn.k_proj.bias").float().numpy()
        np.testing.assert_array_equal(tensors["blk.0.attn_k.bias"].data, turned(bias[:, None], "attn_k")[:, 0])
        return
    torch.testing.assert_close(foreign_logits(directory, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_frequencies_of_llama3() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model: Any = build("llama", layers=1, hidden_size=64, rope_parameters=rope)
    factors = rope_factors(model.config)
    assert factors is not None
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(8)


@pytest.mark.parametrize(
    "rope",
    [YARN, {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}, LLAMA3],
    ids=["yarn", "yarn with options", "llama3"],
)
def test_scaled_rotary_embeddings(rope: dict[str, Any], tmp_path: Path, write: Write) -> None:
    """The file tells them all: read back, the model computes what it did."""
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 96}
    graph = qc.capture(save_source(tmp_path / "source", rope_parameters=rope, **sizes))
    directory, _, result = write(graph, "w8a16-g32", TARGET)
    wanted = result.artifact().forward(IDS)
    plain = qc.capture(save_source(tmp_path / "plain", rope_parameters=PLAIN, **sizes))
    assert (NativeArtifact(plain).forward(IDS) - wanted).abs().max() > 1e-2 * wanted.abs().max()
    found = qc.open_artifact(directory / "model.gguf").forward(IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    again = qc.capture(directory / "model.gguf").provenance["config"]["rope_parameters"]
    assert again["rope_type"] == rope["rope_type"]
    assert again["original_max_position_embeddings"] == rope["original_max_position_embeddings"]
    if rope == YARN:
        file, _ = read(directory)
        assert setting(file, "llama.rope.scaling.type") == "yarn"
        assert setting(file, "llama.rope.scaling.attn_factor") == pytest.approx(1)


def test_a_window_limits_sequences() -> None:
    model: Any = build("mistral", layers=1)
    assert architecture_of(model.config).name == "llama"
    assert context_length(model.config) == 4
    assert context_length(build("llama", layers=1).config) == 48


@pytest.mark.parametrize(
    ("family", "options", "where"),
    [
        ("gpt2", {}, "config.json"),
        ("llama", {"hidden_act": "gelu"}, "config.json: hidden_act"),
        ("qwen3", {"attention_bias": True}, f"{LAYER}.self_attn.q_proj.bias"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    ],
)
def test_models_without_a_place(family: str, options: dict[str, Any], where: str, graph: Graph) -> None:
    with pytest.raises(TargetError, match="compressed-tensors") as caught:
        check_model(graph, build(family, layers=1, **options))
    assert where in str(caught.value.where)


def test_a_width_that_blocks_do_not_divide(odd_graph: Graph) -> None:
    with pytest.raises(TargetError, match="blocks of 32 do not divide 72"):
        compiled(odd_graph, passes_of("w8a16-g32"), TARGET)


def test_a_scale_that_float16_does_not_hold(graph: Graph, write: Write, tmp_path: Path) -> None:
    large = graph.copy()
    name = f"{LAYER}.mlp.down_proj.weight"
    large.weights.set(name, large.weights.read(name) * 1e7)
    with pytest.raises(TargetError, match="float16"):
        write(large, "w8a16-g32", TARGET)
    assert not any(path.suffix == ".gguf" for path in tmp_path.rglob("*"))


def test_without_the_package(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        CheckpointTarget(format="gguf").check_graph(graph)


def test_rows_of_neighbours() -> None:
    rows = torch.arange(12)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        ("w8a16", 256, "fused"),
        ("w4a16", 256, "fused"),
        ("w4a16-asym", 256, "fused"),
        ("w4a16-g64", 160, "fused"),
        ("mxfp4a16", 256, "fused"),
        ("w4a16-g16", 256, "refused"),
        ("w4a16-g32", 100, "refused"),
        ("w8a16-asym", 256, "refused"),
        ("w3a16", 256, "refused"),
        ("w4a16-lut", 256, "refused"),
        ("nvfp4a16", 256, "refused"),
        ("fp8", 256, "refused"),
        ("w8a8", 256, "refused"),
    ],
)
def test_what_is_taken(scheme: str, width: int, status: str) -> None:
    assert supports(Scheme.parse(scheme), width).status == status
