"""How many threads to compute with: the cores that this process may use, less those that others are using.

PyTorch takes every core it sees. Where others compute too, or a control group grants less time than that, its threads
wait for each other more than they work: a run can take a hundred times as long as with one thread.

The ``qcompiler`` command calls `use_threads`; importing the package changes nothing. Python programs that share a
machine may call it, or `torch.set_num_threads`.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path

import torch

__all__ = ["contention", "sensible_threads", "usable_cores", "use_threads"]

_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LOOKS, _PAUSE = 5, 0.01  # at the number of running tasks, and seconds between
_ROUNDS, _CALLS, _ELEMENTS = 5, 20, 200_000  # of the trial: some milliseconds; operators of this size are divided
_MUCH_SLOWER = 2.0


def use_threads(asked: int | None = None) -> int:
    """Sets PyTorch's number of threads for this process.

    Args:
        asked: exactly so many; None: `sensible_threads`, but never more than there are now, and none of our business
            where ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` is set.

    Returns:
        How many there are.
    """
    if asked is not None:
        torch.set_num_threads(asked)
    elif not any(os.environ.get(name) for name in _SET_BY_USER):
        now = torch.get_num_threads()  # as it came, or as somebody set it
        if now > 1 and (found := sensible_threads(usable_cores(), others_running())) < now:
            torch.set_num_threads(found)
    return torch.get_num_threads()


def sensible_threads(cores: int, others: int) -> int:
    """A thread for each core that is free, but for half of the cores at least, and one: others may end soon.

    Args:
        cores: that may be used.
        others: tasks that are running.
    """
    return max(ceil(cores / 2), cores - others, 1)


def usable_cores(root: Path = Path("/"), affinity: int | None = None) -> int:
    """The cores this process is allowed, by affinity and by the time its control groups grant; at least one.

    Args:
        root: where ``proc`` and ``sys`` are.
        affinity: cores it may run on; None: as the system says.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([float(affinity), *_quotas(root)])))


def _quotas(root: Path) -> list[float]:
    """Cores granted by this process's control groups and those above, of either version."""
    found: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        bases = ["sys/fs/cgroup"] if not controllers else [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in bases:
            for depth in range(len(parts), -1, -1):  # in a container the path may be that of the host: the top holds
                place = root.joinpath(base, *parts[:depth])
                if controllers:
                    text = f"{_read(place / 'cpu.cfs_quota_us')} {_read(place / 'cpu.cfs_period_us')}"
                else:
                    text = _read(place / "cpu.max")
                quota, period = (*text.split(), "", "")[:2]
                if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", not -1
                    found.append(int(quota) / int(period))
    return found


def others_running(root: Path = Path("/")) -> int:
    """Tasks beside this one that run or wait for a core, as the median of a few looks; 0 where nobody tells.

    Not the load average: that still counts what has ended a minute ago.

    Args:
        root: where ``proc`` is.
    """
    counts = []
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE)
        fields = _read(root / "proc/loadavg").split()  # such as 0.20 0.18 0.12 1/80 11206
        running = fields[3].partition("/")[0] if len(fields) > 3 else ""
        counts.append(int(running) - 1 if running.isdecimal() else 0)
    return max(0, int(statistics.median(counts)))


def contention(measure: Callable[[int], float] | None = None) -> str | None:
    """A sentence for the user if threads are in each other's way right now; None if they are not.

    CPU time cannot tell: a thread that waits in a loop uses as much as one that works. So it is measured: the same
    operators with one thread and with all, in turns; only if all of them were at their best (of five) still twice as
    slow as one is there something to say.

    Args:
        measure: seconds with that many threads.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    measure = measure or _seconds_of_trial
    times: Mapping[int, list[float]] = {1: [], threads: []}
    for _ in range(_ROUNDS):
        for count, found in times.items():
            found.append(measure(count))
    ratio = min(times[threads]) / min(times[1])
    if ratio < _MUCH_SLOWER:
        return None
    return (
        f"{threads} threads are in each other's way: small operators take {ratio:.1f} times as long as with one, "
        "because other programs use the same cores; try --threads 1 (in Python torch.set_num_threads(1)), or "
        "OMP_WAIT_POLICY=passive"
    )


def _seconds_of_trial(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.zeros(_ELEMENTS)
        values.add(1.0)
        start = time.perf_counter()
        for _ in range(_CALLS):
            values.add(1.0)
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(before)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
