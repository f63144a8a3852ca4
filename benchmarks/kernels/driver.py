"""Runs sections as processes of their own: one that crashes or hangs costs its case, never the run."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.kernels.records import Failure, LeftOut, Record, from_fields
from benchmarks.kernels.sections import CHECKS_SHARE, LOST_DEVICE, Section

__all__ = ["Driver", "allot", "worker_command"]

_ROOT = Path(__file__).resolve().parents[2]
_GRACE = 15.0
_MOST_CRASHES = 8
_STDERR_TAIL = 1200


def allot(seconds: float, share: float, shares_left: Sequence[float]) -> float:
    """The seconds of a section that gets ``share`` out of ``shares_left``, its own included; what an earlier section
    did not use is thus spread over the later ones.
    """
    return max(0.0, seconds) * share / sum(shares_left)


@dataclass
class Driver:
    """A run.

    Attributes:
        worker: the command of a section's process, without what says which section.
        seconds: for everything.
        say: takes progress, one line at a time.
        keep: called with all records whenever a section has ended.
        grace: seconds that a case which began in time may take beyond its section's time.
        patience: how many times its `Section.case_seconds` a case may take.
    """

    worker: Sequence[str]
    seconds: float
    say: Callable[[str], None] = lambda line: None
    keep: Callable[[list[Record]], None] = lambda records: None
    grace: float = _GRACE
    patience: float = 1.0
    records: list[Record] = field(default_factory=list)
    taken: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._live: list[_Process] = []
        self._is_stopped = False

    def run(self, sections: Sequence[Section]) -> list[Record]:
        """Runs them all; those in the background have all the time there is."""
        try:
            return self._run(sections, time.monotonic() + self.seconds)
        except BaseException:
            self._stop()
            raise

    def _run(self, sections: Sequence[Section], end: float) -> list[Record]:
        together = [s for s in sections if s.mode == "together"]
        alone = [s for s in sections if s.mode == "alone"]
        background = [s for s in sections if s.mode == "background"]
        with ThreadPoolExecutor(max(1, len(background))) as behind:
            waiting = [behind.submit(self._section, section, end - self.grace) for section in background]
            shares = ([CHECKS_SHARE] if together else []) + [s.share for s in alone]
            if together:
                limit = time.monotonic() + allot(self._left(end), CHECKS_SHARE, shares)
                with ThreadPoolExecutor(max(1, min(len(together), (os.cpu_count() or 1) // 2))) as beside:
                    list(beside.map(lambda section: self._section(section, limit), together))
                shares = shares[1:]
            for place, section in enumerate(alone):
                limit = time.monotonic() + allot(self._left(end), section.share, shares[place:])
                self._section(section, limit)
            for future in waiting:
                future.result()
        return self.records

    def _left(self, end: float) -> float:
        return end - self.grace - time.monotonic()

    def _section(self, section: Section, limit: float) -> None:
        start = time.monotonic()
        self.say(f"{section.name}: at most {max(0.0, limit - start):.0f} s")
        first = crashes = 0
        found: list[Record] = []
        while not self._is_stopped:
            process = _Process(self.worker, section, first, limit, self.patience * section.case_seconds)
            self._live.append(process)
            try:
                ended = process.follow(found, limit, self.grace)
            finally:
                self._live.remove(process)
                process.close()
            if ended:
                break
            crashes += 1
            if crashes == _MOST_CRASHES or time.monotonic() >= limit or process.begun is None:
                found.append(LeftOut(section.name, "all further cases", "the process ended early"))
                break
            first = max(first, process.begun + 1)
        failed = sum(1 for record in found if isinstance(record, Failure) or getattr(record, "passed", True) is False)
        with self._lock:
            self.taken[section.name] = time.monotonic() - start
            self.records += found
            self.say(f"{section.name}: {len(found)} results, {failed} failed, {self.taken[section.name]:.0f} s")
            self.keep(self.records)

    def _stop(self) -> None:
        self._is_stopped = True
        for process in list(self._live):
            process.end()


class _Process:
    """One process of a section."""

    def __init__(self, worker: Sequence[str], section: Section, first: int, limit: float, case_seconds: float) -> None:
        self.section = section
        self.case_seconds = case_seconds
        self.begun: int | None = None
        self.name = "start"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        seconds = max(0.0, limit - time.monotonic())
        command = [*worker, "--section", section.name, "--first", str(first), "--seconds", f"{seconds:.1f}"]
        self.process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        assert self.process.stdout is not None
        self._pump = threading.Thread(target=_pump, args=(self.process.stdout, self.lines), daemon=True)
        self._pump.start()

    def follow(self, found: list[Record], limit: float, grace: float) -> bool:
        """Takes records until the process ends; whether the section is done, as opposed to one case of it."""
        since = time.monotonic()
        while True:
            patience = min(since + self.case_seconds, limit + grace) - time.monotonic()
            try:
                line = self.lines.get(timeout=max(0.0, patience))
            except queue.Empty:
                return self._lost_patience(found, since, limit)
            if line is None:
                if self.process.wait() != LOST_DEVICE:  # which has said why
                    found.append(Failure(self.section.name, self.name, self._last_words()))
                return False
            event = _event(line)
            if "begin" in event:
                self.begun, self.name, since = event["begin"], event["name"], time.monotonic()
            elif "record" in event:
                found.append(from_fields(event["record"]))
            elif "done" in event:
                return True

    def _lost_patience(self, found: list[Record], since: float, limit: float) -> bool:
        waited = time.monotonic() - since
        if waited >= self.case_seconds:
            found.append(Failure(self.section.name, self.name, f"no result after {waited:.0f} s: stopped"))
            return False
        found.append(LeftOut(self.section.name, self.name, f"stopped after {waited:.0f} s: out of time"))
        found.append(LeftOut(self.section.name, "all further cases", "out of time"))
        return True

    def _last_words(self) -> str:
        self.errors.seek(0)
        tail = self.errors.read().decode(errors="replace")[-_STDERR_TAIL:].strip()
        return f"the process ended with exit code {self.process.returncode}" + (f": {tail}" if tail else "")

    def end(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it, and lets go of what it held."""
        self.end()
        self.process.wait()
        self._pump.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


def _pump(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _event(line: str) -> dict[str, Any]:
    """What a line says; libraries that print to standard output say nothing."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def worker_command(device: str, *options: str) -> list[str]:
    """How this package starts a process of its own."""
    return [sys.executable, "-m", "benchmarks.kernels", "--device", device, *options]


def _environment() -> dict[str, str]:
    """Kernels are to be compiled, not interpreted; Triton 3.9 warns where a default of its successor is not chosen."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {"TRITON_DEFAULT_FP_FUSION": "1", **inherited}
