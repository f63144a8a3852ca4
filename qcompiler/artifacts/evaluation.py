"""How good an artifact is: perplexity on text, and its distance from the original."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts.corpus import read_corpus
from qcompiler.artifacts.hf import load_tokenizer
from qcompiler.artifacts.original import check_original
from qcompiler.artifacts.streamed import run_together
from qcompiler.artifacts.tokenizing import TokenStream
from qcompiler.errors import ArtifactError, InputError
from qcompiler.protocol import Artifact

__all__ = ["WINDOW", "Evaluation", "evaluate"]

WINDOW = 512  # tokens per window, where the model takes that many

_LOGITS_AT_ONCE = 1 << 24  # elements of one batch's logits: 64 MiB
_TOKENS_TOGETHER = 1 << 14  # of batches that are given to an artifact at once: see `qcompiler.protocol.RunsTogether`
_LOGITS_PER_CHUNK = 1 << 21  # elements that the arithmetic on them takes at a time: 8 MiB


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood per token.
        reference_perplexity: the original's, on the same tokens; None without it.
        kl_divergence: mean KL(original ‖ artifact) of the next-token distributions, in nats per token; None without it.
        top1_agreement: share of positions, in [0, 1], where both have the same most likely token; None without it.
        tokens: positions scored.
        bytes: of the artifact's weights as stored.
        bits_per_weight: stored bits per original parameter.
        cache_bytes_per_token: bytes that one token of one sequence takes in the cache, scales included; None where that
            is not known, or there is no cache.
        cached: whether half of each window was decoded with the cache.
        notes: what to know about these numbers.
        seconds: wall-clock time, the original's part included.
    """

    perplexity: float
    reference_perplexity: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    tokens: int
    bytes: int
    bits_per_weight: float
    seconds: float
    cache_bytes_per_token: int | None = None
    cached: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; what was not measured is None."""
        return {**asdict(self), "notes": list(self.notes)}


def evaluate(
    artifact: Artifact,
    *,
    text: str | Path | Iterable[str] | None = None,
    tokens: Tensor | None = None,
    against: Artifact | None = None,
    tokenizer: Any = None,
    cached: bool | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores a text.

    The text is one stream of tokens and holds no special token, even where it spells one out. It is cut into adjacent
    windows of ``n = min(512, max_positions)`` tokens, each of which begins with the ``k`` tokens that the tokenizer
    itself puts in front of a text (BOS; none for most): ``n - k`` tokens of the text follow them. What is left at the
    end, shorter than a window, is dropped. Every token of the text is scored, given the opening and what stands ahead
    of it in its window; where there is no opening, every one but the first of each window. The perplexity is ``exp`` of
    the mean of ``-log p`` over these, from float32 log-softmax. Several texts are behind one another in the stream,
    each with its opening.

    Args:
        artifact: what is measured.
        text: a UTF-8 file, plain or of JSON lines, the text itself, or several (`read_corpus`).
        tokens: instead of text, int64 ``[n]`` (cut as above, nothing put in front) or ``[windows, length]`` (taken as
            they are).
        against: the original, for KL divergence and agreement. What was compiled holds the fingerprint of what it was
            compiled from, and is compared with that alone: with its directory, wherever that lies, or with something
            else compiled from it (`qcompiler.artifacts.original`).
        tokenizer: by default the artifact's, else the original's.
        cached: fill the cache with the first half of each window and decode the rest token by token; the same positions
            are scored. The original still runs whole windows. By default, where the cache is quantized, and only
            there; it cannot be left out then, as the cache is what is to be measured.
        max_tokens: use no more than this many tokens of the text.
        progress: called with windows done and windows in all.

    Raises:
        InputError: no text, a text shorter than one window, tokens or an original that do not fit the artifact, another
            original than the one it was compiled from,
            ``cached`` without a cache, or ``cached=False`` with a quantized one.
        ArtifactError: logits that are not finite.
    """
    start = time.perf_counter()
    if (text is None) == (tokens is None):
        raise InputError("evaluation needs a text or tokens", got="both" if text else "neither", expected="one of them")
    is_quantized = bool(getattr(artifact, "has_quantized_cache", False))
    if cached is None:
        cached = is_quantized
    if is_quantized and not cached:
        raise InputError(
            "a quantized cache is measured by decoding with it",
            where=artifact.path,
            got="cached=False",
            remedy="cached",
        )
    if cached and not artifact.has_cache:
        raise InputError("this artifact has no cache to evaluate with", where=artifact.path, remedy="leave out cached")
    if against is not None and against.vocab_size != artifact.vocab_size:
        raise InputError(
            "the original and the artifact have different vocabularies",
            where=against.path,
            got=f"{against.vocab_size} tokens",
            expected=f"{artifact.vocab_size} as in {artifact.path}",
            remedy="compare with the model that the artifact was made from",
        )
    notes = () if against is None else check_original(artifact, against)
    if text is not None:
        tokenizer = tokenizer or _tokenizer_of(artifact, against)
        given: Tensor | TokenStream = read_corpus(text).stream(tokenizer)
    else:
        assert tokens is not None
        given = tokens if tokens.dim() == 2 else TokenStream(tokens)
    limits = [m for a in (artifact, against) if a is not None and (m := a.max_positions) is not None]
    windows = _windows(given, min(limits, default=None), max_tokens)
    is_text = _is_text(windows, given.opening if isinstance(given, TokenStream) else ())
    if int(windows.min()) < 0 or int(windows.max()) >= artifact.vocab_size:
        raise InputError(
            "tokens outside the vocabulary",
            where=artifact.path,
            got=f"ids from {int(windows.min())} to {int(windows.max())}",
            expected=f"0 to {artifact.vocab_size - 1}",
            remedy="use the tokenizer the model was trained with",
        )

    total = Scores()
    rows = max(1, _LOGITS_AT_ONCE // (windows.shape[1] * artifact.vocab_size))
    batches = list(zip(windows.split(rows), is_text[:, 1:].split(rows), strict=True))
    together = max(1, _TOKENS_TOGETHER // (rows * windows.shape[1]))
    done = 0
    with torch.inference_mode():
        for at in range(0, len(batches), together):
            group = batches[at : at + together]
            runs = [_decoded(batch) if cached else [batch] for batch, _ in group]
            found = run_together(artifact, runs)
            expected = None if against is None else run_together(against, [[batch] for batch, _ in group])
            for (batch, is_scored), parts in zip(group, runs, strict=True):
                reference = None if expected is None else next(expected)
                position = 0
                for _ in parts:
                    logits = next(found)[:, : batch.shape[1] - 1 - position]  # nothing follows the last token
                    stop = position + logits.shape[1]
                    aligned = None if reference is None else reference[:, position:stop]
                    targets = batch[:, position + 1 : stop + 1]
                    total.add(logits, aligned, targets, is_scored[:, position:stop], where=artifact.path)
                    position = stop
                done += len(batch)
                if progress is not None:
                    progress(done, len(windows))
    return Evaluation(
        perplexity=total.perplexity,
        reference_perplexity=None if against is None else total.reference_perplexity,
        kl_divergence=None if against is None else total.kl_divergence,
        top1_agreement=None if against is None else total.top1_agreement,
        tokens=total.tokens,
        bytes=artifact.stored_bytes(),
        bits_per_weight=artifact.bits_per_weight(),
        seconds=time.perf_counter() - start,
        cache_bytes_per_token=getattr(artifact, "cache_bytes_per_token", None),
        cached=cached,
        notes=notes,
    )


class Scores:
    """Sums over scored positions, in float64, and the means they give; see `Evaluation` for what those are."""

    def __init__(self) -> None:
        self.tokens = 0
        self._agreements = 0
        self._loss = 0.0
        self._reference_loss = 0.0
        self._divergence = 0.0

    @property
    def perplexity(self) -> float:
        """Of what is measured."""
        return _exp(self._loss / self.tokens)

    @property
    def reference_perplexity(self) -> float:
        """Of the original."""
        return _exp(self._reference_loss / self.tokens)

    @property
    def kl_divergence(self) -> float:
        """Of what is measured from the original, in nats per token."""
        return max(0.0, self._divergence / self.tokens)

    @property
    def top1_agreement(self) -> float:
        """The share of positions at which both find the same token most likely."""
        return self._agreements / self.tokens

    def add(
        self,
        logits: Tensor,
        reference: Tensor | None,
        targets: Tensor,
        is_scored: Tensor | None = None,
        *,
        where: Path | None,
    ) -> None:
        """Adds the positions of ``[batch, n, vocab]`` logits that predict the targets ``[batch, n]``.

        Args:
            logits: of what is measured.
            reference: the original's, of the same shape.
            targets: int64.
            is_scored: bool ``[batch, n]``; all of them by default.
            where: what to name in an error.

        Raises:
            InputError: if the original's logits have another shape.
            ArtifactError: if the logits are not finite.
        """
        if reference is not None and reference.shape != logits.shape:
            raise InputError(
                "the original and the artifact give logits of different shapes",
                where=where,
                got=list(logits.shape),
                expected=list(reference.shape),
            )
        chosen: Any = slice(None) if is_scored is None or bool(is_scored.all()) else is_scored.reshape(-1)
        targets = targets.reshape(-1, 1)[chosen].to(logits.device)
        logits = logits.reshape(-1, logits.shape[-1])[chosen]
        if reference is not None:
            reference = reference.reshape(-1, logits.shape[-1])[chosen].to(logits.device)
        size = max(1, _LOGITS_PER_CHUNK // logits.shape[1])
        for at in range(0, len(targets), size):
            piece = slice(at, at + size)
            log_q = logits[piece].float().log_softmax(-1)
            self._loss -= _gathered(log_q, targets[piece])
            if reference is not None:
                log_p = reference[piece].float().log_softmax(-1)
                self._reference_loss -= _gathered(log_p, targets[piece])
                self._agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                p = log_p.exp()
                self._divergence += float(log_p.sub_(log_q).mul_(p).sum(-1).double().sum())
        self.tokens += len(targets)
        if not math.isfinite(self._loss) or not math.isfinite(self._divergence):
            raise ArtifactError(
                "the logits are not finite",
                where=where,
                got="NaN or infinity",
                remedy="the weights are damaged, or the arithmetic overflows: check the model in float32",
            )


def _gathered(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(log_probabilities.gather(-1, targets).double().sum())


def _decoded(batch: Tensor) -> list[Tensor]:
    """The first half of the tokens, and one after another of the rest, but for the last."""
    half = max(1, batch.shape[1] // 2)
    return [batch[:, :half], *batch[:, half:-1].split(1, dim=1)] if half < batch.shape[1] - 1 else [batch[:, :half]]


def _windows(tokens: Tensor | TokenStream, max_positions: int | None, max_tokens: int | None) -> Tensor:
    """int64 ``[windows, length]``."""
    if isinstance(tokens, Tensor):
        count, length = tokens.shape
        if max_positions is not None and length > max_positions:
            raise InputError("windows longer than the model takes", got=length, expected=f"at most {max_positions}")
        if max_tokens is not None:
            count = min(count, max_tokens // max(1, length))
        if count == 0 or length < 2:
            raise InputError("no window to score", got=list(tokens.shape), expected="[windows, at least 2 tokens]")
        return tokens[:count]
    length = WINDOW if max_positions is None else min(WINDOW, max_positions)
    windows = TokenStream(tokens.ids[:max_tokens], tokens.opening).windows(length)
    if len(windows) == 0:
        used = len(tokens.ids[:max_tokens])
        raise InputError(
            "the text is shorter than one window",
            got=f"{used} tokens" + ("" if used == len(tokens) else f" (max_tokens={max_tokens})"),
            expected=f"at least {length}",
            remedy="give more text",
        )
    return windows


def _is_text(windows: Tensor, opening: tuple[int, ...]) -> Tensor:
    """Bool ``[windows, length]``: False where the opening of a text stands, which nothing is asked to predict."""
    is_text = torch.ones_like(windows, dtype=torch.bool)
    size = len(opening)
    if size:
        begins = (windows.unfold(1, size, 1) == torch.tensor(opening)).all(-1)
        for at in range(size):
            is_text[:, at : at + begins.shape[1]] &= ~begins
    return is_text


def _tokenizer_of(artifact: Artifact, against: Artifact | None) -> Any:
    problem: InputError | None = None
    for candidate in (artifact, against):
        if candidate is not None and candidate.path is not None:
            try:
                return load_tokenizer(candidate.path, vocab_size=artifact.vocab_size)
            except InputError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    raise InputError("text needs a tokenizer, and the artifact has none", remedy="give the tokenizer, or tokens")


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(sys.float_info.max) else sys.float_info.max
