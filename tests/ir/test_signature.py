"""Ports: looked up by role, written to JSON and back."""

import json

import pytest

from qcompiler.ir.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Port,
    Signature,
)

IDS = Port("input_ids", "ids", "int64", (BATCH, SEQUENCE))
KEY = Port("past_key_values.0.key", "past", "float32", (BATCH, 2, PAST, 8), 0, "key")
PRESENT = Port("present.0.key", "present", "float32", (BATCH, 2, TOTAL, 8), 0, "key")
LOGITS = Port("logits", "logits", "float32", (BATCH, SEQUENCE, 100))
SIGNATURE = Signature((IDS, KEY), (PRESENT, LOGITS))


def test_lookup_by_role():
    assert SIGNATURE.input("past") is KEY
    assert SIGNATURE.input("mask") is None
    assert SIGNATURE.index_of_output("logits") == 1
    assert SIGNATURE.index_of_output("other") is None


def test_a_cache_is_what_enters():
    assert SIGNATURE.has_cache
    assert not Signature((IDS,), (PRESENT, LOGITS)).has_cache


def test_round_trip():
    fields = json.loads(json.dumps(SIGNATURE.to_dict()))
    assert Signature.from_dict(fields) == SIGNATURE
    assert fields["inputs"][1]["shape"] == ["batch", 2, "past_sequence", 8]


def test_unknown_fields_are_refused():
    fields = SIGNATURE.to_dict()
    fields["inputs"][0]["value"] = 1
    with pytest.raises(TypeError):
        Signature.from_dict(fields)


def test_bytes_of_a_token():
    assert SIGNATURE.cache_bytes_per_token == 2 * 8 * 4
    assert not SIGNATURE.has_quantized_cache
    assert Signature((IDS,), (LOGITS,)).cache_bytes_per_token is None
    codes = Port("past_key_values.0.key", "past", "float8_e4m3fn", (BATCH, 2, PAST, 8), 0, "key")
    scale = Port("past_key_values.0.key_scale", "past", "float16", (BATCH, 2, PAST, 1), 0, "key_scale")
    quantized = Signature((IDS, codes, scale), (PRESENT, LOGITS))
    assert quantized.cache_bytes_per_token == 2 * 8 + 2 * 2
    assert quantized.has_quantized_cache
    assert Signature.from_dict(quantized.to_dict()) == quantized
