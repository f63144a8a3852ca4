"""Generation: what transformers generates, with and without a cache, within the model's limits."""

import importlib
import json
import shutil
import types

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from qcompiler.artifacts.generation import (
    Sampler,
    decode_stepwise,
    end_tokens,
    generate,
    stream_text,
    stream_tokens,
)
from qcompiler.artifacts.hf import HFArtifact, load_tokenizer
from qcompiler.artifacts.tokenizing import encode_prompt
from qcompiler.errors import ArtifactError, InputError

module = importlib.import_module(
    "qcompiler.artifacts.generation"
)  # the package's attribute of that name is the public function
PROMPT = "It was a dark night"


class Scripted:
    """Logits that make the greedy choice after token ``t`` the token ``t + 1``; no cache."""

    has_cache = False
    path = None

    def __init__(self, vocab_size=10, max_positions=None, value=1.0):
        self.vocab_size, self.max_positions, self.value = vocab_size, max_positions, value
        self.provenance, self.lengths = {}, []

    def forward(self, ids):
        self.lengths.append(ids.shape[1])
        return self.value * torch.nn.functional.one_hot((ids + 1) % self.vocab_size, self.vocab_size).float()


@pytest.fixture(scope="module")
def artifact(booklm):
    return HFArtifact(booklm)


@pytest.fixture(scope="module")
def tokenizer(booklm):
    return load_tokenizer(booklm)


def test_greedy_is_that_of_transformers(booklm, artifact, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(booklm, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    result = generate(artifact, tokenizer, PROMPT, max_new_tokens=24)
    assert list(result.tokens) == expected.tolist()
    assert result.text == tokenizer.decode(expected)
    assert (result.prompt_tokens, result.finish) == (inputs["input_ids"].shape[1], "length")


def test_cache_changes_nothing_but_the_work(artifact, tokenizer, monkeypatch):
    cached = generate(artifact, tokenizer, PROMPT, max_new_tokens=12)
    monkeypatch.setattr(artifact, "has_cache", False)
    monkeypatch.setattr(artifact, "step", None)
    assert generate(artifact, tokenizer, PROMPT, max_new_tokens=12).tokens == cached.tokens


def test_cache_is_used(artifact, monkeypatch):
    lengths = []
    step = artifact.step
    monkeypatch.setattr(artifact, "step", lambda ids, cache: lengths.append(ids.shape[1]) or step(ids, cache))
    list(stream_tokens(artifact, torch.arange(5), max_new_tokens=4))
    assert lengths == [5, 1, 1, 1]  # prefill is the first step


def test_stops_at_an_end_token_and_keeps_it():
    tokens = list(stream_tokens(Scripted(), torch.tensor([2]), max_new_tokens=9, end_tokens={6}))
    assert tokens == [3, 4, 5, 6]


def test_stops_at_the_models_last_position():
    scripted = Scripted(max_positions=5)
    assert list(stream_tokens(scripted, torch.tensor([0, 1]), max_new_tokens=100)) == [2, 3, 4]
    assert max(scripted.lengths) <= 5


def test_finish_says_why(booklm, artifact, monkeypatch):
    tokenizer = load_tokenizer(booklm)
    monkeypatch.setattr(artifact, "max_positions", 9)
    assert generate(artifact, tokenizer, PROMPT, max_new_tokens=20).finish == "positions"
    first = generate(artifact, tokenizer, PROMPT, max_new_tokens=1).tokens[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    ended = generate(artifact, tokenizer, PROMPT, max_new_tokens=3)
    assert (ended.finish, ended.tokens) == ("end", (first,))


def test_empty_prompt_starts_from_bos(artifact, tokenizer):
    assert generate(artifact, tokenizer, "", max_new_tokens=2).prompt_tokens == 1


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([], dtype=torch.int64), "no tokens"),
        (torch.tensor([10]), "outside the vocabulary"),
        (torch.tensor([-1]), "outside the vocabulary"),
        (torch.zeros(8, dtype=torch.int64), "no room"),
    ],
)
def test_prompts_that_cannot_be_continued(ids, match):
    with pytest.raises(InputError, match=match):
        list(stream_tokens(Scripted(max_positions=8), ids))


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match="out of range"):
        Sampler(**options)
    with pytest.raises(InputError, match="max_new_tokens"):
        list(stream_tokens(Scripted(), torch.tensor([0]), max_new_tokens=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    with pytest.raises(ArtifactError, match="not finite"):
        list(stream_tokens(Scripted(value=value), torch.tensor([0])))


def frequencies(sampler, logits, draws=20000):
    chosen = sampler.choose(logits.expand(draws, -1), torch.Generator().manual_seed(0))
    return torch.bincount(chosen, minlength=logits.shape[-1]) / draws


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    for temperature in (1.0, 0.5, 2.0):
        expected = (logits[0] / temperature).softmax(-1)
        assert (frequencies(Sampler(temperature), logits) - expected).abs().max() < 0.015


def test_top_k_and_top_p_and_suppress():
    logits = torch.tensor([[0.5, 0.2, 0.2001, 0.0999]]).log()
    assert (frequencies(Sampler(1.0, top_k=2), logits) > 0).tolist() == [True, False, True, False]
    assert (frequencies(Sampler(1.0, top_p=0.6), logits) > 0).tolist() == [True, False, True, False]
    assert (frequencies(Sampler(1.0, top_p=0.1), logits) > 0).tolist() == [True, False, False, False]
    assert (frequencies(Sampler(1.0, suppress=(0, 3)), logits) > 0).tolist() == [False, True, True, False]
    assert Sampler(suppress=(0,)).choose(logits, torch.Generator()).tolist() == [2]
    kept = frequencies(Sampler(1.0, top_k=2), logits)
    assert abs(float(kept[0]) - 0.5 / 0.7001) < 0.015


def test_seed_decides(artifact, tokenizer):
    first, again, other = (
        generate(artifact, tokenizer, PROMPT, max_new_tokens=8, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_streamed_text_is_the_text(artifact, tokenizer):
    pieces = list(stream_text(artifact, tokenizer, PROMPT, max_new_tokens=16))
    assert len(pieces) > 8
    assert "".join(pieces) == generate(artifact, tokenizer, PROMPT, max_new_tokens=16).text


def test_streamed_text_does_not_split_characters(tokenizer, monkeypatch):
    ids = tokenizer("café ☂ naïve", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(module, "stream_tokens", lambda *a, **k: iter(ids))
    pieces = list(stream_text(Scripted(vocab_size=4096), tokenizer, "a"))
    assert "".join(pieces) == "café ☂ naïve"
    assert not any("�" in piece for piece in pieces)


def test_batches_decode_row_by_row(artifact):
    ids = torch.randint(4096, (3, 6))
    together = torch.stack(list(decode_stepwise(artifact, ids, 5, Sampler(), 0)), dim=1)
    alone = [torch.stack(list(decode_stepwise(artifact, row[None], 5, Sampler(), 0)), dim=1)[0] for row in ids]
    assert torch.equal(together, torch.stack(alone))


def at(path, config=None):
    return types.SimpleNamespace(path=path, provenance={"config": config})


def test_end_tokens_come_from_the_directory_and_the_tokenizer(booklm, tokenizer, tmp_path):
    assert end_tokens(at(None), tokenizer) == {1}
    file = tmp_path / "generation_config.json"
    shutil.copy(booklm / file.name, file)
    assert end_tokens(at(tmp_path), tokenizer) == {1}
    file.write_text(json.dumps({"eos_token_id": [7, 9]}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert end_tokens(at(tmp_path), tokenizer) == {1, 7, 9}


@pytest.mark.parametrize("generation", [None, "{}", '{"eos_token_id": null}'])
@pytest.mark.parametrize(
    "config", [{"eos_token_id": [7, 9]}, {"text_config": {"eos_token_id": [7, 9]}}, {"llm_config": {"eos_token_id": 7}}]
)
def test_end_tokens_that_only_the_configuration_has(tokenizer, tmp_path, generation, config):
    expected = {1, 7} if "llm_config" in config else {1, 7, 9}
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(generation)
    assert end_tokens(at(tmp_path, config), tokenizer) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_tokens(at(tmp_path), tokenizer) == expected


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_of_broken_files(tokenizer, tmp_path, name):
    for broken in ("{", "[]", "[" * 100_000):
        (tmp_path / name).write_text(broken)
        with pytest.raises(InputError, match="not a JSON object"):
            end_tokens(at(tmp_path), tokenizer)
    (tmp_path / name).write_text('{"eos_token_id": "end"}')
    with pytest.raises(InputError, match="no token ids"):
        end_tokens(at(tmp_path), tokenizer)


def test_special_tokens_of_a_prompt_are_special(artifact, tokenizer):
    assert generate(artifact, tokenizer, "<|bos|>It was", max_new_tokens=1).prompt_tokens == 3


def test_a_spelled_opening_is_not_doubled(booklm):
    opened = load_tokenizer(booklm)
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    assert encode_prompt(opened, "It was").tolist() == encode_prompt(opened, "<|bos|>It was").tolist()
    assert encode_prompt(opened, "It was").tolist()[0] == 0
