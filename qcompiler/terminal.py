"""What people see in a terminal: a bar on standard error while something long is done, tables on standard output."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qcompiler.report import peak_rss_bytes

__all__ = ["print_rows", "print_table", "show_progress"]


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr with what is done, what is left, time and memory."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total, description: None
        return
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
            text = description if len(description) < 48 else description[:45] + "..."
            bar.update(
                task, completed=done, total=total, description=text, memory=f"peak {peak_rss_bytes() / 2**20:,.0f} MiB"
            )

        yield show


def print_table(fields: dict[str, Any]) -> None:
    """Prints one line per field."""
    width = max(len(key) for key in fields)
    for key, value in fields.items():
        print(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
