"""Evaluation against a plain loop over transformers' own results, and on distributions known in closed form."""

import dataclasses
import importlib
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from qcompiler.artifacts.evaluation import evaluate
from qcompiler.artifacts.hf import HFArtifact, load_tokenizer
from qcompiler.artifacts.tokenizing import encode
from qcompiler.errors import ArtifactError, InputError

module = importlib.import_module(
    "qcompiler.artifacts.evaluation"
)  # the package's attribute of that name is the public function


@dataclasses.dataclass
class Table:
    """A bigram model: the logits after token ``t`` are row ``t`` of a table; the cache counts tokens."""

    table: torch.Tensor
    max_positions: int | None = 8
    has_cache: bool = True
    path: None = None
    provenance: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)

    @property
    def vocab_size(self):
        return self.table.shape[1]

    def forward(self, ids):
        self.calls.append(("forward", ids.shape))
        return self.table[ids]

    def prefill(self, ids):
        self.calls.append(("prefill", ids.shape))
        return self.table[ids], ids.shape[1]

    def step(self, ids, cache):
        self.calls.append(("step", ids.shape))
        return self.table[ids], cache + ids.shape[1]

    def stored_bytes(self):
        return 100

    def bits_per_weight(self):
        return 4.5


@pytest.fixture(scope="module")
def artifact(booklm):
    return HFArtifact(booklm)


@pytest.fixture(scope="module")
def prose(pytestconfig):
    return (pytestconfig.rootpath / "LICENSE").read_text() * 3


@pytest.fixture(scope="module")
def coarse(booklm):
    """The same model with its weights rounded to steps of a sixteenth of their largest: surely different."""
    other = HFArtifact(booklm)
    with torch.no_grad():
        for parameter in other._model.parameters():
            step = parameter.abs().max() / 16
            parameter.copy_((parameter / step).round() * step)
    return other


def test_perplexity_is_that_of_a_plain_loop(booklm, artifact, coarse, prose):
    """Perplexity, KL and agreement: one window at a time, in float64, from transformers' own logits."""
    model = AutoModelForCausalLM.from_pretrained(booklm, dtype=torch.float32)
    ids = encode(load_tokenizer(booklm), prose)
    nll, divergence, same, count = 0.0, 0.0, 0, 0
    for start in range(0, len(ids) - 511, 512):
        window = ids[start : start + 512]
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
            log_q = coarse._model(window[None]).logits[0].double().log_softmax(-1)
        for position in range(511):
            nll -= float(log_p[position, window[position + 1]])
            divergence += float((log_p[position].exp() * (log_p[position] - log_q[position])).sum())
            same += int(log_p[position].argmax() == log_q[position].argmax())
            count += 1
    result = evaluate(coarse, text=prose, against=artifact)
    assert result.tokens == count >= 3 * 511
    assert result.reference_perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result.kl_divergence == pytest.approx(divergence / count, rel=1e-4)
    assert result.kl_divergence > 0.01
    assert result.top1_agreement == same / count < 1
    assert result.perplexity != pytest.approx(result.reference_perplexity, rel=1e-3)


def test_a_model_equals_itself(artifact, prose):
    result = evaluate(artifact, text=prose, against=artifact, max_tokens=1024)
    assert result.kl_divergence == 0
    assert result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity
    assert result.tokens == 2 * 511
    assert (result.bytes, result.bits_per_weight) == (artifact.stored_bytes(), 16.0)


def test_cached_equals_uncached(artifact, prose):
    ids = encode(load_tokenizer(artifact.path), prose)[:256].view(2, 128)
    cached = evaluate(artifact, tokens=ids, against=artifact, cached=True)
    assert cached.tokens == 2 * 127
    assert cached.kl_divergence < 1e-7
    assert cached.perplexity == pytest.approx(evaluate(artifact, tokens=ids).perplexity, rel=1e-5)


def test_cached_prefills_half_a_window_and_steps_through_the_rest():
    table = Table(torch.randn(5, 5))
    evaluate(table, tokens=torch.randint(5, (2, 8)), cached=True)
    assert table.calls == [("prefill", (2, 4)), *[("step", (2, 1))] * 3]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_every_position_but_the_first_is_scored(cached, length):
    """Each bigram of a window counts once; bigrams across a boundary do not."""
    table = torch.randn(6, 6)
    windows = torch.randint(6, (4, length))
    loss = torch.nn.functional.cross_entropy(table[windows[:, :-1]].flatten(0, 1), windows[:, 1:].flatten())
    result = evaluate(Table(table), tokens=windows, cached=cached)
    assert result.tokens == 4 * (length - 1)
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_windows_are_adjacent_and_the_tail_is_dropped():
    table = Table(torch.randn(9, 9), max_positions=8)
    stream = torch.randint(9, (8 * 3 + 5,))
    whole = evaluate(table, tokens=stream)
    assert whole.tokens == 3 * 7
    assert whole.perplexity == evaluate(table, tokens=stream[:24].view(3, 8)).perplexity


def test_window_is_512_where_the_model_takes_more():
    table = Table(torch.randn(3, 3), max_positions=None)
    assert evaluate(table, tokens=torch.randint(3, (1300,))).tokens == 2 * 511
    narrow = Table(torch.randn(3, 3), max_positions=100)
    assert evaluate(table, tokens=torch.randint(3, (1300,)), against=narrow).tokens == 13 * 99


def test_divergence_is_from_the_original_to_the_artifact():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    original, other = Table(p.log().expand(3, 3)), Table(q.log().expand(3, 3) + 5.0)
    result = evaluate(other, tokens=torch.randint(3, (16,)), against=original)
    assert result.kl_divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert result.top1_agreement == 0


@pytest.mark.parametrize("cached", [False, True])
def test_chunks_and_batches_change_nothing(monkeypatch, cached):
    original, other = Table(torch.randn(7, 7)), Table(torch.randn(7, 7))
    windows = torch.randint(7, (11, 8))
    at_once = evaluate(other, tokens=windows, against=original, cached=cached)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 3 * 8 * 7)
    monkeypatch.setattr(module, "_LOGITS_PER_CHUNK", 5 * 7)
    seen = []
    in_parts = evaluate(
        other, tokens=windows, against=original, cached=cached, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(3, 11), (6, 11), (9, 11), (11, 11)]
    for name in ("perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "tokens"):
        assert getattr(in_parts, name) == pytest.approx(getattr(at_once, name), rel=1e-6)


def test_absent_values_are_null():
    fields = evaluate(Table(torch.randn(3, 3)), tokens=torch.randint(3, (16,))).to_dict()
    assert list(fields) == [
        "perplexity",
        "reference_perplexity",
        "kl_divergence",
        "top1_agreement",
        "tokens",
        "bytes",
        "bits_per_weight",
        "seconds",
        "cache_bytes_per_token",
        "cached",
        "notes",
    ]
    assert [name for name, value in fields.items() if value is None] == [*list(fields)[1:4], "cache_bytes_per_token"]
    assert json.loads(json.dumps(fields)) == fields


def test_hopeless_model_still_gives_a_number():
    table = torch.full((2, 2), 0.0)
    table[:, 0] = 1e4
    result = evaluate(Table(table), tokens=torch.ones(16, dtype=torch.int64))
    assert math.isfinite(result.perplexity)
    assert result.perplexity > 1e300


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(bad):
    table = torch.randn(4, 4)
    table[2, 1] = bad
    with pytest.raises(ArtifactError, match="not finite"):
        evaluate(Table(table), tokens=torch.arange(4).repeat(4))


def test_text_shorter_than_a_window(artifact):
    with pytest.raises(InputError, match="shorter than one window"):
        evaluate(artifact, text="It was a dark night.")
    with pytest.raises(InputError, match="shorter than one window") as caught:
        evaluate(Table(torch.randn(3, 3)), tokens=torch.randint(3, (100,)), max_tokens=7)
    assert "max_tokens=7" in caught.value.got


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_no_window(shape):
    with pytest.raises(InputError, match="no window"):
        evaluate(Table(torch.randn(3, 3)), tokens=torch.zeros(shape, dtype=torch.int64))


def test_windows_longer_than_the_model_takes():
    with pytest.raises(InputError, match="longer than the model takes"):
        evaluate(Table(torch.randn(3, 3)), tokens=torch.zeros(2, 9, dtype=torch.int64))


def test_vocabularies_must_agree(artifact):
    with pytest.raises(InputError, match="different vocabularies"):
        evaluate(Table(torch.randn(3, 3)), tokens=torch.randint(3, (16,)), against=artifact)
    with pytest.raises(InputError, match="outside the vocabulary"):
        evaluate(Table(torch.randn(3, 3)), tokens=torch.full((16,), 3))


def test_logits_of_another_width_than_declared():
    class Wide(Table):
        @property
        def vocab_size(self):
            return 3

    with pytest.raises(InputError, match="different shapes"):
        evaluate(Wide(torch.randn(3, 4)), tokens=torch.randint(3, (16,)), against=Table(torch.randn(3, 3)))


def test_cached_needs_a_cache():
    with pytest.raises(InputError, match="no cache"):
        evaluate(Table(torch.randn(3, 3), has_cache=False), tokens=torch.randint(3, (16,)), cached=True)


def test_a_quantized_cache_is_what_is_measured():
    table = Table(torch.randn(5, 5))
    table.has_quantized_cache, table.cache_bytes_per_token = True, 12
    result = evaluate(table, tokens=torch.randint(5, (2, 8)))
    assert table.calls == [("prefill", (2, 4)), *[("step", (2, 1))] * 3]
    assert result.cached
    assert result.to_dict()["cache_bytes_per_token"] == 12
    with pytest.raises(InputError, match="decoding with it"):
        evaluate(table, tokens=torch.randint(5, (2, 8)), cached=False)
    plain = evaluate(Table(torch.randn(5, 5)), tokens=torch.randint(5, (2, 8)))
    assert not plain.cached
    assert plain.to_dict()["cache_bytes_per_token"] is None


def test_the_cache_of_the_original_is_counted(artifact):
    assert artifact.cache_bytes_per_token == 8 * 2 * 2 * 64 * 4  # layers, parts, heads, channels, bytes


def test_text_or_tokens(artifact):
    for given in ({}, {"text": "a", "tokens": torch.zeros(8, dtype=torch.int64)}):
        with pytest.raises(InputError, match="text or tokens"):
            evaluate(artifact, **given)


def test_tokenizer_comes_from_the_artifact_or_the_original(artifact, prose):
    with pytest.raises(InputError, match="needs a tokenizer"):
        evaluate(Table(torch.randn(4096, 4096)), text=prose)
    bare = Table(torch.randn(4096, 4096), max_positions=512)
    assert evaluate(bare, text=prose, against=artifact, max_tokens=512).tokens == 511


def test_every_window_begins_with_the_opening_which_is_not_scored(booklm, artifact, prose):
    """BOS and 511 tokens of the text in each window; each of these is scored once."""
    tokenizer = load_tokenizer(booklm)
    ids = encode(tokenizer, prose)
    template = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    loss, count = 0.0, 0
    for start in range(0, len(ids) - 510, 511):
        window = torch.cat([torch.tensor([0]), ids[start : start + 511]])
        log_p = artifact.forward(window[None])[0].double().log_softmax(-1)
        loss -= float(log_p[:-1].gather(-1, window[1:, None]).sum())
        count += 511
    result = evaluate(artifact, text=prose, tokenizer=tokenizer)
    assert result.tokens == count
    assert result.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)
    spelled = evaluate(artifact, text=prose + "<|bos|>" * 600, tokenizer=tokenizer)
    assert spelled.tokens > count


@pytest.mark.parametrize("cached", [False, True])
def test_openings_inside_a_window_are_not_scored(cached):
    table = torch.randn(9, 9)
    ids = torch.tensor([7, 8, 0, 1, 2, 7, 8, 3, 4, 5, 0, 1, 2, 7])
    is_text = module._is_text(ids[None], (7, 8))
    assert is_text[0].tolist() == [i not in (0, 1, 5, 6) for i in range(14)]
    logits, targets = table[ids[None, :-1]], ids[None, 1:]
    scores = module.Scores()
    parts = (slice(0, 6), slice(6, 13)) if cached else (slice(0, 13),)
    for part in parts:
        scores.add(logits[:, part], logits[:, part], targets[:, part], is_text[:, 1:][:, part], where=None)
    kept = is_text[0, 1:]
    loss = torch.nn.functional.cross_entropy(logits[0][kept], targets[0][kept])
    assert scores.tokens == 10
    assert scores.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert scores.kl_divergence == 0
