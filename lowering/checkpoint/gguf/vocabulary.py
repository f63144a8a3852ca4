"""The tokenizer of a model, as key-value pairs of GGUF.

Two kinds have a form there: byte-level BPE (``gpt2``), whose tokens and merges are those of ``tokenizer.json``, with a
name for how text is cut into words; and BPE of SentencePiece (``llama``), which joins the pair whose result has the
highest score: that is the one whose merge comes first. Sources: ``gguf.constants`` 0.19; llama.cpp's
``llama-vocab.cpp``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.artifacts import has_tokenizer, load_tokenizer
from qcompiler.errors import TargetError
from qcompiler.frontend import GGUF_WORDS

if TYPE_CHECKING:
    import gguf

__all__ = ["Vocabulary", "add_vocabulary", "read_vocabulary"]

_SPACE = "▁"
_WORDS = {steps: name for name, steps in GGUF_WORDS.items()}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``gpt2``, ``llama``, or ``none`` where the model has no tokenizer.
        words: how text is cut into words, of ``gpt2``.
        tokens, types: by id.
        merges: of ``gpt2``.
        scores: of ``llama``.
        adds_space: whether a space is put ahead of a text, of ``llama``.
        special: ids by what they are for: ``bos``, ``eos``, ``unk``, ``pad``.
        adds: whether ``bos`` and ``eos`` are put around a text.
        template: of conversations.
    """

    model: str
    words: str = ""
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    adds_space: bool = False
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    template: Any = None


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a directory, as GGUF has it.

    Args:
        directory: of the model.
        vocab_size: of the model; ids that the tokenizer does not know get tokens that are never used.

    Raises:
        InputError: for a broken one, or one that does not fit the model.
        TargetError: for one that llama.cpp has no form of.
    """
    if not has_tokenizer(directory):
        return Vocabulary("none")
    tokenizer = load_tokenizer(directory, vocab_size=vocab_size)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("kind", type(tokenizer).__name__, "one that tokenizer.json describes")
    described: dict[str, Any] = json.loads(backend.to_str())
    model = described["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        raise _refusal("model", model.get("type"), "BPE")
    found = _sentencepiece(described) if model.get("byte_fallback") else _byte_level(described)
    _add_tokens(found, described, vocab_size)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            found.special[name] = int(number)
    ids = tokenizer("a")["input_ids"]
    found.adds = {"bos": ids[0] == found.special.get("bos"), "eos": ids[-1] == found.special.get("eos")}
    found.template = tokenizer.chat_template
    return found


def _refusal(part: str, got: object, expected: str) -> TargetError:
    return TargetError(
        "llama.cpp has no form of this tokenizer",
        where=f"checkpoint: tokenizer.json: {part}",
        got=got,
        expected=expected,
        remedy="write format=compressed-tensors",
    )


def _steps(part: Any, several: str) -> list[dict[str, Any]]:
    """The steps that a part of ``tokenizer.json`` consists of."""
    if part is None:
        return []
    return [step for item in part[several] for step in _steps(item, several)] if part["type"] == "Sequence" else [part]


def _byte_level(described: dict[str, Any]) -> Vocabulary:
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    words = _WORDS.get(tuple(_step(step) for step in steps))
    if words is None:
        raise _refusal("pre_tokenizer", json.dumps(described["pre_tokenizer"])[:300], ", ".join(_WORDS.values()))
    normalizers = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise _refusal("normalizer", ", ".join(normalizers), "none, or NFC")
    if bool(described["model"].get("ignore_merges")) is not (words == "llama-bpe"):
        raise _refusal("model.ignore_merges", described["model"].get("ignore_merges"), "true with llama-bpe alone")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    return Vocabulary("gpt2", words=words, merges=merges)


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    """A step of cutting text into words, as far as two of them may differ."""
    kind = step["type"]
    if kind == "ByteLevel":
        return (kind, "regex" if step["use_regex"] else "", *(["space"] if step["add_prefix_space"] else []))
    if kind == "Digits":
        return (kind, "individual" if step["individual_digits"] else "")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return (kind, str(step["pattern"].get("Regex")))
    return (kind, json.dumps(step, sort_keys=True))


def _sentencepiece(described: dict[str, Any]) -> Vocabulary:
    normalizers = _steps(described["normalizer"], "normalizers")
    cuts = _steps(described["pre_tokenizer"], "pretokenizers")
    adds_space = False
    for step in normalizers:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            adds_space = True
        elif step["type"] != "Replace" or step["content"] != _SPACE or step["pattern"] != {"String": " "}:
            raise _refusal("normalizer", step["type"], f"spaces as {_SPACE}, at most one of them put ahead")
    for step in cuts:
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE or step.get("split", True):
            raise _refusal("pre_tokenizer", step["type"], f"spaces as {_SPACE}")
        adds_space |= step["prepend_scheme"] != "never"
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    found = Vocabulary("llama", adds_space=adds_space)
    tokens = described["model"]["vocab"]
    found.scores = [0.0] * (1 + max(tokens.values()))
    for token, number in tokens.items():
        found.scores[number] = -float(ranks[token]) if token in ranks else -float(len(ranks))
    return found


def _add_tokens(found: Vocabulary, described: dict[str, Any], vocab_size: int) -> None:
    """Tokens by id, and of which type each is."""
    model = described["model"]
    found.tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    found.types = [_UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        found.tokens[number] = token
        found.types[number] = _UNKNOWN if token == model.get("unk_token") else _BYTE if is_byte else _NORMAL
    for added in described["added_tokens"]:
        number = added["id"]
        if found.types[number] != _UNKNOWN:
            found.types[number] = _CONTROL if added["special"] else _USER_DEFINED
        found.tokens[number] = added["content"]
    found.scores += [-1e4] * (vocab_size - len(found.scores)) if found.model == "llama" else []


def add_vocabulary(writer: "gguf.GGUFWriter", directory: Path, vocab_size: int) -> None:
    """Adds the tokenizer of a directory; as `read_vocabulary`."""
    found = read_vocabulary(directory, vocab_size)
    writer.add_tokenizer_model(found.model)
    if found.model == "none":
        return
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.model == "gpt2":
        writer.add_tokenizer_pre(found.words)
        writer.add_token_merges(found.merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.adds_space)
    adders = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, number in found.special.items():
        adders[name](number)
    writer.add_add_bos_token(found.adds["bos"])
    writer.add_add_eos_token(found.adds["eos"])
    if found.template is not None:
        writer.add_chat_template(found.template)
