"""Directories and modules become graphs that compute what transformers computes; what cannot be captured says why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_directory, capture_module
from qcompiler.ir.signature import PAST, SEQUENCE, TOTAL
from tests.models import (
    DECODERS,
    FAMILIES,
    POSITIONS,
    VOCABULARY,
    build,
    canonical_graph,
    language_inputs,
    model_of,
    operators,
    padding_mask,
    run,
    tolerance,
)

pytestmark = pytest.mark.usefixtures("each_traced")


def reference(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def assert_same_logits(graph, model, ids, mask):
    logits = run(graph, **language_inputs(graph, ids, mask))["logits"]
    expected = reference(model, ids, mask)
    assert logits.shape == (*ids.shape, VOCABULARY)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, batch, side):
    ids = torch.randint(VOCABULARY, (batch, 11))
    assert_same_logits(canonical_graph(family), model_of(family), ids, padding_mask(batch, 11, side))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token(family):
    assert_same_logits(canonical_graph(family), model_of(family), torch.tensor([[5]]), torch.tensor([[1]]))


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoding_through_the_cache_equals_one_pass(family, side):
    graph = canonical_graph(family)
    ids, mask = torch.randint(VOCABULARY, (3, 12)), padding_mask(3, 12, side)
    expected = reference(model_of(family), ids, mask)
    past, start = None, 0
    for end in (4, 9, 10, 11, 12):  # prefill, a block, single tokens
        out = run(graph, **language_inputs(graph, ids[:, start:end], mask[:, :end], past))
        past = {name: value for name, value in out.items() if name.startswith("present")}
        real = mask[:, start:end].bool()
        torch.testing.assert_close(out["logits"][real], expected[:, start:end][real], rtol=0, atol=tolerance(expected))
        start = end
    assert past["present.1.value"].shape == (3, graph.signature.outputs[1].shape[1], 12, 8)


@pytest.mark.parametrize("family", DECODERS)
def test_ports_of_a_decoder(family):
    signature = canonical_graph(family).signature
    names = [port.name for port in signature.inputs]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:] == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [p.name for p in signature.outputs] == [
        "logits",
        *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value")),
    ]
    heads = 4 if family == "gpt2" else 2
    assert signature.inputs[1].shape == ("batch", TOTAL)
    assert signature.inputs[3].shape == ("batch", heads, PAST, 8)
    assert signature.outputs[1].shape == ("batch", heads, TOTAL, 8)
    assert signature.outputs[0].shape == ("batch", SEQUENCE, VOCABULARY)


def test_ports_of_an_encoder():
    graph = canonical_graph("bert")
    assert [(p.name, p.role) for p in graph.signature.inputs] == [
        ("input_ids", "ids"),
        ("attention_mask", "mask"),
        ("token_type_ids", "other"),
    ]
    assert not graph.signature.has_cache
    assert graph.provenance["limits"] == {SEQUENCE: POSITIONS}


def test_a_model_that_looks_for_padding_in_its_tokens():
    """Without a mask it would look at values, which are not there while it is captured."""
    graph = canonicalize(capture_module(build("gpt2", layers=1, pad_token_id=0)))
    assert graph.signature.has_cache


def test_token_types_are_asked_for_where_they_have_a_table_of_their_own():
    """Elsewhere they are read as tokens: zeros would not mean nothing."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS}
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes, initializer_range=0.3)).eval()
    graph = canonicalize(capture_module(model))
    assert [port.name for port in graph.signature.inputs] == ["input_ids", "attention_mask"]
    assert_same_logits(graph, model, torch.randint(VOCABULARY, (2, 6)), padding_mask(2, 6, "right"))


def test_experts_are_captured_as_products_with_chosen_matrices():
    model = build("mixtral", layers=1)
    before = model.config._experts_implementation
    graph = capture_module(model)
    assert model.config._experts_implementation == before
    assert operators(graph)["aten.bmm"] == 2


def test_provenance():
    graph = canonical_graph("llama")
    model = model_of("llama")
    assert graph.provenance["parameters"] == sum(p.numel() for p in model.parameters())
    assert graph.provenance["config"]["model_type"] == "llama"
    assert graph.provenance["source"] == "LlamaForCausalLM"


def test_every_tensor_has_dtype_and_shape():
    for family in FAMILIES:
        graph = canonical_graph(family)
        for node in graph.fx.nodes:
            if node.op in ("placeholder", "get_attr"):
                assert {"dtype", "shape"} <= node.meta.keys(), node
        for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
            assert node.meta["shape"] == port.shape


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sharded_and_tied_in_each_dtype(tmp_path, dtype):
    model = build("llama", layers=1, tie_word_embeddings=True).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    graph = canonicalize(capture_directory(tmp_path))
    assert graph.weights.info("model.layers.0.mlp.up_proj.weight").dtype == str(dtype).removeprefix("torch.")
    assert graph.weights.tied("lm_head.weight") == ("model.embed_tokens.weight",)
    assert {"lm_head", "model.layers.0.mlp.up_proj"} <= {site.name for site in graph.sites()}
    original = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(graph, original, torch.randint(VOCABULARY, (2, 6)), padding_mask(2, 6, "left"))


def test_names_without_the_base_model_s_prefix(tmp_path):
    model = build("gpt2", layers=1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, file)
    graph = canonicalize(capture_directory(tmp_path))
    assert "transformer.h.0.attn.c_attn" in {site.name for site in graph.sites()}
    assert_same_logits(graph, model, torch.randint(VOCABULARY, (1, 6)), padding_mask(1, 6, "none"))


@pytest.fixture
def checkpoint(tmp_path):
    """A directory, and functions that change its config and its tensors."""
    build("llama", layers=1).save_pretrained(tmp_path)
    return tmp_path


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_missing_parameter(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(WeightError, match=r"lacks parameters[\s\S]*model\.layers\.0\.mlp\.up_proj\.weight"):
        capture_directory(checkpoint)


def test_a_vocabulary_that_does_not_match(checkpoint):
    edit_config(checkpoint, vocab_size=VOCABULARY + 3)
    with pytest.raises(WeightError, match=r"shape") as caught:
        capture_directory(checkpoint)
    assert caught.value.got == f"({VOCABULARY}, 32)"
    assert caught.value.expected == f"({VOCABULARY + 3}, 32)"


def test_quantized_checkpoints_are_refused(checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantized already") as caught:
        capture_directory(checkpoint)
    assert caught.value.got == "gptq"


def test_codes_in_the_place_of_weights_are_refused(checkpoint):
    def store_codes(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    edit_tensors(checkpoint, store_codes)
    with pytest.raises(UnsupportedModelError, match="quantized already") as caught:
        capture_directory(checkpoint)
    assert caught.value.got == "int8"


@pytest.mark.parametrize("text", ["{", '"llama"', "[]", "{}", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_broken_config(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        capture_directory(checkpoint)


def test_a_missing_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        capture_directory(checkpoint)


def test_no_directory(tmp_path):
    with pytest.raises(InputError, match="no such model directory"):
        capture_directory(tmp_path / "nothing")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "unheard-of", "architectures": ["UnheardOf"]},
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"architectures": ["pipeline"]},
    ],
)
def test_a_config_that_describes_no_model(checkpoint, fields):
    edit_config(checkpoint, **fields)
    with pytest.raises(UnsupportedModelError, match="cannot build"):
        capture_directory(checkpoint)


def test_a_compiled_model_is_no_source(tmp_path):
    (tmp_path / "out" / "native").mkdir(parents=True)
    (tmp_path / "out" / "native" / "manifest.json").write_text("{}")
    (tmp_path / "out" / "onnx").mkdir()
    (tmp_path / "out" / "onnx" / "model.onnx").write_bytes(b"")
    for place in ("out", "out/native", "out/onnx"):
        with pytest.raises(InputError, match="compiled model already") as caught:
            capture_directory(tmp_path / place)
        assert "compile the original again" in caught.value.remedy


def test_an_original_with_an_onnx_model_beside_it_is_one(checkpoint):
    (checkpoint / "model.onnx").write_bytes(b"")
    assert capture_directory(checkpoint).signature.has_cache


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="an adapter") as caught:
        capture_directory(tmp_path)
    assert "merge_and_unload" in caught.value.remedy


def test_weights_that_lie_elsewhere(checkpoint):
    edit_config(checkpoint, transformers_weights="other.safetensors")
    with pytest.raises(UnsupportedModelError, match="lie elsewhere") as caught:
        capture_directory(checkpoint)
    assert caught.value.got == "other.safetensors"
