"""`Pipeline`: passes in an order that is proved to work when it is built, cut into stages of one sweep each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import PipelineError
from qcompiler.protocol.pass_base import (
    ACTIVATIONS_QUANTIZED,
    CACHE_QUANTIZED,
    CANONICAL,
    FISHER,
    FLOAT_ACTIVATIONS,
    FLOAT_CACHE,
    FLOAT_WEIGHTS,
    WEIGHTS_QUANTIZED,
    Effect,
    Pass,
)

__all__ = ["Pipeline", "Stage"]


_ENDS = {WEIGHTS_QUANTIZED: FLOAT_WEIGHTS, ACTIVATIONS_QUANTIZED: FLOAT_ACTIVATIONS, CACHE_QUANTIZED: FLOAT_CACHE}
"""Facts that are no longer true where another is."""

_MEASURED = frozenset({FISHER})
"""Facts about the model as it was measured: any pass that may change its weights ends them."""
_LEAVE_WEIGHTS = frozenset({ACTIVATIONS_QUANTIZED, CACHE_QUANTIZED})
"""What passes establish that round values alone."""


@dataclass(frozen=True)
class Stage:
    """Passes that share one sweep.

    Attributes:
        whole_graph: run first, in order.
        swept: applied segment by segment.
    """

    whole_graph: tuple[Pass, ...]
    swept: tuple[Pass, ...]

    @property
    def is_calibrated(self) -> bool:
        """Whether the sweep needs calibration tokens."""
        return any(item.is_calibrated for item in self.swept)


class Pipeline:
    """An ordered sequence of passes.

    Args:
        passes: in the order they are applied. A pass that implies others (``GPTQ(bits=4)`` implies an ``Assign``) has
            them put at the front, or right ahead of it where they are calibrated (``SqueezeLLM()`` implies a
            ``Fisher``); one given explicitly must agree with what is implied.

    Raises:
        PipelineError: if something is no pass, if implied and given passes disagree, if a pass needs a fact nobody
            before it establishes, or if two passes quantize the weights. Of the first of these that occurs, every
            violation is listed.
    """

    def __init__(self, passes: Iterable[Pass]) -> None:
        given: tuple[Any, ...] = tuple(passes)
        wrong = [repr(item) for item in given if not isinstance(item, Pass) or not _does_something(item)]
        if wrong:
            raise PipelineError(
                "a recipe is a sequence of passes",
                got=", ".join(wrong),
                expected="instances of Pass that implement run or rewrite",
            )
        self.passes = _with_implied(given)
        _prove(self.passes)
        self.stages = _stages(self.passes)

    @property
    def is_calibrated(self) -> bool:
        """Whether any pass needs calibration tokens."""
        return any(item.is_calibrated for item in self.passes)


def _does_something(item: Pass) -> bool:
    return item.works_in_sweep or type(item).run is not Pass.run


def _with_implied(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    front: list[Pass] = []
    rest: list[Pass] = []
    added: list[Pass] = []
    problems = []
    for item in passes:
        for wanted in item.implied_passes():
            rivals = [other for other in (*added, *passes) if type(other) is type(wanted)]
            refused = [other for other in rivals if not other.agrees_with(wanted)]
            problems += [f"{type(item).__name__} implies {wanted}, and {other} is there" for other in refused]
            if not rivals:
                added.append(wanted)
                (rest if wanted.is_calibrated else front).append(wanted)
        rest.append(item)
    if problems:
        raise PipelineError(
            "passes disagree about the same thing",
            got="; ".join(problems),
            remedy="give the shorthand alone, or leave its options out",
        )
    return (*front, *rest)


def _prove(passes: tuple[Pass, ...]) -> None:
    facts = {CANONICAL, FLOAT_WEIGHTS, FLOAT_ACTIVATIONS, FLOAT_CACHE}
    ended: dict[str, str] = {}
    problems = []
    for position, item in enumerate(passes):
        name = type(item).__name__
        for fact in sorted(item.requires - facts):
            later = [type(p).__name__ for p in passes[position + 1 :] if fact in p.establishes]
            if fact in ended:
                hint = f"{ended[fact]} has done away with it"
            else:
                hint = f"{later[0]} establishes it, but stands behind" if later else "no pass here establishes it"
            problems.append(f"{name} (position {position}) needs {fact!r}: {hint}")
        if WEIGHTS_QUANTIZED in item.establishes and WEIGHTS_QUANTIZED in facts:
            problems.append(f"{name} (position {position}) quantizes weights that are quantized already")
        lost = item.invalidates | {_ENDS[fact] for fact in item.establishes if fact in _ENDS}
        if item.effect is not Effect.ANALYSIS and not item.establishes & _LEAVE_WEIGHTS:
            lost |= _MEASURED
        ended.update(dict.fromkeys(facts & lost, f"{name} (position {position})"))
        facts = (facts - lost) | item.establishes
    if problems:
        raise PipelineError(
            "the passes cannot run in this order",
            got="; ".join(problems),
            expected="every pass behind the ones that establish what it needs",
        )


def _stages(passes: tuple[Pass, ...]) -> tuple[Stage, ...]:
    """A new stage begins behind a barrier, and where a whole-graph pass stands behind a swept one."""
    stages: list[tuple[list[Pass], list[Pass]]] = [([], [])]
    for item in passes:
        whole, swept = stages[-1]
        if swept and (not item.works_in_sweep or swept[-1].barrier):
            stages.append(([], []))
            whole, swept = stages[-1]
        (swept if item.works_in_sweep else whole).append(item)
    return tuple(Stage(tuple(whole), tuple(swept)) for whole, swept in stages)
