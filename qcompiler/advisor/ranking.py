"""The order of recipes: rules, each with its reason, and bounds that are told apart only where they differ by more than
five per cent.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcompiler.advisor.options import NONE, Option, Question

__all__ = ["rank", "why_behind"]

_CLOSE = 1.05
"""Bounds nearer to each other than that are equal: engines differ more from the bounds, and from each other."""


@dataclass(frozen=True)
class _Rule:
    """What comes first.

    Attributes:
        value: of an option; the smaller, the better.
        says: what is said of an option that lost by it, beside the one that won.
        is_close: whether values within five per cent are equal.
    """

    value: Callable[[Option], float]
    says: Callable[[Option, Option], str]
    is_close: bool = False


def rank(options: Sequence[Option], question: Question) -> list[Option]:
    """Options in order, the best first."""
    return _ordered(list(options), _rules(question))


def why_behind(option: Option, first: Option, question: Question) -> str:
    """The first rule by which an option stands behind another."""
    for rule in _rules(question):
        ours, theirs = rule.value(option), rule.value(first)
        if ours > theirs and not _are_equal(rule, ours, theirs):
            return rule.says(option, first)
    return f"no better than {first.candidate.name} in anything"


def _ordered(options: list[Option], rules: Sequence[_Rule]) -> list[Option]:
    """By the first rule; those that it does not tell apart, by the others."""
    if len(options) < 2 or not rules:
        return options
    rule, *others = rules
    left, found = sorted(options, key=rule.value), []
    while left:
        least = rule.value(left[0])
        together = [item for item in left if _are_equal(rule, rule.value(item), least)]
        found += _ordered(together, others)
        left = [item for item in left if item not in together]
    return found


def _are_equal(rule: _Rule, one: float, other: float) -> bool:
    """Whether a rule does not tell two values, of one sign, apart."""
    return one == other or (rule.is_close and max(abs(one), abs(other)) <= _CLOSE * min(abs(one), abs(other)))


def _rules(question: Question) -> list[_Rule]:
    """In the order in which they count for a goal.

    First what a goal admits: ``quality``, no loss that evaluations tell from the original; ``latency``, a small one of
    the weights; ``throughput`` and ``memory``, a small one of weights and cache, which then is to be verified. Then
    what engines that serve run, as what nobody runs helps nobody, and what is not dequantized as a whole, which saves
    no time; then what the goal asks for. Where many are served, prompts come among the steps of others, and formats
    that are multiplied faster win; where one is, a prompt is a small part of the time (arXiv 2309.06180, figure 11: 161
    tokens, and 338 of answers), and the smaller loss wins.
    """
    prefill = _Rule(lambda option: math.inf if option.prefill is None else option.prefill, _says_prefill, is_close=True)
    unread = _Rule(lambda option: option.cache_rank > 1, _says_unread)
    room = (
        _Rule(lambda option: -option.tokens_held, _says_room, is_close=True)
        if question.serves_many
        else _Rule(lambda option: -option.longest_context, _says_context, is_close=True)
    )
    rules = [
        _Rule(lambda option: _excess(option, question), _says_loss),
        _Rule(lambda option: option.layers_rank, _says_engines),
        *([] if question.goal == "memory" else [unread]),
        _goal(question),
        *([prefill] if question.serves_many else []),
        _Rule(lambda option: option.cache_rank, _says_cache),
        room,
        _Rule(lambda option: option.loss if option.loss is not None else math.inf, _says_loss),
        *([] if question.serves_many else [prefill]),
        _Rule(lambda option: len(option.candidate.passes), lambda *_: "as good, with more passes"),
    ]
    return rules


def _excess(option: Option, question: Question) -> int:
    """By how many levels the losses go beyond what a goal admits."""
    admitted = {"latency": (1, 0), "throughput": (1, 1), "memory": (1, 1)}.get(question.goal, (0, 0))
    return sum(max(level - most, 0) for level, most in zip(option.levels, admitted, strict=True))


def _goal(question: Question) -> _Rule:
    if question.goal == "throughput":
        return _Rule(lambda option: -option.tokens_per_second, _says_throughput, is_close=True)
    if question.goal == "memory":
        return _Rule(lambda option: option.footprint.total, _says_memory, is_close=True)
    return _Rule(lambda option: option.decode.seconds, _says_decode, is_close=True)


def _percent(option: Option) -> str:
    return "an unknown loss" if option.loss is None else f"{option.loss:.4f} nats"


def _says_loss(option: Option, first: Option) -> str:
    if option.levels[1] > first.levels[1] and option.levels[0] <= first.levels[0]:
        return f"its cache loses more: {_percent(option)} expected, {_percent(first)} of {first.candidate.name}"
    return f"loses more: {_percent(option)} expected, {_percent(first)} of {first.candidate.name}"


def _says_engines(option: Option, first: Option) -> str:
    who = ", ".join(taker.text for taker in option.takers) or "nothing"
    return f"no engine that serves runs its layers fused (taken by {who})"


def _says_unread(option: Option, first: Option) -> str:
    who = ", ".join(taker.text for taker in option.takers)
    return f"{who} dequantizes it ahead of products and attention, which saves memory and no time"


def _says_cache(option: Option, first: Option) -> str:
    return f"its cache is not taken from a file by engines that serve; that of {first.candidate.name} is"


def _says_decode(option: Option, first: Option) -> str:
    bound = "multiplies" if option.decode.is_compute_bound else "reads"
    return f"slower: {bound} {option.decode.seconds * 1e3:.2f} ms a step, {first.decode.seconds * 1e3:.2f} at best"


def _says_throughput(option: Option, first: Option) -> str:
    ours, theirs = option.tokens_per_second, first.tokens_per_second
    return (
        f"fewer tokens: {ours:,.0f} a second of {option.largest_batch} sequences, "
        f"{theirs:,.0f} of {first.largest_batch} at best"
    )


def _says_memory(option: Option, first: Option) -> str:
    return f"larger: {option.footprint.total / 1e9:.1f} GB, {first.footprint.total / 1e9:.1f} at best"


def _says_prefill(option: Option, first: Option) -> str:
    if option.prefill is None:
        return "decodes as fast, but how fast its layers are multiplied there is unknown"
    what = "its layers" if option.candidate.name != NONE else "layers in 16 bits"
    return (
        f"decodes as fast, but {what} are multiplied slower: prompts take {option.prefill:.2f} s, "
        f"{first.prefill or 0:.2f} at best"
    )


def _says_room(option: Option, first: Option) -> str:
    return (
        f"has room for fewer sequences: {option.tokens_held:,.0f} cached tokens, {first.tokens_held:,.0f} of "
        f"{first.candidate.name}"
    )


def _says_context(option: Option, first: Option) -> str:
    return f"holds {option.longest_context:,} tokens, {first.candidate.name} {first.longest_context:,}"
