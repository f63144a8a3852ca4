"""Calibration tokens: drawn from text, given, or generated."""

import hashlib
import itertools
import logging
import struct

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.hf import HFArtifact, load_tokenizer
from qcompiler.artifacts.tokenizing import encode
from qcompiler.errors import CalibrationError, InputError

STREAM = torch.arange(1000)


@pytest.fixture(scope="module")
def prose(pytestconfig):
    return (pytestconfig.rootpath / "LICENSE").read_text() * 4


def starts(ids):
    """Where windows of STREAM start; also proves that each is contiguous."""
    assert torch.equal(ids, ids[:, :1] + torch.arange(ids.shape[1]))
    return ids[:, 0].tolist()


def test_windows_do_not_overlap_and_depend_on_the_seed():
    bound = [Calibration.from_tokens(STREAM, samples=5, length=96, seed=seed).bind() for seed in (0, 0, 1)]
    first = sorted(starts(bound[0].ids))
    assert bound[0].ids.shape == (5, 96)
    assert bound[0].ids.dtype == torch.int64
    assert all(b - a >= 96 for a, b in itertools.pairwise(first))
    assert torch.equal(bound[0].ids, bound[1].ids)
    assert sorted(starts(bound[2].ids)) != first
    assert bound[0].notes == ()


def test_windows_reach_both_ends_of_the_stream():
    seen = torch.cat([Calibration.from_tokens(STREAM, 10, 96, seed).bind().ids.flatten() for seed in range(60)])
    assert int(seen.min()) < 5
    assert int(seen.max()) > 995


def test_fewer_windows_than_asked_for_are_noted(caplog):
    with caplog.at_level(logging.WARNING):
        bound = Calibration.from_tokens(STREAM, samples=64, length=300).bind()
    assert bound.ids.shape == (3, 300)
    assert "holds 3 windows of 300 tokens, not 64" in bound.notes[0]
    assert bound.notes[0] in caplog.text


def test_stream_shorter_than_a_window():
    with pytest.raises(CalibrationError, match="shorter than one window"):
        Calibration.from_tokens(STREAM, length=1001).bind()
    assert Calibration.from_tokens(STREAM, length=1000).bind().ids.shape == (1, 1000)


def test_text_is_tokenized_by_the_model(booklm, prose):
    calibration = Calibration.from_text(prose, samples=3, length=100, seed=7)
    bound = calibration.bind(booklm)
    stream = encode(load_tokenizer(booklm), prose)
    expected = Calibration.from_tokens(stream, samples=3, length=100, seed=7).bind()
    assert bound.source == "text"
    assert torch.equal(bound.ids, expected.ids)
    assert torch.equal(calibration.bind(tokenizer=load_tokenizer(booklm)).ids, bound.ids)


def test_text_from_a_file(booklm, prose, tmp_path):
    file = tmp_path / "corpus"
    file.write_text(prose)
    for given in (file, str(file)):
        assert torch.equal(
            Calibration.from_text(given, 2, 64).bind(booklm).ids, Calibration.from_text(prose, 2, 64).bind(booklm).ids
        )


def test_text_without_a_tokenizer(prose):
    with pytest.raises(InputError, match="needs a tokenizer"):
        Calibration.from_text(prose).bind()


def test_short_text(booklm):
    with pytest.raises(CalibrationError, match="shorter than one window"):
        Calibration.from_text("It was a dark night.").bind(booklm)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": 0}, {"samples": -1}])
def test_nothing_asked_for(options):
    for make in (Calibration.self_generated, lambda **o: Calibration.from_text("some text", **o)):
        with pytest.raises(CalibrationError, match="must be positive"):
            make(**options)
    for tokens in (STREAM, [[1, 2], [3, 4]]):
        with pytest.raises(CalibrationError, match="must be positive"):
            Calibration.from_tokens(tokens, **options)


ROWS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    "tokens",
    [
        ROWS,
        ROWS.to(torch.int32),
        ROWS.tolist(),
        ROWS.numpy(),
        iter(list(ROWS)),
        (row[None] for row in ROWS),
        [{"input_ids": ROWS[:2]}, {"input_ids": ROWS[2:]}],
    ],
    ids=["tensor", "int32", "lists", "numpy", "iterator", "batches", "mappings"],
)
def test_rows_are_used_as_they_are(tokens):
    bound = Calibration.from_tokens(tokens).bind(vocab_size=12, max_positions=4)
    assert torch.equal(bound.ids, ROWS)
    assert bound.ids.dtype == torch.int64


def test_iterator_is_read_no_further_than_needed():
    rows = iter([[i, i + 1] for i in range(9)])
    assert Calibration.from_tokens(rows, samples=3).bind().ids.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert next(rows) == [3, 4]


def test_samples_take_the_first_rows():
    assert torch.equal(Calibration.from_tokens(ROWS, samples=2).bind().ids, ROWS[:2])


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([], "no calibration tokens"),
        (torch.empty(0, 4, dtype=torch.int64), "no calibration tokens"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), "no calibration tokens"),
        ([[1.5, 2.5]], "not integers"),
        (torch.zeros(2, 2), "not integers"),
        (["a", "b"], "not integers"),
    ],
)
def test_tokens_that_cannot_be_used(tokens, match):
    with pytest.raises(CalibrationError, match=match):
        Calibration.from_tokens(tokens)


def test_rows_of_another_length_than_asked_for():
    with pytest.raises(CalibrationError, match="length asked for"):
        Calibration.from_tokens(ROWS, length=5)


@pytest.mark.parametrize("tokens", [[[0, 4096]], [[-1, 0]]])
def test_tokens_outside_the_vocabulary(booklm, tokens):
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        Calibration.from_tokens(tokens).bind(booklm)


def test_windows_longer_than_the_model_takes(booklm, prose):
    for calibration in (
        Calibration.from_text(prose, length=1025),
        Calibration.from_tokens(torch.zeros(1, 1025, dtype=torch.int64)),
        Calibration.self_generated(length=1025),
    ):
        with pytest.raises(CalibrationError, match="longer than the model takes"):
            calibration.bind(booklm)


def test_self_generated_is_the_models_own_text(booklm, caplog):
    original = HFArtifact(booklm)
    with caplog.at_level(logging.WARNING):
        bound = Calibration.self_generated(samples=20, length=24, seed=3).bind(booklm)
    assert bound.ids.shape == (20, 24)
    assert bound.ids[:, 0].tolist() == [0] * 20
    assert not set(bound.ids[:, 1:].flatten().tolist()) & {0, 1, 2}
    assert "generated itself" in bound.notes[0]
    assert bound.notes[0] in caplog.text
    assert len({tuple(row) for row in bound.ids.tolist()}) == 20
    log_p = original.forward(bound.ids)[:, :-1].log_softmax(-1)
    likelihood = log_p.gather(-1, bound.ids[:, 1:, None]).mean()
    # At temperature 1 the mean surprise of a sample is the entropy of what it was sampled from.
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert abs(float(likelihood + entropy)) < 0.25
    assert float(entropy) < 6  # of uniform tokens: 8.3


class Ending:
    """A model of 12 tokens without a cache that nearly always wants to end the text."""

    vocab_size, max_positions, has_cache, path = 12, None, False, None

    def __init__(self, **config):
        self.provenance = {"config": config}

    def forward(self, ids):
        return torch.zeros(*ids.shape, 12).index_fill(-1, torch.tensor([1, 2]), 20.0)


def test_special_tokens_are_not_generated():
    ids = Calibration.self_generated(8, 20).bind(artifact=Ending(bos_token_id=0, eos_token_id=1, pad_token_id=2)).ids
    assert ids[:, 0].tolist() == [0] * 8
    assert set(ids[:, 1:].flatten().tolist()) == set(range(3, 12))


def test_without_bos_the_end_token_opens_a_sequence():
    assert Calibration.self_generated(8, 4).bind(artifact=Ending(eos_token_id=1)).ids[:, 0].tolist() == [1] * 8


def test_without_either_sequences_start_at_random():
    bound = Calibration.self_generated(40, 2).bind(artifact=Ending())
    assert len(set(bound.ids[:, 0].tolist())) > 6
    assert "random token" in bound.notes[1]


def test_self_generated_depends_on_the_seed_alone(booklm):
    artifact = HFArtifact(booklm)
    first, again, other = (
        Calibration.self_generated(3, 10, seed).bind(booklm, artifact=artifact).ids for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_self_generation_needs_a_model():
    with pytest.raises(InputError, match="needs the model"):
        Calibration.self_generated().bind()


def test_report_fields():
    fields = Calibration.from_tokens(ROWS).bind().to_dict()
    assert fields == {
        "source": "tokens",
        "samples": 3,
        "length": 4,
        "sha256": hashlib.sha256(struct.pack("<12q", *range(12))).hexdigest(),
        "notes": [],
    }


@pytest.fixture(scope="module")
def opened(booklm):
    """The shipped tokenizer as one that opens every text by BOS."""
    tokenizer = load_tokenizer(booklm)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return tokenizer


def test_every_window_begins_as_a_text_does(opened, booklm, prose):
    bound = Calibration.from_text(prose, samples=20, length=50).bind(tokenizer=opened, hold_out=4)
    assert bound.held_out is not None
    windows = torch.cat([bound.ids, bound.held_out])
    assert windows[:, 0].tolist() == [0] * 24
    assert not (windows[:, 1:] == 0).any()
    text = opened.decode(encode(load_tokenizer(booklm), prose).tolist())
    for row in windows.tolist():
        assert opened.decode(row[1:]).strip("\ufffd") in text
    assert len({tuple(row) for row in windows.tolist()}) == 24


def test_each_of_several_texts_begins_with_the_opening_once(opened, prose):
    texts = ["", *(prose[start : start + 300] for start in range(0, len(prose), 300)), " ", "\n"]
    windows = Calibration.from_text(texts, samples=1000, length=40).bind(tokenizer=opened).ids
    assert (windows[:, 0] == 0).all()
    assert not (windows[:, 1] == 0).any()
    assert 8 < (windows[:, 2:] == 0).sum() < len(texts)


def test_special_tokens_spelled_in_a_text(opened, prose):
    spelled = prose.replace("the", "<|eos|>")
    windows = Calibration.from_text(spelled, samples=20, length=50).bind(tokenizer=opened).ids
    assert not (windows[:, 1:] < 3).any()


def test_a_text_that_is_too_short_to_tell_anything(booklm):
    for text, length in (("It was a dark night.", 4), ("the sea " * 30, 16)):
        with pytest.raises(CalibrationError, match="too short to tell anything") as caught:
            Calibration.from_text(text, length=length).bind(booklm)
        assert "128" in caught.value.expected
    assert Calibration.from_text("the sea " * 70, length=4).bind(booklm).tokens >= 128


def test_a_window_of_nothing_but_the_opening(opened, prose):
    with pytest.raises(CalibrationError, match="nothing but what opens"):
        Calibration.from_text(prose, length=1).bind(tokenizer=opened)


@pytest.mark.parametrize(("slots", "samples", "calibrated", "held"), [(8, 64, 7, 1), (7, 64, 7, 0), (8, 8, 7, 1)])
def test_a_short_text_is_shared(slots, samples, calibrated, held):
    stream = torch.arange(slots * 10)
    bound = Calibration.from_tokens(stream, samples, 10).bind(hold_out=4)
    assert len(bound.ids) == calibrated
    assert (0 if bound.held_out is None else len(bound.held_out)) == held
    seen = torch.cat([bound.ids, *([] if bound.held_out is None else [bound.held_out])])
    assert seen.flatten().sort().values.tolist() == stream.tolist()
    assert bool(bound.notes) is (slots < samples or held == 1)
    assert ("kept apart" in "".join(bound.notes)) is (held == 1)
    assert len(Calibration.from_tokens(stream, samples, 10).bind().ids) == slots


def test_self_generated_texts_begin_as_the_models_do(opened, booklm):
    bound = Calibration.self_generated(3, 6).bind(tokenizer=opened, artifact=HFArtifact(booklm))
    assert bound.ids.shape == (3, 6)
    assert bound.ids[:, 0].tolist() == [0] * 3


def test_special_ids_of_a_nested_configuration():
    config = {"text_config": {"bos_token_id": 0, "eos_token_id": [1, 2]}}
    ids = Calibration.self_generated(8, 20).bind(artifact=Ending(**config)).ids
    assert ids[:, 0].tolist() == [0] * 8
    assert set(ids[:, 1:].flatten().tolist()) == set(range(3, 12))
