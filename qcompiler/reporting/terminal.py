"""What people see: progress on standard error while something long is done, tables on standard output."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self, TextIO

from qcompiler.reporting.report import peak_rss_bytes

__all__ = ["print_rows", "print_table", "show_progress"]


@contextmanager
def show_progress(quiet: bool, *, every: float = 10.0) -> Iterator[Callable[[int, int, str], None]]:
    """What is done, what is left, time and memory, on stderr: a bar in a terminal, else a line now and then.

    Args:
        quiet: show nothing.
        every: seconds between lines where stderr is no terminal; they come whether or not anything has been reported.

    Yields:
        A function of steps done, steps in all (0 where nobody knows) and what is being done.
    """
    if quiet:
        yield lambda done, total, description: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        lines = _Lines(sys.stderr, every)
        with lines:
            yield lines.show


class _Lines:
    """Writes a line about the latest state every few seconds, from a thread of its own."""

    def __init__(self, stream: TextIO, every: float) -> None:
        self._stream, self._every = stream, every
        self._start = self._since = time.monotonic()
        self._state = (0, 0, "starting")
        self._first = 0  # steps done when the present description of their kind began
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def show(self, done: int, total: int, description: str) -> None:
        """Takes the latest state."""
        if total != self._state[1]:
            self._since, self._first = time.monotonic(), done
        self._state = (done, total, description)

    def _write(self) -> None:
        while not self._ended.wait(self._every):
            done, total, description = self._state
            now = time.monotonic()
            parts = [
                f"{done} of {total}: {description}" if total else description,
                f"{_clock(now - self._start)} elapsed",
            ]
            if total and done > self._first:
                left = (now - self._since) / (done - self._first) * (total - done)
                parts.append(f"about {_clock(left)} left")
            parts.append(f"peak {peak_rss_bytes() / 2**20:,.0f} MiB")
            with suppress(OSError, ValueError):  # whoever read it is gone, and the work goes on
                print("; ".join(parts), file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, memory="")

        def show(done: int, total: int, description: str) -> None:
            bar.update(
                task,
                completed=done,
                total=total or None,
                description=description if len(description) < 48 else description[:45] + "...",
                memory=f"peak {peak_rss_bytes() / 2**20:,.0f} MiB",
            )

        yield show


def print_table(fields: dict[str, Any]) -> None:
    """Prints one line per field."""
    width = max(len(key) for key in fields)
    for key, value in fields.items():
        print(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


_MOST_KEPT = 32


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, whose first column keeps its width where the terminal is too narrow."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    table.columns[0].min_width = min(_MOST_KEPT, max(len(row[0]) for row in rows)) if rows else None
    for row in rows:
        table.add_row(*row)
    Console().print(table)
