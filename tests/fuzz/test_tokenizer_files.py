"""Files of a tokenizer of any content."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.odd_values import bounded, damaged_texts, edited, few_or_many, odd_values
from tests.fuzz.surroundings import Surroundings, surroundings
from tests.tiny_checkpoint import Outcome

_SETTINGS: dict[str, list[Any]] = {
    "tokenizer_class": ["LlamaTokenizer", "GPT2TokenizerFast", "BertTokenizer", "T5Tokenizer", "NoSuchTokenizer", 3],
    "bos_token": [None, "", "<new>", {"content": "<new>"}, {"content": 3}, ["<new>"], 7],
    "eos_token": [None, "the", {"__type": "AddedToken", "content": "<new>"}],
    "unk_token": [None, "the", "<new>"],
    "additional_special_tokens": [["a", "a"], [""], "x", {"a": "b"}],
    "added_tokens_decoder": [
        {"5000": {"content": "<x>"}},
        {"x": {}},
        {"0": {"content": "y", "special": True}},
        {"-1": 3},
    ],
    "model_max_length": [0, -1, 1, 10**40, "x"],
    "chat_template": ["{{ 1/0 }}", "{% for %}", 3, [{"name": "default", "template": "x"}]],
    "auto_map": [{"AutoTokenizer": ["missing.Tokenizer", None]}, {"AutoTokenizer": "x"}],
    "add_bos_token": [True],
    "add_prefix_space": [True],
    "padding_side": ["left", "up"],
    "split_special_tokens": [True],
}
_PARTS: dict[str, list[Any]] = {
    "model": [
        {"type": "BPE"},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "WordLevel", "vocab": {"a": 0}},
        {"type": "Unigram", "vocab": []},
        {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 9},
        {"type": "BPE", "vocab": {"a": 1 << 31, "b": 7}, "merges": []},
        {"type": "WordPiece", "vocab": {"a": 3}},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {"a": -1}, "merges": []},
        {"type": "WordLevel", "vocab": {"the": 4095, "sea": 9999}, "unk_token": "the"},
    ],
    "added_tokens": [[], [{"id": 5000, "content": "x", "special": True}], [{"id": 0}], [3]],
    "normalizer": [
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "NoSuch"},
        {"type": "Replace", "pattern": {"Regex": "["}, "content": ""},
        {"type": "Lowercase"},
        {"type": "Precompiled"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "pre_tokenizer": [
        {"type": "Whitespace"},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"},
        {"type": "Sequence", "pretokenizers": []},
        {"type": "Metaspace"},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}], "pair": []},
        {"type": "BertProcessing", "sep": ["a", 99999], "cls": ["b", 77777]},
    ],
    "decoder": [{"type": "ByteFallback"}, {"type": "Strip", "content": "a", "start": 10**6, "stop": 1}],
    "truncation": [
        {"max_length": 0, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        {"max_length": 2, "strategy": "OnlySecond", "stride": 5, "direction": "Right"},
    ],
    "padding": [
        {"strategy": {"Fixed": 100}, "direction": "Left", "pad_id": 4097, "pad_type_id": 0, "pad_token": "x"},
        {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_token": "x"},
    ],
}


def _use(place: Surroundings, purpose: str) -> Outcome:
    """Runs the command that reads the tokenizer for some purpose."""
    if purpose == "compile":
        return place.compile("--calib", place.text, "--samples", 2, "--length", 8)
    if purpose == "evaluate":
        return place.run("evaluate", place.model, "--text", place.text, "--max-tokens", 40)
    return place.run("generate", place.model, "--prompt", "the sea <|eos|> \u00e9", "--max-new-tokens", 2, "--json")


_purposes = st.sampled_from(["compile", "evaluate", "evaluate", "generate", "generate"])


@few_or_many(25)
def test_parts_of_tokenizer_json(captured: Path, examples: int) -> None:
    fields = json.loads((captured / "model" / "tokenizer.json").read_text())

    @bounded(examples)
    @given(edited(fields, _PARTS), _purposes)
    def check(changed: dict[str, Any], purpose: str) -> None:
        with surroundings(captured) as place:
            (place.model / "tokenizer.json").write_text(json.dumps(changed))
            _use(place, purpose)

    check()


@few_or_many(20)
def test_settings(captured: Path, examples: int) -> None:
    fields = json.loads((captured / "model" / "tokenizer_config.json").read_text())

    @bounded(examples)
    @given(edited(fields, _SETTINGS), _purposes)
    def check(changed: dict[str, Any], purpose: str) -> None:
        with surroundings(captured) as place:
            (place.model / "tokenizer_config.json").write_text(json.dumps(changed))
            _use(place, purpose)

    check()


@few_or_many(20)
def test_damaged(captured: Path, examples: int) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"]
    names += ["merges.txt", "tokenizer.model", "generation_config.json", "chat_template.jinja", "vocab.txt"]
    texts = damaged_texts({"bos_token": "the", "eos_token_id": 1, "model": {"type": "BPE"}, "version": "1.0"})
    values = odd_values.map(lambda value: json.dumps(value).encode())

    @bounded(examples)
    @given(st.sampled_from(names), texts | values, st.booleans(), _purposes)
    def check(name: str, text: bytes, is_alone: bool, purpose: str) -> None:
        with surroundings(captured) as place:
            if is_alone:
                (place.model / "tokenizer.json").unlink()
            (place.model / name).write_bytes(text)
            _use(place, purpose)

    check()
