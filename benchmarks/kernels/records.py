"""What sections hand back: plain values that go through JSON, from the process that measures to the one that writes."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Baseline", "Environment", "Failure", "LeftOut", "Record", "Time", "Verdict", "from_fields", "to_fields"]


@dataclass(frozen=True)
class Verdict:
    """One check.

    Attributes:
        section: it belongs to.
        name: what was checked.
        passed: whether it held.
        detail: the error found and the one allowed, or what went wrong.
        measure: of several of a kind, the one whose detail is worth showing has the largest.
    """

    section: str
    name: str
    passed: bool
    detail: str
    measure: float = 0.0


@dataclass(frozen=True)
class Environment:
    """What the times of one process are held against.

    Attributes:
        section: the process.
        timer: how times were taken, in words.
        copy_bandwidth: bytes read and written per second by a copy of a large tensor.
        floor: seconds that a kernel takes which does nothing.
    """

    section: str
    timer: str
    copy_bandwidth: float
    floor: float


@dataclass(frozen=True)
class Time:
    """One figure.

    Attributes:
        section: the table it goes into.
        shape: what was computed, equal for all that compete.
        name: the number format or recipe.
        implementation: what computed it.
        cold: seconds, operands from memory.
        warm: seconds, operands where the last launch left them; None where that was not asked.
        nbytes: that have to be moved: weights or cache, scales, input and output.
        units: results per launch (tokens, for whole decoding steps); 0 where that means nothing.
        note: anything a reader has to know.
    """

    section: str
    shape: str
    name: str
    implementation: str
    cold: float
    warm: float | None
    nbytes: int
    units: int = 0
    note: str = ""


@dataclass(frozen=True)
class Baseline(Time):
    """A figure that others of its shape are compared with; the fastest of several counts."""


@dataclass(frozen=True)
class Failure:
    """A case that raised, crashed or hung."""

    section: str
    name: str
    detail: str


@dataclass(frozen=True)
class LeftOut:
    """A case that was not run, and why."""

    section: str
    name: str
    reason: str


Record = Verdict | Environment | Time | Failure | LeftOut
_KINDS = {kind.__name__: kind for kind in (Verdict, Environment, Time, Baseline, Failure, LeftOut)}


def to_fields(record: Record) -> dict[str, Any]:
    """Plain JSON fields."""
    return {"kind": type(record).__name__, **asdict(record)}


def from_fields(fields: dict[str, Any]) -> Record:
    """The inverse of `to_fields`."""
    rest = {key: value for key, value in fields.items() if key != "kind"}
    record: Record = _KINDS[fields["kind"]](**rest)
    return record
