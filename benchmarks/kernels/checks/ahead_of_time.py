"""Every kernel compiled ahead of time, in all its configurations, and its machine code held against what it must be.

Needs no GPU. One process per module and compute capability, several at a time, at low priority: other sections run
beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.kernels.records import LeftOut, Record, Verdict
from benchmarks.kernels.sections import Bench, Case

__all__ = ["cases", "modules"]

_ROOT = Path(__file__).resolve().parents[3]
_RESERVE = 8.0
_CAPABILITIES = (90, 80)
_COMPILER = "qcompiler.lowering.kernels.launch.machine_code"


def modules() -> list[str]:
    """All modules with kernels that can be compiled ahead of time."""
    folder = _ROOT / "lowering" / "kernels"
    found = [path for path in sorted(folder.glob("*/triton_*.py")) if "def ahead_of_time(" in path.read_text("utf-8")]
    return [f"qcompiler.lowering.kernels.{path.parent.name}.{path.stem}" for path in found]


def cases(bench: Bench) -> Iterator[Case]:
    """One per module and compute capability; that of Hopper first."""
    jobs = [Job(module, capability) for capability in _CAPABILITIES for module in modules()]
    for job in jobs:
        yield Case(str(job), _case(job, jobs))


@dataclass(frozen=True)
class Job:
    """A module to compile, and what for."""

    module: str
    capability: int

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]} sm_{self.capability}"


def _case(job: Job, jobs: Sequence[Job]) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        started = bench.keep("processes", "all", lambda: _Processes(jobs, bench.device.type == "cuda"))
        yield from started.results(job, bench)

    return run


def _command(job: Job) -> list[str]:
    compiler = [sys.executable, "-m", _COMPILER, job.module, "--capability", str(job.capability)]
    return ["nice", "-n", "10", *compiler]


class _Processes:
    """The compilers of all modules, a few at a time."""

    def __init__(self, jobs: Sequence[Job], beside_a_gpu: bool) -> None:
        self._waiting = list(jobs)
        self._running: dict[Job, tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]] = {}
        cores = os.cpu_count() or 1
        self._most = max(1, cores // 2 if beside_a_gpu else cores)

    def _start(self) -> None:
        while self._waiting and sum(p.poll() is None for p, _, _ in self._running.values()) < self._most:
            job = self._waiting.pop(0)
            output, errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            process = subprocess.Popen(_command(job), cwd=_ROOT, env=environment, stdout=output, stderr=errors)
            self._running[job] = (process, output, errors)

    def results(self, job: Job, bench: Bench) -> Iterator[Record]:
        """What the compiler of one module says; waits for it, as long as there is time."""
        self._start()
        while (job not in self._running or self._running[job][0].poll() is None) and _has_time(bench):
            time.sleep(0.2)
            self._start()
        if job not in self._running:
            yield LeftOut(bench.section.name, str(job), "out of time")
            return
        process, output, errors = self._running[job]
        is_done = process.poll() is not None
        if not is_done:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        said, complained = (stream.read().decode(errors="replace") for stream in (output, errors))
        output.close()
        errors.close()
        found = list(_verdicts(bench.section.name, job, said.splitlines()))
        yield from found
        if not is_done:
            yield LeftOut(bench.section.name, f"{job} after {len(found)} cases", "out of time")
        elif not found or (process.returncode != 0 and all(verdict.passed for verdict in found)):
            detail = f"exit code {process.returncode}, {len(found)} cases: {complained.strip()[-800:]}"
            yield Verdict(bench.section.name, f"{job}: compiler", False, detail)


def _has_time(bench: Bench) -> bool:
    return time.monotonic() < bench.deadline - _RESERVE


def _verdicts(section: str, job: Job, lines: Sequence[str]) -> Iterator[Verdict]:
    for line in lines:
        code = _parsed(line)
        if code is None:
            continue
        label = f"{job}: {code['name']}"
        if code["failures"]:
            yield Verdict(section, label, False, "; ".join(code["failures"]))
            continue
        detail = f"{code['registers']} registers, {code['shared_bytes']} bytes shared"
        if code["instructions_per_weight"] is not None:
            detail += f", {code['instructions_per_weight']:.2f} instructions per weight"
        yield Verdict(section, label, True, detail, code["instructions_per_weight"] or 0.0)


def _parsed(line: str) -> dict[str, Any] | None:
    """One line of the compiler; None for one cut short when it was stopped."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "failures" in found else None
