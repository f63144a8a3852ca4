"""Token ids made elsewhere: rows of any length, and padding that is cut off."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BatchEncoding

from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.given_rows import given_tokens
from qcompiler.errors import CalibrationError

TEXTS = ["It was a dark night.", "The sea.", "He said nothing, and went back to the house."]


def rows(given, samples=None):
    found = given_tokens(given, samples)
    assert isinstance(found, tuple)
    assert all(row.dtype == torch.int64 for row in found)
    return [row.tolist() for row in found]


def test_rows_of_several_lengths():
    for given in ([[1, 2], [3]], [{"input_ids": [1, 2]}, {"input_ids": [3]}], {"input_ids": [[1, 2], [3]]}):
        assert rows(given) == [[1, 2], [3]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["batch", "rows", "lists", "two batches", "numpy"])
def test_padding_is_cut_off(booklm, side, form):
    tokenizer = AutoTokenizer.from_pretrained(booklm, padding_side=side)
    plain = [tokenizer(text)["input_ids"] for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert isinstance(padded, BatchEncoding)
    singles = [{key: value[i] for key, value in padded.items()} for i in range(3)]
    given = {
        "batch": padded,
        "rows": iter(singles),
        "lists": [{key: value.tolist() for key, value in single.items()} for single in singles],
        "two batches": [{k: v[:2] for k, v in padded.items()}, {k: v[2:] for k, v in padded.items()}],
        "numpy": [{key: value.numpy() for key, value in padded.items()}],
    }[form]
    assert rows(given) == plain


def test_masks_of_every_kind():
    ids = torch.tensor([[9, 1, 2, 9]])
    for dtype in (torch.bool, torch.int64, torch.float32, torch.uint8):
        assert rows({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 0]]).to(dtype)}) == [[1, 2]]
    assert rows({"input_ids": ids, "attention_mask": None}) == [[9, 1, 2, 9]]


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ([1, 0, 1], "more than padding"),
        ([0, 0, 0], "more than padding"),
        ([1, 1], "another shape"),
        ([[1, 1, 1]], "another shape"),
        (["a", "b", "c"], "not integers"),
    ],
)
def test_masks_that_do_not_fit(mask, match):
    with pytest.raises(CalibrationError, match=match):
        given_tokens([{"input_ids": [1, 2, 3], "attention_mask": mask}], None)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([{"ids": [1, 2]}], "without token ids"),
        ({"attention_mask": [[1]]}, "without token ids"),
        ([[1, 2], []], "no calibration tokens"),
        (7, "not integers"),
        ([[[[1]]]], "no calibration tokens"),
        ([{"input_ids": "text"}], "not integers"),
    ],
)
def test_what_cannot_be_used(given, match):
    with pytest.raises(CalibrationError, match=match):
        given_tokens(given, None)


def test_a_stream_of_numbers_of_any_kind():
    for given in ([1, 2, 3], np.array([1, 2, 3]), torch.tensor([1, 2, 3]), iter(np.array([1, 2, 3]))):
        found = given_tokens(given, None)
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == [1, 2, 3]


def test_rows_of_one_length_run_together():
    bound = Calibration.from_tokens([[1, 2], [3], [4, 5], [6]], samples=3).bind(vocab_size=10, hold_out=16)
    assert [group.tolist() for group in bound.groups] == [[[1, 2], [4, 5]], [[3]]]
    assert bound.held_out is not None
    assert bound.held_out.tolist() == [[6]]
    assert (bound.tokens, bound.to_dict()["samples"], bound.to_dict()["length"]) == (5, 3, 2)
    with pytest.raises(CalibrationError, match="not equally long"):
        _ = bound.ids
    with pytest.raises(CalibrationError, match="length asked for"):
        Calibration.from_tokens([[1, 2], [3]], length=2)
    with pytest.raises(CalibrationError, match="longer than the model takes"):
        Calibration.from_tokens([[1], [1, 2, 3]]).bind(max_positions=2)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        Calibration.from_tokens([[1], [1, 12]]).bind(vocab_size=10)
