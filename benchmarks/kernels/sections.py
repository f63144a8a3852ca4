"""What a section is, and the loop that the process of a section runs.

A section's module has ``cases(bench) -> Iterator[Case]``: quick to walk, always the same for the same options, so that
a process that crashed can be followed by one that starts behind the case at fault.
"""

import gc
import importlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from benchmarks.kernels.records import Environment, Failure, LeftOut, Record, to_fields
from benchmarks.kernels.times.timers import (
    Call,
    Timer,
    copy_bandwidth,
    launch_floor,
    timer_for,
)

__all__ = ["LOST_DEVICE", "SECTIONS", "Bench", "Case", "Section", "print_event", "section_named", "work"]

LOST_DEVICE = 3
"""Exit code of a process whose device no longer answers: after an illegal access all else would fail with it."""
_WORST_TRACEBACK = 1500

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Section:
    """A part of the run, in processes of its own.

    Attributes:
        name: for ``--only``, and in records.
        title: of its table.
        module: in this package.
        share: of the time, relative to the other sections of its kind.
        mode: ``background``: beside all others; ``together``: beside others of this mode; ``alone``: times are taken.
        case_seconds: after which a case counts as hanging.
    """

    name: str
    title: str
    module: str
    share: float
    mode: Literal["background", "together", "alone"]
    case_seconds: float = 90.0

    @property
    def is_timed(self) -> bool:
        """Whether it takes times, and needs the machine to itself."""
        return self.mode == "alone"


SECTIONS = (
    Section("machine-code", "Machine code", "checks.ahead_of_time", 1, "background", case_seconds=600),
    Section("check-weight-only", "Checks of weight-only layers", "checks.linear", 1, "together"),
    Section("check-scaled", "Checks of layers with 8-bit activations", "checks.linear", 1, "together"),
    Section("check-codebook", "Checks of codebook layers", "checks.linear", 1, "together"),
    Section("check-rows", "Checks of activation quantizers", "checks.rows", 1, "together"),
    Section("check-cache", "Checks of caches and attention", "checks.caches", 1, "together"),
    Section("check-model", "Checks of a whole model", "checks.model", 1, "together"),
    Section("linear", "Linear layers", "times.linear", 170, "alone"),
    Section("attention", "Decode attention", "times.attention", 50, "alone"),
    Section("decoding", "Decoding, end to end", "times.decoding", 90, "alone"),
)
"""All sections, in the order they are run."""
CHECKS_SHARE = 110
"""The share of all that run together, beside the shares of those that run alone."""


def section_named(name: str) -> Section:
    """The section of that name."""
    return next(section for section in SECTIONS if section.name == name)


@dataclass
class Bench:
    """What a case is given.

    Attributes:
        section: it belongs to.
        device: to run on.
        quick: whether small shapes and few of them are enough.
        tune: whether launch configurations are searched for before times are taken.
        deadline: `time.monotonic` at which the section's time is over.
        timer: of the device.
    """

    section: Section
    device: torch.device
    quick: bool = False
    tune: bool = False
    deadline: float = float("inf")
    timer: Timer = field(init=False)

    def __post_init__(self) -> None:
        self.timer = timer_for(self.device)
        self._kept: dict[str, tuple[object, Any]] = {}

    @property
    def is_small(self) -> bool:
        """Whether shapes have to be small."""
        return self.quick or self.device.type != "cuda"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of activations that are checked: those of kernels, which on a CPU take bfloat16, and of the reference."""
        found = (torch.float16, torch.bfloat16) if self.device.type == "cuda" else (torch.bfloat16, torch.float32)
        return found[:1] if self.quick else found

    @property
    def l2_bytes(self) -> int:
        """Of the device; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def keep(self, slot: str, key: object, make: Callable[[], Kept]) -> Kept:
        """What ``make`` gave for this key the last time; what the slot held for another key is let go first."""
        held = self._kept.get(slot)
        if held is None or held[0] != key:
            self.drop(slot)
            self._kept[slot] = (key, make())
        found: Kept = self._kept[slot][1]
        return found

    def drop(self, *slots: str) -> None:
        """Lets go of what slots hold, and of the memory."""
        if not [slot for slot in slots if self._kept.pop(slot, None) is not None]:
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def search(self, calls: Sequence[Call]) -> None:
        """Finds, and keeps, the fastest configuration of every kernel that the calls launch, if that was asked for.

        Args:
            calls: the same launches on different operands.
        """
        if not self.tune or self.device.type != "cuda":
            return
        from qcompiler.lowering.kernels.launch import tuning

        def run() -> None:
            for call in calls:
                call()

        def seconds(run: Call) -> float:
            try:
                return self.timer.measure([run])
            except Exception:  # a configuration that this device does not take
                return math.inf

        tuning.search_launches(run, seconds, tuning.device_name(self.device))


@dataclass(frozen=True)
class Case:
    """One thing that is checked or timed.

    Attributes:
        name: of the case.
        run: gives its records.
    """

    name: str
    run: Callable[[Bench], Iterable[Record]]


Event = dict[str, Any]


def print_event(event: Event) -> None:
    """Events as lines on standard output, which the driver reads."""
    print(json.dumps(event), flush=True)


def work(
    bench: Bench, emit: Callable[[Event], None], first: int = 0, clock: Callable[[], float] = time.monotonic
) -> int:
    """Runs the cases of a section until they, or its time, are at an end.

    Args:
        bench: the section and where to run it.
        emit: takes ``{"begin": index, "name": ...}``, ``{"record": ...}`` and, at the end, ``{"done": True}``.
        first: the case to start with.
        clock: seconds.

    Returns:
        The exit code: 0, or `LOST_DEVICE`.
    """
    section = bench.section

    def hand_back(record: Record) -> None:
        emit({"record": to_fields(record)})

    if section.is_timed:
        emit({"begin": -1, "name": "copy bandwidth"})
        try:
            hand_back(_environment(bench))
        except Exception:
            hand_back(Failure(section.name, "copy bandwidth", _explain()))
            if not _answers(bench.device):
                return LOST_DEVICE
    module = importlib.import_module(f"benchmarks.kernels.{section.module}")
    cases: Iterator[Case] = module.cases(bench)
    for index, case in enumerate(cases):
        if index < first:
            continue
        if clock() >= bench.deadline:
            hand_back(LeftOut(section.name, case.name, "out of time"))
            continue
        emit({"begin": index, "name": case.name})
        try:
            for record in case.run(bench):
                hand_back(record)
        except Exception:
            hand_back(Failure(section.name, case.name, _explain()))
            bench.drop(*bench._kept)
            if not _answers(bench.device):
                return LOST_DEVICE
    emit({"done": True})
    return 0


def _environment(bench: Bench) -> Environment:
    bandwidth = copy_bandwidth(bench.timer, bench.device)
    floor = launch_floor(bench.timer, bench.device)
    return Environment(bench.section.name, bench.timer.description, bandwidth, floor)


def _explain() -> str:
    return traceback.format_exc()[-_WORST_TRACEBACK:]


def _answers(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return False
    return True
