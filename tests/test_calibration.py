"""Calibration tokens: drawn from text, given, or generated."""

import hashlib
import itertools
import logging
import struct

import pytest
import torch

from qcompiler.calibration import Calibration, read_text
from qcompiler.errors import CalibrationError, InputError
from qcompiler.hf import HFArtifact, encode, load_tokenizer

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


def test_read_text(tmp_path):
    assert read_text("two words") == "two words"
    assert read_text("one line\nand a/file.txt") == "one line\nand a/file.txt"
    assert read_text("x" * 5000) == "x" * 5000
    for missing in ("corpus.txt", "no/such/corpus", tmp_path / "corpus"):
        with pytest.raises(InputError, match="no such text file"):
            read_text(missing)
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "latin")


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
        ([[1, 2], [3]], "not equally long"),
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
