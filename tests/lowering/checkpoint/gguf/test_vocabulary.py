"""Tokenizers as GGUF has them: tokens, types, merges, scores, how text is cut, and what has no form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qcompiler.artifacts import load_tokenizer
from qcompiler.errors import InputError, TargetError
from qcompiler.frontend.checkpoints.gguf.tokenizer import save_tokenizer
from qcompiler.lowering.checkpoint.gguf.vocabulary import Vocabulary, add_vocabulary, read_vocabulary
from qcompiler.storage import GGUFFile

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, NORMAL, UNUSED, BYTE, UNKNOWN = 3, 1, 5, 6, 2


def test_byte_level(booklm: Path) -> None:
    found = read_vocabulary(booklm, 4100)
    described = json.loads((booklm / "tokenizer.json").read_text())["model"]
    assert (found.model, found.words, found.scores) == ("gpt2", "gpt-2", [])
    assert found.tokens[:3] == ["<|bos|>", "<|eos|>", "<|pad|>"]
    assert all(found.tokens[number] == token for token, number in described["vocab"].items())
    assert [pair.split(" ") for pair in found.merges] == described["merges"]
    assert found.types == [CONTROL] * 3 + [NORMAL] * 4093 + [UNUSED] * 4
    assert (found.special, found.adds) == ({"bos": 0, "eos": 1, "pad": 2}, {"bos": False, "eos": False})
    assert found.template is None


def _save(directory: Path, tokenizer: Tokenizer, **options: Any) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(directory)
    return directory


def _sentencepiece() -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "a", "b", "ab", "▁ab"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def test_sentencepiece(tmp_path: Path) -> None:
    _save(tmp_path, _sentencepiece(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ bos }}")
    found = read_vocabulary(tmp_path, 265)
    assert (found.model, found.adds_space, found.merges) == ("llama", True, [])
    assert found.types == [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5, UNUSED]
    ab, longer = found.tokens.index("ab"), found.tokens.index("▁ab")
    assert found.scores[ab] > found.scores[longer] > found.scores[found.tokens.index("a")]
    assert len(found.scores) == len(found.tokens) == 265
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert found.template == "{{ bos }}"


def _byte_level(cut: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], ignore_merges=False))
    tokenizer.pre_tokenizer = cut
    return tokenizer


def _split(pattern: str) -> Any:
    from tokenizers import Regex

    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


@pytest.mark.parametrize(("cut", "words"), [(DIGITS, "smollm"), (_split(LLAMA3.replace("{1,3}", "")), "qwen2")])
def test_how_text_is_cut(cut: Any, words: str, tmp_path: Path) -> None:
    assert read_vocabulary(_save(tmp_path, _byte_level(cut)), 3).words == words


def _written(source: Path, vocab_size: int, place: Path) -> GGUFFile:
    writer = gguf.GGUFWriter(place / "x.gguf", "llama")
    add_vocabulary(writer, source, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GGUFFile(place / "x.gguf")


TEXT = "The captain's 1234 ships, naïve  and\n\ncold <|bos|> ab abab ba."


def test_read_back(booklm: Path, tmp_path: Path) -> None:
    assert save_tokenizer(_written(booklm, 4096, tmp_path), tmp_path) is None
    read, source = load_tokenizer(tmp_path), load_tokenizer(booklm)
    assert read(TEXT)["input_ids"] == source(TEXT)["input_ids"]
    assert read.decode(read(TEXT)["input_ids"]) == TEXT
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (0, 1, 2)


def test_sentencepiece_read_back(tmp_path: Path) -> None:
    tokenizer = _sentencepiece()
    tokenizer.post_processor = TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}"}
    source = _save(tmp_path / "source", tokenizer, **special)
    file = _written(source, 264, tmp_path)
    assert file.settings["tokenizer.ggml.add_bos_token"] is True
    assert save_tokenizer(file, tmp_path / "read") is None
    read = load_tokenizer(tmp_path / "read")
    assert read(TEXT)["input_ids"] == load_tokenizer(source)(TEXT)["input_ids"]
    assert read.decode(read("ab  ba")["input_ids"], skip_special_tokens=True) == "ab  ba"
    assert read.chat_template == "{{ bos_token }}"


def test_words_that_are_not_read(booklm: Path, tmp_path: Path) -> None:
    file = _written(booklm, 4096, tmp_path)
    file.settings["tokenizer.ggml.pre"] = "tekken"
    assert "tokenizer is not read: gpt2, tekken" in str(save_tokenizer(file, tmp_path / "read"))
    assert not (tmp_path / "read").exists()


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, 10) == Vocabulary("none")


def test_a_tokenizer_of_another_model(booklm: Path) -> None:
    with pytest.raises(InputError, match="does not fit the model"):
        read_vocabulary(booklm, 4000)


def _lowercase() -> Tokenizer:
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(False))
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _stripped() -> Tokenizer:
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "model"),
        (lambda: _byte_level(pre_tokenizers.ByteLevel(True)), "pre_tokenizer"),
        (lambda: _byte_level(_split(r"\w+")), "pre_tokenizer"),
        (lambda: _byte_level(_split(LLAMA3)), "model.ignore_merges"),
        (_lowercase, "normalizer"),
        (_stripped, "normalizer"),
    ],
)
def test_what_has_no_form(make: Callable[[], Tokenizer], part: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no form of this tokenizer") as caught:
        read_vocabulary(_save(tmp_path, make()), 300)
    assert caught.value.where == f"checkpoint: tokenizer.json: {part}"
