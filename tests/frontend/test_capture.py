"""Directories and modules become graphs that compute what transformers computes; what cannot be captured says why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
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


SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "options", "what", "said"),
    [
        ("ViTForImageClassification", {"image_size": 16, "patch_size": 8}, "takes no token ids", "pixel_values"),
        ("Wav2Vec2ForCTC", {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}, "takes no token ids",
         "input_values"),
        ("CLIPModel", {}, "does not run on token ids alone", "pixel_values"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "cannot be exported", "DataDependent"),
    ],
)  # fmt: skip
def test_models_that_want_something_else_than_tokens(kind, options, what, said):
    import transformers

    model_class = getattr(transformers, kind)
    sizes = {} if kind == "CLIPModel" else SIZES
    if kind == "CLIPModel":
        options = {f"{part}_config": {**SIZES, "projection_dim": 8} for part in ("text", "vision")}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**sizes, **options)).eval()
    with pytest.raises(UnsupportedModelError, match=what) as caught:
        capture_module(model.to_empty(device="cpu"))
    assert said in str(caught.value)
    assert "fake mode" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "kind", "shape"),
    [
        ("llama", "LlamaForSequenceClassification", ("batch", 3)),
        ("gpt2", "GPT2ForSequenceClassification", ("batch", 3)),
        ("bert", "BertForSequenceClassification", ("batch", 3)),
        ("bert", "BertForTokenClassification", ("batch", SEQUENCE, 3)),
    ],
)
def test_classifiers_score_sequences_and_no_vocabulary(family, kind, shape, tmp_path):
    import transformers

    torch.manual_seed(3)
    config = build(family, layers=1, num_labels=3, pad_token_id=0).config
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path)
    graph = canonicalize(capture_directory(tmp_path))
    assert (graph.signature.outputs[0].name, graph.signature.outputs[0].shape) == ("logits", shape)
    assert graph.signature.index_of_output("logits") is None  # which is the role of scores of a vocabulary
    assert graph.signature.index_of_output("scores") == 0
    ids, mask = torch.randint(1, VOCABULARY, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    if family != "bert":
        ids[1, 4:] = 0  # padding, behind which nothing is looked at
    logits = run(graph, **language_inputs(graph, ids, mask))["logits"]
    torch.testing.assert_close(logits, reference(model, ids, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", ["directory", "module", "module that has run"])
def test_frequencies_that_depend_on_the_length(source, tmp_path):
    """Phi-3's long contexts: other frequencies, from one more token than it was first trained with on."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0, 3, 4, 5],
        "short_factor": [1.0, 1.1, 1.2, 2],
    }
    limits = {"original_max_position_embeddings": 16, "max_position_embeddings": 32}
    model = build("phi3", **limits, rope_parameters=rope)
    ids = torch.randint(VOCABULARY, (2, 24))
    if source == "module that has run":
        reference(model, ids, torch.ones_like(ids))
    if source == "directory":
        model.save_pretrained(tmp_path)
    graph = canonicalize(capture_directory(tmp_path) if source == "directory" else capture_module(model))
    assert graph.lost == []
    logits = []
    for length in (12, 16, 17, 24):
        assert_same_logits(graph, model, ids[:, :length], torch.ones(2, length, dtype=torch.int64))
        logits.append(run(graph, **language_inputs(graph, ids[:, :length], torch.ones_like(ids[:, :length])))["logits"])
    torch.testing.assert_close(logits[0], logits[1][:, :12], rtol=1e-5, atol=1e-4)
    assert (logits[1] - logits[2][:, :16]).abs().max() > 0.1


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        capture_module(model)


def test_a_model_in_memory_is_left_as_it_is():
    model = build("llama", layers=1).train().half()
    capture_module(model)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


# --- plain modules ----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.other_name = self.shared
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.other_name(torch.relu(self.shared(x)))))


def test_a_module_called_twice_is_one_site():
    model = Twice()
    graph = canonicalize(capture_module(model, (torch.randn(4, 6),)))
    sites = graph.sites()
    assert [(site.name, len(site.nodes)) for site in sites] == [("shared", 2), ("head", 1)]
    assert sites[0].bias == "shared.bias"
    assert [len(site.inputs) for site in sites] == [2, 1]
    x = torch.randn(7, 6)
    torch.testing.assert_close(run(graph, input_0=x)["output_0"], model(x).detach())


def test_plain_inputs_and_outputs():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)
            self.drop = nn.Dropout(0.5)
            self.offset = torch.tensor([1.0, 2.0, 3.0, 4.0])  # no buffer

        def forward(self, x, index):
            y = self.drop(self.fc(x + self.offset)).half().float()
            y.mul_(2)
            return y[index], y.sum(-1)

    model = Plain().train()
    graph = canonicalize(capture_module(model, (torch.randn(1, 4), torch.tensor([0, 0]))))
    assert model.training
    assert graph.signature.inputs[0].shape == ("batch", 4)
    assert [p.dtype for p in graph.signature.inputs] == ["float32", "int64"]
    assert [p.name for p in graph.signature.outputs] == ["output_0", "output_1"]
    assert operators(graph)["aten.mul_"] == 0
    x, index = torch.randn(5, 4), torch.tensor([4, 1])
    out = run(graph, input_0=x, input_1=index)
    picked, summed = model.eval()(x, index)
    torch.testing.assert_close(out["output_0"], picked.detach())
    torch.testing.assert_close(out["output_1"], summed.detach())


def test_a_plain_module_needs_examples():
    with pytest.raises(InputError, match="example inputs"):
        capture_module(nn.Linear(2, 2))
    with pytest.raises(InputError, match="tuple of tensors"):
        capture_module(nn.Linear(2, 2), ("text",))
    with pytest.raises(InputError, match="tuple of tensors"):
        capture_module(nn.Linear(2, 2), torch.randn(2, 2))
