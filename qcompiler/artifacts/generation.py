"""Text generation with any artifact: one prefill, then one token at a time with its cache."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts.tokenizing import encode_prompt
from qcompiler.errors import ArtifactError, InputError
from qcompiler.frontend import declared
from qcompiler.protocol import Artifact

__all__ = ["Generation", "Sampler", "decode_stepwise", "end_tokens", "generate", "stream_text", "stream_tokens"]


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest.
        top_k: only the ``k`` most likely tokens.
        top_p: only the smallest set of most likely tokens whose probability reaches ``p`` (arXiv 1904.09751).
        suppress: token ids never chosen.

    Raises:
        InputError: for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature out of range", got=self.temperature, expected="0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k out of range", got=self.top_k, expected="1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p out of range", got=self.top_p, expected="above 0, at most 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """int64 ``[batch]``, one token for each row of ``[batch, vocab]`` logits."""
        if self.suppress:
            logits = logits.index_fill(-1, torch.tensor(self.suppress, device=logits.device), float("-inf"))
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[:, -1:], float("-inf"))
        probabilities = scaled.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(before >= self.top_p, 0.0))
        return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text: the new text, without the prompt and without special tokens.
        tokens: the new token ids, a final end token included.
        prompt_tokens: tokens of the prompt.
        finish: ``end`` (an end token), ``length`` (max_new_tokens) or ``positions`` (the model takes no longer
        sequence).
        seconds: wall-clock time, prefill included.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields."""
        return {**asdict(self), "tokens": list(self.tokens)}


def generate(
    artifact: Artifact,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt.

    The most likely token is taken unless sampling is asked for: how to sample is said here alone, and what a
    ``generation_config.json`` proposes for it is not read (what ends a text is; see `end_tokens`).

    Args:
        artifact: what runs.
        tokenizer: its tokenizer.
        prompt: text; an empty one starts from the BOS token. Special tokens that it spells out are special tokens, so
            that the prompt of a chat can be written as its template would (texts to calibrate and measure with are
            read otherwise: `qcompiler.artifacts.tokenizing`).
        max_new_tokens: stop after this many.
        temperature: 0 is greedy; see `Sampler` for this and the next two.
        top_k: see `Sampler`.
        top_p: see `Sampler`.
        seed: of the sampling.
        on_text: called with every piece of the text as it comes; see `stream_text`.

    Raises:
        InputError: for a prompt that is longer than the model takes, or options out of range.
    """
    start = time.perf_counter()
    ids = _prompt_ids(artifact, tokenizer, prompt)
    ends = end_tokens(artifact, tokenizer)
    sampler = Sampler(temperature, top_k, top_p)
    made = stream_tokens(artifact, ids, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, end_tokens=ends)
    if on_text is None:
        tokens = tuple(made)
    else:
        pieces = _Pieces(tokenizer)
        for piece in pieces.of(made):
            on_text(piece)
        tokens = tuple(pieces.tokens)
    full = "length" if len(tokens) == max_new_tokens else "positions"
    finish = "end" if tokens and tokens[-1] in ends else full
    text = tokenizer.decode(list(tokens), skip_special_tokens=True)
    return Generation(text, tokens, len(ids), finish, time.perf_counter() - start)


def stream_text(
    artifact: Artifact,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """`generate` piece by piece; the pieces joined are its text. Characters split over tokens come out whole."""
    ids = _prompt_ids(artifact, tokenizer, prompt)
    ends = end_tokens(artifact, tokenizer)
    sampler = Sampler(temperature, top_k, top_p)
    made = stream_tokens(artifact, ids, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, end_tokens=ends)
    yield from _Pieces(tokenizer).of(made)


class _Pieces:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[int] = []

    def of(self, tokens: Iterable[int]) -> Iterator[str]:
        """What tokens add to the text, as soon as its characters are whole; `tokens` then holds them."""
        shown = ""
        for token in tokens:
            self.tokens.append(token)
            text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
            if text.startswith(shown) and not text.endswith("�") and text != shown:
                yield text[len(shown) :]
                shown = text
        if rest := self._tokenizer.decode(self.tokens, skip_special_tokens=True)[len(shown) :]:
            yield rest


def stream_tokens(
    artifact: Artifact,
    ids: Tensor,
    *,
    max_new_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    end_tokens: Collection[int] = (),
) -> Iterator[int]:
    """New token ids, one at a time.

    Args:
        artifact: what runs; without a cache each token costs a run over the whole sequence.
        ids: int64 ``[n]``, the prompt.
        max_new_tokens: stop after this many.
        sampler: greedy by default.
        seed: of the sampling.
        end_tokens: stop after one of these.

    Raises:
        InputError: for a prompt that is empty, longer than the model takes, or outside its vocabulary.
    """
    if max_new_tokens < 1:
        raise InputError("max_new_tokens out of range", got=max_new_tokens, expected="1 or more")
    if ids.dim() != 1 or len(ids) == 0:
        raise InputError("the prompt has no tokens", got=list(ids.shape), expected="at least one")
    if int(ids.min()) < 0 or int(ids.max()) >= artifact.vocab_size:
        raise InputError(
            "the prompt has tokens outside the vocabulary",
            got=int(ids.max()),
            expected=f"0 to {artifact.vocab_size - 1}",
        )
    if artifact.max_positions is not None:
        if len(ids) >= artifact.max_positions:
            raise InputError(
                "the prompt leaves no room for new tokens",
                got=f"{len(ids)} tokens",
                expected=f"fewer than {artifact.max_positions}",
                remedy="shorten the prompt",
            )
        max_new_tokens = min(max_new_tokens, artifact.max_positions - len(ids))
    for chosen in decode_stepwise(artifact, ids[None], max_new_tokens, sampler or Sampler(), seed):
        token = int(chosen[0])
        yield token
        if token in end_tokens:
            return


def decode_stepwise(artifact: Artifact, ids: Tensor, steps: int, sampler: Sampler, seed: int) -> Iterator[Tensor]:
    """int64 ``[batch]`` new tokens, ``steps`` times, after int64 ``[batch, length]``; rows never end early.

    Raises:
        ArtifactError: for logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    cache: object = None
    for step in range(steps):
        if not artifact.has_cache:
            logits = artifact.forward(ids)
        elif step == 0:
            logits, cache = artifact.prefill(ids)
        else:
            logits, cache = artifact.step(ids[:, -1:], cache)
        last = logits[:, -1]
        if not bool(torch.isfinite(last).all()):
            raise ArtifactError(
                "the logits are not finite",
                where=artifact.path,
                got="NaN or infinity",
                remedy="the weights are damaged, or the arithmetic overflows: check the model in float32",
            )
        chosen = sampler.choose(last, generator).to(ids.device)
        yield chosen
        ids = torch.cat((ids, chosen[:, None]), dim=1)


def end_tokens(artifact: Artifact, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, and those of ``generation_config.json``, else of ``config.json``.

    Raises:
        InputError: for one of these files that is not a JSON object, or ids that are none.
    """
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    where = None
    for name in ("generation_config.json", "config.json"):
        where = None if artifact.path is None else artifact.path / name
        fields = {} if where is None or not where.is_file() else _json_object(where)
        if (ids := fields.get("eos_token_id")) is None:
            ids = declared(fields, "eos_token_id")
        if ids is not None:
            break
    else:
        config = artifact.provenance.get("config")
        ids = declared(config if isinstance(config, Mapping) else None, "eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(item, int) for item in listed):
        raise InputError("eos_token_id holds no token ids", where=where, got=ids, expected="a number or a list of them")
    return frozenset(found.union(listed))


def _json_object(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file.name} is not a JSON object", where=file, got=error) from error
    if not isinstance(fields, dict):
        raise InputError(f"{file.name} is not a JSON object", where=file, got=type(fields).__name__)
    return fields


def _prompt_ids(artifact: Artifact, tokenizer: Any, prompt: str) -> Tensor:
    ids = encode_prompt(tokenizer, prompt)
    if len(ids) == 0:
        if tokenizer.bos_token_id is None:
            raise InputError("the prompt is empty and the tokenizer has no BOS token", where=artifact.path)
        ids = torch.tensor([tokenizer.bos_token_id])
    return ids
