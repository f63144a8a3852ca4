"""What a rule is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

__all__ = ["Rule", "Verdict"]

Verdict = Literal["refused", "wrong", "unfused"]
"""``refused``: parser or builder fail. ``wrong``: they do not, and the engine computes something else than the file.
``unfused``: the engine computes weights or attention in full precision, in kernels of their own."""

Place = TypeVar("Place")


@dataclass(frozen=True)
class Rule(Generic[Place]):
    """What TensorRT makes of something in an ONNX file.

    Attributes:
        name: short and stable.
        verdict: see `Verdict`.
        condition: given a place in a model and a compute capability such as 89, says what was found there; None where
            the rule does not apply, or what decides is not known.
        reason: why it is so.
        remedy: what to write in its place.
        source: where this was seen.
    """

    name: str
    verdict: Verdict
    condition: Callable[[Place, int], str | None]
    reason: str
    remedy: str
    source: str
