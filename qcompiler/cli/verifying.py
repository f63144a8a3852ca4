"""The command ``verify``: what an engine makes of a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcompiler import to_target
from qcompiler.cli.options import Json, Threads, first_tokens
from qcompiler.reporting import print_table
from qcompiler.sweep import use_threads

__all__ = ["verify"]


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="What --to checkpoint wrote, such as OUT/checkpoint.")],
    reader: Annotated[str, typer.Option(help="The engine: transformers, vllm, llama.cpp or gptqmodel.")],
    native: Annotated[
        Path | None, typer.Option(help="The native artifact it was written of; by default beside it.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="The Python of an environment that has the engine; by default this one.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text whose first tokens are given; by default random ones.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the engine may take.")] = 3600,
    threads: Threads = None,
    as_json: Json = False,
) -> dict[str, Any]:
    """Let an engine read CHECKPOINT, and compare what it computes with the native artifact."""
    use_threads(threads)
    found = to_target.verify(
        checkpoint,
        reader,
        native=native,
        python=python,
        tokens=None if text is None else first_tokens(text, checkpoint),
        timeout=timeout,
    )
    if not as_json:
        print_table({key: value for key, value in found.items() if value is not None})
    return found
