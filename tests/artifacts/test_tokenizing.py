"""Token ids of texts: openings, spelled special tokens, and long texts in pieces."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qcompiler.artifacts import tokenizing
from qcompiler.artifacts.hf import load_tokenizer
from qcompiler.artifacts.tokenizing import (
    TokenStream,
    encode,
    encode_prompt,
    opening_tokens,
)
from qcompiler.errors import InputError

SPECIAL = ["<unk>", "<s>", "</s>", "[gMASK]", "<sop>"]


def prose(words: int, seed: int = 0) -> str:
    """Words, numbers, punctuation, runs of blanks and line ends, letters beyond ASCII, spelled special tokens."""
    draw = random.Random(seed)
    stock = [
        "the",
        "sea",
        "naïve",
        "café",
        "日本語",
        "don't",
        "1987",
        "x=3.14",
        "😀",
        "Wörter",
        "</s>",
        "end.",
        '"Oh!"',
    ]
    blanks = [" ", " ", " ", "  ", "\n", "\n\n", "\t", ", ", "    "]
    return "".join(draw.choice(stock) + draw.choice(blanks) for _ in range(words))


def byte_level(trimmed: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trimmed)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([prose(3000)], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator([prose(3000)], trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator([prose(3000)], trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As in Llama 2: a text is one word to it, a blank stands in front of it, and what is unknown falls apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(prose(3000).split("\n"), trainer)
    return tokenizer


KINDS = [byte_level, lambda: byte_level(trimmed=False), word_piece, unigram, sentence_piece]
NAMES = ["byte-level", "untrimmed", "word-piece", "unigram", "sentence-piece"]


def wrapped(tokenizer: Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    if template is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_pieces_join_to_what_the_whole_gives(make, monkeypatch):
    tokenizer, text = wrapped(make()), prose(4000, seed=1)
    whole = encode(tokenizer, text)
    monkeypatch.setattr(tokenizing, "_OVERLAP", 200)
    calls = []
    seam = tokenizing._seam
    monkeypatch.setattr(tokenizing, "_seam", lambda *args: calls.append(seam(*args)) or calls[-1])
    for size in (len(text) - 1, 3001, 1000):
        monkeypatch.setattr(tokenizing, "_PIECE", size)
        assert torch.equal(encode(tokenizer, text), whole)
    assert len(calls) > 20
    assert None not in calls


def test_a_word_longer_than_the_overlap_is_cut_at_a_token(monkeypatch):
    tokenizer = wrapped(byte_level())
    text = "the " * 40 + "aA" * 3000 + " sea" * 40
    monkeypatch.setattr(tokenizing, "_PIECE", 500)
    monkeypatch.setattr(tokenizing, "_OVERLAP", 50)
    monkeypatch.setattr(tokenizing, "_seam", lambda *args: None)
    assert tokenizer.decode(encode(tokenizer, text).tolist()) == text


def test_a_tokenizer_that_does_not_tell_places_is_cut_at_a_blank(monkeypatch):
    class Characters:
        """One token a character."""

        is_fast = False

        def __call__(self, text, **options):
            seen.append(text)
            return {"input_ids": [ord(c) for c in text]}

    seen: list[str] = []
    monkeypatch.setattr(tokenizing, "_PIECE", 100)
    text = prose(200)
    assert encode(Characters(), text).tolist() == [ord(c) for c in text]
    pieces = seen[2:]
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(len(piece) <= 100 for piece in pieces)
    assert all(piece[0] in " \n" for piece in pieces[1:])


TEMPLATES = [("$A", ()), ("$A </s>", ()), ("<s> $A", (1,)), ("<s> $A </s>", (1,)), ("[gMASK] <sop> $A", (3, 4))]


@pytest.mark.parametrize(("template", "opening"), TEMPLATES)
@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_the_opening_is_what_the_template_puts_in_front(make, template, opening):
    tokenizer = wrapped(make(), template)
    bare = wrapped(make())
    assert opening_tokens(tokenizer) == opening
    assert encode(tokenizer, "the sea").tolist() == [*opening, *encode(bare, "the sea").tolist()]
    assert encode_prompt(tokenizer, "the sea").tolist() == [*opening, *encode(bare, "the sea").tolist()]


@pytest.mark.parametrize("make", KINDS, ids=NAMES)
def test_special_tokens_spelled_in_a_text_stay_text(make):
    tokenizer = wrapped(make(), "<s> $A")
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL[1:]))
    spelled = "the</s> sea <s>[gMASK] end"
    ids = encode(tokenizer, spelled).tolist()
    assert not set(ids[1:]) & special
    if tokenizer.unk_token_id not in ids:
        assert tokenizer.decode(ids[1:]).replace(" ", "") == spelled.replace(" ", "")
    assert len(special & set(encode_prompt(tokenizer, spelled).tolist())) == 3
    assert encode(tokenizer, spelled).tolist() == ids  # a prompt in between changes nothing
    assert special & set(tokenizer("the</s>")["input_ids"][1:])  # nor do these change what others get


def test_a_spelled_word_is_cut_only_where_the_vocabulary_has_it(monkeypatch):
    monkeypatch.setattr(tokenizing, "_special_tokens", lambda tokenizer: {})
    tokenizer = wrapped(word_piece())
    assert not set(encode(tokenizer, "the</s> sea [gMASK]").tolist()) & {1, 2, 3, 4}


def test_special_tokens_of_the_shipped_model(booklm):
    tokenizer = load_tokenizer(booklm)
    assert opening_tokens(tokenizer) == ()
    assert tokenizer.decode(encode(tokenizer, "a<|eos|>b").tolist(), skip_special_tokens=True) == "a<|eos|>b"
    assert encode_prompt(tokenizer, "<|eos|>").tolist() == [1]


def test_windows_without_an_opening_are_adjacent():
    stream = TokenStream(torch.arange(100, 123))
    assert stream.windows(5).tolist() == torch.arange(100, 120).view(4, 5).tolist()
    assert stream.windows(5, start=4).tolist() == torch.arange(104, 119).view(3, 5).tolist()
    assert (stream.left_over(5), stream.left_over(24)) == (3, 23)
    assert stream.windows(24).shape == (0, 24)


def test_every_window_begins_with_the_opening_once():
    ids = [7, 8, *range(100, 108), 7, 8, *range(200, 203)]  # two texts
    stream = TokenStream(torch.tensor(ids), opening=(7, 8))
    assert stream.windows(4).tolist() == [
        [7, 8, 100, 101],
        [7, 8, 102, 103],
        [7, 8, 104, 105],
        [7, 8, 106, 107],
        [7, 8, 200, 201],  # begins as a text: not opened twice
    ]
    assert stream.windows(7).tolist() == [[7, 8, *range(100, 105)], [7, 8, 105, 106, 107, 7, 8]]
    assert stream.left_over(4) == 1
    assert stream.windows(2).shape == (0, 2)


@pytest.mark.parametrize("read", [encode, encode_prompt])
def test_half_of_a_surrogate_pair_is_no_character(booklm, read):
    with pytest.raises(InputError) as caught:
        read(load_tokenizer(booklm), "sea \ud83d")
    assert caught.value.got == r"'\ud83d' at character 4"
