"""Advice: recipes in order for a model, a GPU and a use, and what is to be said besides."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.advisor.hardware import Hardware
from qcompiler.advisor.options import (
    GOALS,
    NONE,
    USABLE,
    Candidate,
    Goal,
    Offer,
    Option,
    Question,
    Refusal,
    decode_seconds,
    evaluate,
)
from qcompiler.advisor.ranking import rank, why_behind
from qcompiler.advisor.roofline import operand_type, stops_paying
from qcompiler.advisor.shapes import ModelShape
from qcompiler.errors import InputError, did_you_mean

__all__ = ["Advice", "advise"]

_CONTEXT, _BATCH = 4096, 8  # by default: of a sequence; of a server, one person's card serves one
_FELT = 2  # level of a loss
_MOST_CONTEXT, _MOST_BATCH, _MOST_GPUS = 1 << 24, 1 << 16, 1024
_TRAINING = (
    "training: do not quantize. Rounded weights have no gradient, and rounding swallows small steps; train in 16 bits, "
    "and quantize what came out"
)


@dataclass(frozen=True)
class Advice:
    """What is recommended.

    Attributes:
        question: model, GPU and use.
        options: that run and fit, the best first.
        refused: that do not.
        notes: from which batch on something stops paying, what does not divide, what to verify.
        model: as a command names it.
    """

    question: Question
    options: tuple[Option, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    model: str = "MODEL"

    @property
    def first(self) -> Option:
        """The recommendation."""
        return self.options[0]

    @property
    def recipe(self) -> str:
        """Its name, as ``--recipe`` takes it; ``none``: leave the model as it is."""
        return self.first.candidate.name

    def command(self, option: Option | None = None) -> str | None:
        """The command that makes an option, by default the first; None where there is nothing to make."""
        option = option or self.first
        if option.candidate.name == NONE:
            return None
        target = option.takers[0].text
        return (
            f"qcompiler compile {shlex.quote(self.model)} --recipe {option.candidate.name} --to {target} --output OUT"
        )

    def reasons(self) -> dict[str, str]:
        """Why each of the others lost."""
        behind = {option.candidate.name: why_behind(option, self.first, self.question) for option in self.options[1:]}
        return {**behind, **{refusal.name: refusal.reason for refusal in self.refused}}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        reasons, question = self.reasons(), self.question
        return {
            "model": question.shape.to_dict(),
            "hardware": question.hardware.to_dict(),
            "context": question.context,
            "batch": question.batch,
            "gpus": question.gpus,
            "goal": question.goal,
            "usable_bytes_per_gpu": question.usable,
            "recommendation": self.recipe,
            "options": [
                {
                    "rank": place,
                    **option.to_dict(),
                    "command": self.command(option),
                    "why_not_first": reasons.get(option.candidate.name),
                }
                for place, option in enumerate(self.options, 1)
            ],
            "refused": {refusal.name: refusal.reason for refusal in self.refused},
            "notes": list(self.notes),
        }


def advise(
    shape: ModelShape,
    hardware: Hardware,
    candidates: Sequence[Candidate],
    offers: Sequence[Offer],
    *,
    context: int | None = None,
    batch: int | None = None,
    gpus: int = 1,
    goal: str = "quality",
    known: Mapping[str, Hardware] | None = None,
    model: str = "MODEL",
) -> Advice:
    """Puts recipes into order.

    Args:
        shape: of the model.
        hardware: of each GPU.
        candidates: recipes; that which quantizes nothing among them.
        offers: targets that run on this hardware.
        context: tokens of a sequence; by default 4096, or what the model takes where that is less.
        batch: sequences at once; by default 8 on servers and 1 elsewhere.
        gpus: that share the model.
        goal: ``quality``, ``latency``, ``throughput``, ``memory`` or ``training``.
        known: hardware to name where nothing fits.
        model: as the command is to name it.

    Raises:
        InputError: for absurd numbers, an unknown goal, and where nothing fits: by how much, and what would.
    """
    context = min(_CONTEXT, shape.positions or _CONTEXT) if context is None else context
    batch = (_BATCH if hardware.kind == "server" else 1) if batch is None else batch
    question = Question(shape, hardware, context, batch, gpus, _goal(goal))
    _check(question)
    if goal == "training":
        candidates = [candidate for candidate in candidates if candidate.name == NONE]
    weighed = [evaluate(candidate, question, offers) for candidate in candidates]
    options = [item for item in weighed if isinstance(item, Option)]
    refused = [item for item in weighed if isinstance(item, Refusal)]
    if not options:
        raise _nothing_fits(question, candidates, refused, offers, known or {})
    ranked = rank(options, question)
    notes = (*_notes(question, ranked, candidates, refused, offers),)
    return Advice(question, tuple(ranked), tuple(refused), notes, model)


def _goal(goal: str) -> Goal:
    found = next((known for known in GOALS if known == goal), None)
    if found is None:
        raise InputError("unknown goal", got=goal, expected=", ".join(GOALS), remedy=did_you_mean(goal, GOALS))
    return found


def _check(question: Question) -> None:
    asked: tuple[tuple[str, Any, int], ...] = (
        ("context", question.context, _MOST_CONTEXT),
        ("batch", question.batch, _MOST_BATCH),
        ("gpus", question.gpus, _MOST_GPUS),
    )
    for name, value, most in asked:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise InputError("a number without sense", where=name, got=value, expected=f"from 1 to {most:,}")
    positions = question.shape.positions
    if positions is not None and question.context > positions:
        raise InputError(
            "the context is longer than the model takes",
            where="context",
            got=question.context,
            expected=f"up to {positions}",
            remedy=f"--context {positions}",
        )
    if question.shape.heads % question.gpus or question.gpus > question.shape.heads:
        fitting = [count for count in range(1, question.shape.heads + 1) if question.shape.heads % count == 0]
        raise InputError(
            "the heads do not divide among the GPUs",
            where="gpus",
            got=f"{question.shape.heads} heads, {question.gpus} GPUs",
            expected=", ".join(map(str, fitting[:8])),
        )


def _nothing_fits(
    question: Question,
    candidates: Sequence[Candidate],
    refused: Sequence[Refusal],
    offers: Sequence[Offer],
    known: Mapping[str, Hardware],
) -> InputError:
    """By how much the smallest is too large, and what would fit: more GPUs, a shorter context, fewer, another GPU."""
    lacking = [refusal for refusal in refused if refusal.lacking]
    if not lacking:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
        return InputError("no recipe runs on this hardware", where=question.hardware.name, got=reasons)
    least = min(lacking, key=lambda refusal: refusal.lacking)
    candidate = next(item for item in candidates if item.name == least.name)

    def holds(**changes: Any) -> bool:
        return isinstance(evaluate(candidate, replace(question, **changes), offers), Option)

    ways = []
    heads = question.shape.heads
    gpus = next((n for n in range(question.gpus + 1, heads + 1) if heads % n == 0 and holds(gpus=n)), None)
    ways += [] if gpus is None else [f"{gpus} GPUs (--gpus {gpus})"]
    batch = _halved(question.batch, lambda value: holds(batch=value))
    ways += [] if batch is None else [f"--batch {batch}"]
    context = _halved(question.context, lambda value: holds(context=value))
    ways += [] if context is None else [f"--context {context}"]
    larger = sorted(known.values(), key=lambda item: item.memory)
    other = next((item for item in larger if item.vendor == question.hardware.vendor and holds(hardware=item)), None)
    ways += [] if other is None else [f"--gpu {other.key}"]
    return InputError(
        "nothing fits",
        where=f"{question.gpus} x {question.hardware.name}, {question.usable / 1e9:.1f} GB of each "
        f"({USABLE:.0%} of its memory)",
        got=f"the smallest, {least.name}, {least.reason}",
        expected=f"{least.lacking / 1e9:.1f} GB less on each GPU",
        remedy="what would fit: " + ", or ".join(ways) if ways else "a smaller model",
    )


def _halved(value: int, holds: Any) -> int | None:
    """The largest of a half, a quarter, ... that holds."""
    for halvings in range(1, max(int(math.log2(value)), 0) + 1):
        if holds(value >> halvings):
            return value >> halvings
    return None


def _notes(
    question: Question,
    ranked: Sequence[Option],
    candidates: Sequence[Candidate],
    refused: Sequence[Refusal],
    offers: Sequence[Offer],
) -> list[str]:
    if question.goal == "training":
        return [_TRAINING]
    first, notes = ranked[0], []
    if max(first.levels) > 0:
        notes.append(
            "verify it on text of your own: qcompiler evaluate OUT/native --against MODEL --text FILE; a loss of "
            f"{first.loss or 0:.3f} nats per token is an expectation from other models"
        )
    notes += _would_lose_less(question, first, candidates, refused, offers)
    notes += _paying(question, candidates)
    if first.decode.is_compute_bound:
        notes.append(
            f"at a batch of {question.batch} decoding multiplies longer than it reads: fewer bytes save memory there, "
            "not time"
        )
    if first.candidate.name == NONE:
        notes.append("do not quantize: nothing here is faster or smaller to a use without losing more")
    notes += [f"{question.gpus} GPUs: {text}" for text in first.undivided if question.gpus > 1]
    if first.prefill is None:
        notes.append(f"the rate of a type is unknown for {question.hardware.name}: bounds of prefill are missing")
    return [*notes, _TRAINING]


def _would_lose_less(
    question: Question,
    first: Option,
    candidates: Sequence[Candidate],
    refused: Sequence[Refusal],
    offers: Sequence[Offer],
) -> list[str]:
    """Where a loss is felt: what a shorter context would let in."""
    if max(first.levels) < _FELT:
        return []
    by_name = {candidate.name: candidate for candidate in candidates}
    for refusal in sorted((item for item in refused if item.lacking), key=lambda item: item.lacking):
        for halvings in (1, 2, 3):
            shorter = replace(question, context=max(question.context >> halvings, 1))
            found = evaluate(by_name[refusal.name], shorter, offers)
            if isinstance(found, Option) and found.layers_rank <= first.layers_rank and max(found.levels) < _FELT:
                return [f"{refusal.name} loses less, and fits with --context {shorter.context}"]
    return []


def _paying(question: Question, candidates: Sequence[Candidate]) -> list[str]:
    """From which batch on weights of four bits are no longer faster: than products of eight bits, than 16 bits."""
    hardware = question.hardware
    narrow = next((c for c in candidates if _is_weight_only(c, 4) and not c.keys), None)
    plain = next((c for c in candidates if c.name == NONE), None)
    wide = next((c for c in candidates if _multiplies_in(c, 8, hardware) and not c.keys), None)
    if narrow is None or hardware.rate(hardware.float_type) is None:
        return []
    notes = []
    for other, what in ((wide, "8-bit products"), (plain, "16 bits")):
        if other is not None:
            short = _crossing(replace(question, context=1), narrow, other)
            long = _crossing(question, narrow, other)
            notes.append(
                f"weights of 4 bits decode no faster than {what} from a batch of {short} on, where caches are short; "
                f"with {question.context} tokens in 16 bits each, {f'from {long} on' if long else 'they always do'}"
            )
    return notes


def _crossing(question: Question, narrow: Candidate, wide: Candidate) -> int | None:
    return stops_paying(
        lambda batch: decode_seconds(narrow, question, batch), lambda batch: decode_seconds(wide, question, batch)
    )


def _multiplies_in(candidate: Candidate, bits: int, hardware: Hardware) -> bool:
    """Whether layers have weights and inputs of so many bits, and the hardware a known rate of them."""
    weight, activation = candidate.scheme.weight, candidate.scheme.activation
    is_wide = weight is not None and activation is not None and weight.bits == activation.bits == bits
    return is_wide and hardware.rate(operand_type(candidate.scheme, hardware)) is not None


def _is_weight_only(candidate: Candidate, bits: int) -> bool:
    weight, activation = candidate.scheme.weight, candidate.scheme.activation
    return weight is not None and activation is None and weight.bits == bits and not weight.codebook
