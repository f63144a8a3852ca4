"""The tokenizer of a GGUF file, as the files that transformers loads one from.

Of byte-level BPE (``gpt2``), tokens and merges lie in the file; of SentencePiece (``llama``), tokens with scores: two
tokens are merged where their union is one, those with the highest score first. Source: llama.cpp, ``llama-vocab.cpp``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.frontend.checkpoints.gguf.models import GGUF_WORDS
from qcompiler.storage import GGUFFile

__all__ = ["save_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def save_tokenizer(file: GGUFFile, directory: Path) -> str | None:
    """Writes the tokenizer of a file.

    Returns:
        A sentence where there is one that is not read; None otherwise.
    """
    from transformers import PreTrainedTokenizerFast

    settings = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.settings.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind, tokens = settings.get("model"), settings.get("tokens")
    if kind in (None, "none", "no_vocab") or not isinstance(tokens, list):
        return None
    words = settings.get("pre", "default")
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and words not in GGUF_WORDS):
        return f"the tokenizer is not read: {kind}, {words}; put that of the original model beside the result"
    tokenizer = _byte_level(settings, tokens) if kind == "gpt2" else _sentencepiece(settings, tokens)
    _add_special(tokenizer, settings, tokens)
    options: dict[str, Any] = {
        name: tokens[number]
        for name, key in _SPECIAL.items()
        if isinstance(number := settings.get(f"{key}_token_id"), int) and number < len(tokens)
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
    fast.chat_template = file.settings.get("tokenizer.chat_template")
    fast.save_pretrained(directory)
    return None


def _byte_level(settings: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = settings["pre"]
    merges = [tuple(pair.split(" ", 1)) for pair in settings.get("merges", [])]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=words == "llama-bpe"))
    steps: list[Any] = []
    for name, option in GGUF_WORDS[words]:
        if name == "Split":
            steps.append(pre_tokenizers.Split(Regex(option), "isolated"))
        elif name == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=option == "regex"))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(settings: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: number for number, token in enumerate(tokens)}
    scores = settings["scores"]
    merges = [
        (-scores[number], cut, token[:cut], token[cut:])
        for token, number in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab and not (token.startswith("<0x") and len(token) == 6)
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[settings.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    ends: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.get("add_space_prefix", True):
        steps, ends = [normalizers.Prepend(_SPACE), *steps], [*ends, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def _add_special(tokenizer: Any, settings: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Tokens that stand for themselves, and those that are put around every text."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    types = settings.get("token_type", [])
    special = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    own = [token for token, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    default = settings["model"] == "llama"
    begin = _around(settings, tokens, "bos", default)
    end = _around(settings, tokens, "eos", False)
    if begin or end:
        tokenizer.post_processor = TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(token, tokens.index(token)) for token in (*begin, *end)],
        )


def _around(settings: Mapping[str, Any], tokens: Sequence[str], name: str, default: bool) -> list[str]:
    number = settings.get(f"{name}_token_id")
    return [tokens[number]] if isinstance(number, int) and settings.get(f"add_{name}_token", default) else []
