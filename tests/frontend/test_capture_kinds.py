"""Models of other kinds, and plain modules."""

import pytest
import torch
from torch import nn

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_directory, capture_module
from qcompiler.ir.signature import SEQUENCE
from tests.frontend.test_capture import assert_same_logits, reference
from tests.models import (
    VOCABULARY,
    build,
    language_inputs,
    operators,
    run,
)

pytestmark = pytest.mark.usefixtures("each_traced")

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


@pytest.mark.parametrize(
    "source", ["module that has run", *(pytest.param(name, marks=pytest.mark.slow) for name in ("directory", "module"))]
)
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
