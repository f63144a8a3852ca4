"""``python -m benchmarks.kernels [--quick] [--only SECTION...] [--out DIR] [--device cuda|cpu] [--tune]``."""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.kernels.driver import Driver, worker_command
from benchmarks.kernels.machine import describe
from benchmarks.kernels.records import Record
from benchmarks.kernels.sections import SECTIONS, Bench, print_event, section_named, work
from benchmarks.kernels.tables import has_failed, markdown, write

__all__ = ["main"]

_RESULTS = Path(__file__).resolve().parents[1] / "results"
_SECONDS, _TUNING = 450.0, 3600.0
NO_DEVICE = 2
"""Exit code where there is nothing to run on."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections and writes the tables.

    Returns:
        0; 1 if a check did not hold or a case broke; 2 without a CUDA device, unless a CPU was asked for.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, and few of them")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], default=None)
    parser.add_argument("--out", type=Path, default=_RESULTS, help="a directory for the tables")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, help=f"for everything (default {_SECONDS:.0f}; tuning {_TUNING:.0f})")
    parser.add_argument("--tune", action="store_true", help="search for launch configurations first, and keep them")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # what a process of a section is started with
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if options.seconds is None:
        options.seconds = _TUNING if options.tune else _SECONDS
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.kernels: no CUDA device. Run it on a machine with one, or try it with --device cpu, which "
            "checks the CPU implementations and gives no GPU figures.",
            file=sys.stderr,
        )
        return NO_DEVICE
    device = torch.device(options.device)
    if options.section is not None:
        deadline = started + options.seconds
        bench = Bench(section_named(options.section), device, options.quick, options.tune, deadline)
        return work(bench, print_event, options.first)
    return _run(options, device)


def _run(options: argparse.Namespace, device: torch.device) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the processes started
    is_gpu = device.type == "cuda"
    machine = describe(device)
    command = "make gpu" if is_gpu else "python -m benchmarks.kernels --device cpu"
    path = options.out / ("gpu" if is_gpu else "kernels_cpu")

    def keep(records: list[Record]) -> None:
        write(path, machine, records, driver.taken, is_gpu=is_gpu, command=command)

    worker = worker_command(options.device, *(f"--{name}" for name in ("quick", "tune") if getattr(options, name)))
    driver = Driver(worker, options.seconds, _say, keep, patience=10.0 if options.tune else 1.0)
    records = driver.run([s for s in SECTIONS if options.only is None or s.name in options.only])
    keep(records)
    print(markdown(machine, records, driver.taken, is_gpu=is_gpu, command=command))
    _say(f"written: {path}.md and {path}.json")
    return int(has_failed(records))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
