"""The original model and its tokenizer: loaded as they are, or refused with the reason."""

import json
import logging
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import qcompiler as qc
from qcompiler.artifacts.hf import (
    HFArtifact,
    _parameter_count,
    companion_losses,
    load_tokenizer,
    read_limits,
)
from qcompiler.artifacts.tokenizing import encode
from qcompiler.errors import InputError, QCompilerError, UnsupportedModelError, WeightError
from qcompiler.passes import RTN

_TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


@pytest.fixture
def tiny(tmp_path):
    """A float32 Llama of 50 tokens and 32 positions, untied."""
    LlamaForCausalLM(LlamaConfig(**_TINY, num_key_value_heads=1)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_logits_are_those_of_transformers_in_float32(booklm):
    artifact = HFArtifact(booklm)
    model = AutoModelForCausalLM.from_pretrained(booklm, dtype=torch.float32)
    ids = torch.randint(4096, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(artifact.forward(ids), expected, atol=0, rtol=0)


def test_describes_the_model(booklm):
    artifact = HFArtifact(booklm)
    assert (artifact.vocab_size, artifact.max_positions, artifact.has_cache) == (4096, 1024, True)
    assert artifact.path == booklm
    assert artifact.provenance["config"]["model_type"] == "llama"


def test_tied_weights_count_once(booklm):
    artifact = HFArtifact(booklm)
    stored = sum(t.nbytes for t in load_file(booklm / "model.safetensors").values())
    assert artifact.stored_bytes() == stored
    assert artifact.bits_per_weight() == 16.0


def test_loading_says_nothing(booklm, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        HFArtifact(booklm)
        encode(load_tokenizer(booklm), "word " * 3000)
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.records) == ("", "", [])


def test_read_limits_reads_no_weight(tiny):
    (tiny / "model.safetensors").unlink()
    assert read_limits(tiny) == (50, 32)


@pytest.mark.parametrize("method", [[], "modelopt", "some-new-format", None])
def test_quantization_that_transformers_would_ignore_is_refused(tiny, method):
    edit_config(tiny, quantization_config={"quant_method": method, "quant_algo": "FP8"})
    with pytest.raises(UnsupportedModelError, match="read as plain weights"):
        HFArtifact(tiny)


def test_quantization_in_a_file_of_its_own_is_refused(tiny):
    (tiny / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UnsupportedModelError, match="hf_quant_config"):
        HFArtifact(tiny)


def test_undeclared_codes_are_refused(tiny):
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="stored as codes") as caught:
        HFArtifact(tiny)
    assert name in str(caught.value)


def test_quantization_config_must_be_an_object(tiny):
    edit_config(tiny, quantization_config="modelopt")
    with pytest.raises(InputError, match="not an object"):
        HFArtifact(tiny)


def test_missing_parameter_is_not_made_up(tiny):
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=r"o_proj\.weight"):
        HFArtifact(tiny)


def test_model_without_its_head_is_refused(tmp_path):
    LlamaModel(LlamaConfig(**_TINY)).save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        HFArtifact(tmp_path)


def test_weights_of_another_shape_are_refused(tiny):
    edit_config(tiny, intermediate_size=64)
    with pytest.raises(WeightError, match="does not fit config") as caught:
        HFArtifact(tiny)
    assert "mlp" in caught.value.where


def test_truncated_weights_are_refused(tiny):
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightError):
        HFArtifact(tiny)


def test_pickled_weights_are_not_loaded(tiny):
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    with pytest.raises(QCompilerError):
        HFArtifact(tiny)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "not valid JSON"), ('{"model_type": "nosuch"}', "does not describe a model"), ("[]", "does not describe")],
)
def test_broken_config(tiny, text, match):
    (tiny / "config.json").write_text(text)
    with pytest.raises(InputError, match=match):
        HFArtifact(tiny)


def test_the_language_model_of_a_model_of_more(tmp_path):
    """Sizes, limits and bits are those of what runs; its vision tower counts for nothing."""
    sizes = {**_TINY, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2}
    text = {**sizes, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 5}
    seen = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen |= {"image_size": 16, "patch_size": 8}
    seen |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=seen))
    model.save_pretrained(tmp_path)
    artifact = HFArtifact(tmp_path)
    assert (artifact.vocab_size, artifact.max_positions) == (50, 32)
    assert read_limits(tmp_path) == (50, 32)
    assert artifact.bits_per_weight() == pytest.approx(32, rel=1e-3)
    stored = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert artifact.stored_bytes() < 0.9 * stored
    counted = _parameter_count(artifact._model, {"quantization_config": {}, "text_config": text}, False)
    assert counted == sum(p.numel() for p in artifact._model.parameters())


def test_missing_directory_and_config(tmp_path):
    with pytest.raises(InputError, match="no such"):
        HFArtifact(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json"):
        HFArtifact(tmp_path)


def test_encoder_is_refused(tmp_path):
    BertForMaskedLM(BertConfig(**_TINY)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a causal language model"):
        HFArtifact(tmp_path)


def test_encoder_decoder_is_refused(tmp_path):
    config = T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has an encoder"):
        HFArtifact(tmp_path)


def test_model_of_something_else_is_refused(tmp_path):
    sizes = {name: _TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a causal language model"):
        HFArtifact(tmp_path)


def test_tokenizer_of_the_model(booklm):
    tokenizer = load_tokenizer(booklm, vocab_size=4096)
    text = "It was a dark night; the wind blew."
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids.tolist()) == text


def test_tokenizer_of_another_vocabulary_is_refused(booklm):
    with pytest.raises(InputError, match="does not fit the model") as caught:
        load_tokenizer(booklm, vocab_size=4095)
    assert "4095" in caught.value.got
    assert load_tokenizer(booklm, vocab_size=5000) is not None


OWN_TOKENIZER = """
import json
from pathlib import Path
from transformers import PythonBackend
from .{helper} import split

class OwnTokenizer(PythonBackend):
    vocab_files_names = {{"vocab_file": "own.words"}}

    def __init__(self, vocab_file, **options):
        self.words = json.loads(Path(vocab_file).read_text())
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {{word: i for i, word in enumerate(self.words)}}

    def _tokenize(self, text):
        return split(text)

    def _convert_token_to_id(self, token):
        return self.words.index(token)

    def _convert_id_to_token(self, index):
        return self.words[index]
"""


@pytest.fixture
def own_tokenizer(tiny):
    """A model whose tokenizer is code in the directory, with a helper and a vocabulary of its own."""
    (tiny / "tokenization_own.py").write_text(OWN_TOKENIZER.format(helper="own_split"))
    (tiny / "own_split.py").write_text("def split(text):\n    return text.split()\n")
    (tiny / "own.words").write_text(json.dumps(["a", "b", "c", *(f"word{i}" for i in range(47))]))
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    return tiny


def test_a_tokenizer_of_its_own_travels(own_tokenizer, tmp_path):
    assert companion_losses(own_tokenizer, trust_remote_code=True) == []
    result = qc.compile(own_tokenizer, [RTN(bits=4)], trust_remote_code=True, strict=True)
    result.save(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("c a b")["input_ids"] == [2, 0, 1]
    with pytest.raises(InputError, match="tokenizer"):
        qc.generate(tmp_path / "out", "c a b", max_new_tokens=1)
    ids = qc.generate(tmp_path / "out", "c a b", max_new_tokens=1, trust_remote_code=True)
    assert ids.prompt_tokens == 3


def test_a_tokenizer_that_does_not_travel_is_said_before_anything_is_compiled(own_tokenizer):
    text = (own_tokenizer / "tokenization_own.py").read_text()
    hidden = text.replace('"own.words"', '"own" + ".words"')  # no name of a file stands there any more
    assert hidden != text
    (own_tokenizer / "tokenization_own.py").write_text(hidden)
    losses = companion_losses(own_tokenizer, trust_remote_code=True)
    assert losses[0] == "files of the source that are not copied: own.words"
    assert losses[1].startswith("the tokenizer does not load from the files that are copied")
    with pytest.raises(InputError, match="would be lost"):
        qc.compile(own_tokenizer, [RTN(bits=4)], trust_remote_code=True, strict=True)
    assert qc.compile(own_tokenizer, [RTN(bits=4)], trust_remote_code=True).report.notes[:2] == losses


def test_code_is_not_run_unasked(own_tokenizer):
    (own_tokenizer / "own_split.py").write_text("raise SystemExit('run')\n")
    (loss,) = companion_losses(own_tokenizer)
    assert "trust_remote_code" in loss


def test_nothing_is_lost_of_the_shipped_model(booklm):
    assert companion_losses(booklm) == []


def test_missing_and_broken_tokenizer(tiny, booklm):
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(tiny)
    with pytest.raises(InputError, match="no such model directory"):
        load_tokenizer(tiny / "nowhere")
    shutil.copy(booklm / "tokenizer_config.json", tiny)
    (tiny / "tokenizer.json").write_text((booklm / "tokenizer.json").read_text()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tiny)


def test_a_tokenizer_that_only_fails_in_use(booklm, tmp_path):
    shutil.copy(booklm / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": [], "tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_whatever_transformers_raises_is_typed(tiny, monkeypatch):
    def fail(*arguments, **options):
        raise AttributeError("'list' object has no attribute 'endswith'")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(UnsupportedModelError, match="cannot load this model"):
        HFArtifact(tiny)


def test_a_configuration_of_any_size_is_refused_before_memory_is_taken(tiny, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("transformers would take memory for all of it")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    config = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": 1 << 40}
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match="much larger"):
        HFArtifact(tiny)


def test_probe_notices_an_earlier_logit_that_moves(tiny):
    """The check itself: a model that leaks the last token backwards is caught whatever its class."""
    artifact = HFArtifact(tiny)
    honest = artifact._model

    def leaking(input_ids, **options):
        output = honest(input_ids=input_ids, **options)
        logits = output.logits + 0.01 * input_ids[:, -1:, None]
        return types.SimpleNamespace(logits=logits, past_key_values=output.past_key_values)

    assert artifact._probe() is True
    artifact._model = leaking
    with pytest.raises(InputError, match="not a causal"):
        artifact._probe()
