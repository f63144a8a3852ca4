import pytest

from qcompiler.errors import TargetError
from qcompiler.ir import Port
from qcompiler.lowering.tensorrt.engine import default_profiles, parse_profiles

IDS = Port("input_ids", "ids", "int64", ("batch", "sequence"))
MASK = Port("attention_mask", "mask", "int64", ("batch", "past_sequence + sequence"))
KEYS = Port("past_key_values.0.key", "past", "float16", ("batch", 4, "past_sequence", 16))
FIXED = Port("table", "other", "float16", (3, 5))
PORTS = (IDS, MASK, KEYS, FIXED)


def test_a_prompt_is_read_in_pieces_and_one_token_decoded():
    prefill, decode = default_profiles(PORTS, length=1024)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.shapes == {
        "input_ids": ((1, 1), (1, 128), (1, 512)),
        "attention_mask": ((1, 1), (1, 128), (1, 1024)),
        "past_key_values.0.key": ((1, 4, 0, 16), (1, 4, 0, 16), (1, 4, 512, 16)),
    }
    assert decode.shapes == {
        "input_ids": ((1, 1), (1, 1), (1, 1)),
        "attention_mask": ((1, 1), (1, 512), (1, 1024)),
        "past_key_values.0.key": ((1, 4, 0, 16), (1, 4, 511, 16), (1, 4, 1023, 16)),
    }


def test_several_sequences_decode_in_a_profile_of_their_own():
    prefill, decode, batched = default_profiles(PORTS, batch=8, length=64, piece=16)
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 16), (8, 16))
    assert decode.shapes["input_ids"][2] == (1, 1)
    assert batched.name == "decode_batch"
    assert batched.shapes["attention_mask"] == ((1, 1), (8, 32), (8, 64))


def test_a_decode_profile_may_take_more_tokens():
    _, decode, batched = default_profiles(PORTS, batch=2, length=64, piece=16, step=2)
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (1, 2))
    assert decode.shapes["attention_mask"][2] == (1, 64)
    assert batched.shapes["input_ids"][2] == (2, 2)
    with pytest.raises(TargetError, match="at least one"):
        default_profiles(PORTS, length=64, step=0)


def test_a_prompt_may_be_read_in_pieces_of_a_least_size():
    prefill, decode = default_profiles(PORTS, length=1024, least=32)
    assert prefill.shapes["input_ids"] == ((1, 32), (1, 128), (1, 512))
    assert prefill.shapes["attention_mask"] == ((1, 32), (1, 128), (1, 1024))
    assert decode.shapes["attention_mask"][0] == (1, 1)
    with pytest.raises(TargetError, match="shorter than what is read at once"):
        default_profiles(PORTS, length=31, least=32)


def test_without_a_cache_there_is_one_profile_of_the_whole_length():
    (prefill,) = default_profiles([IDS, Port("attention_mask", "mask", "int64", ("batch", "sequence"))], length=600)
    assert prefill.shapes["attention_mask"] == ((1, 1), (1, 128), (1, 600))


def test_profiles_are_read_from_text():
    text = "long:sequence=1..64..256:past_sequence=0..256/one:batch=2:sequence=1:past_sequence=7..9..100"
    long, one = parse_profiles(text, PORTS, positions=512)
    assert long.shapes["attention_mask"] == ((1, 1), (1, 320), (1, 512))
    assert one.shapes["past_key_values.0.key"] == ((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 100, 16))
    assert one.shapes["input_ids"] == ((2, 1),) * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:sequence=4..2:past_sequence=0", "LEAST <= OPTIMAL"),
        ("a:sequence=0..2:past_sequence=0", "1 <= LEAST"),
        ("a:sequence=1..x:past_sequence=0", "1..x"),
        ("a:sequence=1..2..3..4:past_sequence=0", "1..2..3..4"),
        ("a:sequence=1..2", "past_sequence"),
        ("a:sequnce=1:past_sequence=0", "did you mean sequence"),
        ("a:sequence=1:sequence=2:past_sequence=0", "each at most once"),
        ("a:sequence", "SYMBOL="),
        ("sequence=1", "a name of its own"),
        ("a:sequence=1:past_sequence=0/a:sequence=1:past_sequence=0", "a name of its own"),
        ("", "a name of its own"),
        ("a:sequence=1..100:past_sequence=0..500", "600 tokens"),
    ],
)
def test_a_profile_that_does_not_hold_is_refused(text, said):
    with pytest.raises(TargetError) as caught:
        parse_profiles(text, PORTS, positions=512)
    assert said in str(caught.value)


def test_sizes_that_are_no_expressions_are_refused():
    with pytest.raises(TargetError, match="cannot be told") as caught:
        default_profiles([IDS, Port("odd", "other", "int64", ("max(sequence, 3)",))], length=8)
    assert "odd" in str(caught.value)
    with pytest.raises(TargetError, match="one of the symbols") as caught:
        default_profiles([IDS, Port("image", "other", "float16", ("pixels",))], length=8)
    assert "pixels" in str(caught.value)
    with pytest.raises(TargetError, match="at least one"):
        default_profiles(PORTS, length=0)
