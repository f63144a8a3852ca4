"""The ONNX artifact: captured models against the models themselves, and files it cannot run."""

import copy
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

from qcompiler import numerics
from qcompiler.errors import ArtifactError, InputError, MissingDependencyError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Affine
from qcompiler.lowering.onnx import OnnxArtifact, lower
from qcompiler.numerics.scheme import Scheme
from qcompiler.protocol.artifact import Artifact
from tests.lowering.onnx.harness import GraphMaker

aten = torch.ops.aten


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32, n_inner=96, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return transformers.BertForMaskedLM(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


@dataclass(frozen=True)
class Captured:
    """A model, its graph (quantized last), and what was written: in float, and with 4-bit weights."""

    name: str
    model: torch.nn.Module
    graph: Graph
    floating: Path
    quantized: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", params=list(MODELS))
def captured(request, tmp_path_factory) -> Captured:
    model = MODELS[request.param]()
    graph = canonicalize(capture_module(model))
    root = tmp_path_factory.mktemp("onnx")
    lower(graph, root / "floating")
    scheme = Scheme.parse("w4a16-g32")
    spec = scheme.weight
    assert spec is not None
    for site in graph.sites():
        weight = graph.weights.read(site.weight).float()
        scale, zero = numerics.min_max_qparams(weight, spec, torch.float32)
        codes = numerics.quantize(weight, scale, zero, spec)
        graph.set_weight(site, Affine(codes, scale, zero, spec, torch.float32))
        graph.schemes[site.name] = scheme
    report = lower(graph, root / "quantized")
    return Captured(request.param, model, graph, root / "floating", root / "quantized", report)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 17)])
def test_forward_equals_the_model(captured, shape):
    model, directory = captured.model, captured.floating
    ids = torch.randint(0, 96, shape)
    result = OnnxArtifact(directory).forward(ids)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, logits_of(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_and_steps_equal_the_whole(captured, batch):
    model, directory = captured.model, captured.floating
    artifact = OnnxArtifact(directory)
    ids = torch.randint(0, 96, (batch, 12))
    if not artifact.has_cache:
        with pytest.raises(ArtifactError, match="without a cache"):
            artifact.prefill(ids)
        return
    parts = []
    logits, cache = artifact.prefill(ids[:, :5])
    parts.append(logits)
    for new in (ids[:, 5:6], ids[:, 6:9], ids[:, 9:]):
        logits, cache = artifact.step(new, cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(captured):
    """On the left where positions are an input, on the right where the model counts them itself."""
    artifact, ids = OnnxArtifact(captured.floating), torch.randint(0, 96, (1, 6))
    left = artifact.has_cache
    real = slice(3, 9) if left else slice(0, 6)
    feed = {name: torch.zeros(1, 9, dtype=torch.int64) for name in artifact._inputs}
    feed["input_ids"][:, real] = ids
    feed["attention_mask"][:, real] = 1
    if left:
        feed["position_ids"][:, real] = torch.arange(6)
    for name in artifact._past:
        feed[name] = torch.zeros(1, artifact._inputs[name].shape[1], 0, artifact._inputs[name].shape[3])
    (logits,) = artifact._session.run(["logits"], {name: tensor.numpy() for name, tensor in feed.items()})
    assert not bool(torch.from_numpy(logits).isnan().any())
    torch.testing.assert_close(torch.from_numpy(logits[:, real]), logits_of(captured.model, ids), rtol=1e-4, atol=1e-4)


def test_quantized_model_is_fused_everywhere_and_exact(captured, optimized):
    sites, store = captured.graph.sites(), captured.graph.weights
    kinds = Counter(node.op_type for node in optimized(captured.quantized).graph.node)
    assert kinds["MatMulNBits"] == len(sites) == len(captured.report["sites"])
    assert kinds["DequantizeLinear"] == 0
    assert {site["status"] for site in captured.report["sites"].values()} == {"fused"}
    stored = onnx.load(captured.quantized / "model.onnx", load_external_data=False).graph.initializer
    matrices = [t.name for t in stored if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
    assert all("embed" in name or "wte" in name or "wpe" in name for name in matrices if "_scale" not in name)

    dequantized = copy.deepcopy(captured.model)
    modules = dict(dequantized.named_modules())
    for site in sites:
        codes, scale = store.read(f"{site.weight}_codes"), store.read(f"{site.weight}_scale")
        dense = torch.ops.qcompiler.dequantize(codes, scale, None, 1, 32, torch.float32)
        module = modules[site.name]
        module.weight = torch.nn.Parameter(dense.T if type(module).__name__ == "Conv1D" else dense)  # unties it
    ids = torch.randint(0, 96, (2, 7))
    exact = logits_of(dequantized, ids)
    assert not torch.allclose(exact, logits_of(captured.model, ids), atol=1e-2)
    torch.testing.assert_close(OnnxArtifact(captured.quantized).forward(ids), exact, rtol=1e-4, atol=1e-4)
    fast = OnnxArtifact(captured.quantized, accuracy_level=4).forward(ids)
    assert 20 < numerics.sqnr_db(exact, fast) < 60  # activations rounded to int8: near, and not the same


def test_what_an_artifact_tells(captured):
    model, graph, directory = captured.model, captured.graph, captured.floating
    artifact = OnnxArtifact(directory)
    assert isinstance(artifact, Artifact)
    assert artifact.vocab_size == 96
    assert artifact.max_positions == 32
    assert artifact.path == directory
    assert artifact.provenance["parameters"] == sum(p.numel() for p in model.parameters())
    assert 4 * model.num_parameters() <= artifact.stored_bytes() < 4 * model.num_parameters() * 1.01
    assert artifact.bits_per_weight() == pytest.approx(32, rel=0.01)
    assert artifact.has_cache == graph.signature.has_cache


def test_ids_that_cannot_be_run(captured):
    artifact = OnnxArtifact(captured.floating)
    with pytest.raises(InputError, match="longer than"):
        artifact.forward(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(InputError, match="int64"):
        artifact.forward(torch.zeros(1, 3))
    with pytest.raises(InputError, match="int64"):
        artifact.forward(torch.zeros(3, dtype=torch.int64))
    if artifact.has_cache:
        _, cache = artifact.prefill(torch.zeros(2, 30, dtype=torch.int64))
        with pytest.raises(InputError, match="longer than"):
            artifact.step(torch.zeros(2, 3, dtype=torch.int64), cache)
        with pytest.raises(InputError, match="another batch"):
            artifact.step(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_no_such_model(tmp_path):
    with pytest.raises(InputError, match="no ONNX model"):
        OnnxArtifact(tmp_path)


def test_a_damaged_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxArtifact(tmp_path)


def test_a_model_with_other_ports(maker: GraphMaker, tmp_path):
    lower(maker.graph(maker.call(aten.neg.default, maker.input(torch.zeros(7, 5), "pixels"))), tmp_path / "out")
    with pytest.raises(ArtifactError, match="not the ports of a language model") as caught:
        OnnxArtifact(tmp_path / "out")
    assert caught.value.got == "pixels"


def test_a_file_of_another_writer(tmp_path):
    source = GraphMaker()
    ids = source.input(torch.zeros(7, 5, dtype=torch.int64), "input_ids", role="ids")
    table = source.weight("w", torch.randn(30, 4))
    graph = source.graph(source.call(aten.embedding.default, table, ids), names=("logits",), roles=("logits",))
    lower(graph, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    artifact = OnnxArtifact(tmp_path / "model.onnx")
    value = torch.randint(0, 30, (2, 3))
    assert torch.equal(artifact.forward(value), source.values[table][value])
    assert artifact.max_positions is None
    assert artifact.stored_bytes() == (tmp_path / "model.onnx").stat().st_size
    with pytest.raises(ArtifactError, match="does not tell"):
        artifact.bits_per_weight()


def test_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="ONNX Runtime"):
        OnnxArtifact(tmp_path)
