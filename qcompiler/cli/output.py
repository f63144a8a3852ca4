"""Where a command writes: a directory that is filled aside, and takes its place when all went well."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qcompiler.errors import InputError

__all__ = ["refuse_to_replace", "staged_directory"]


def refuse_to_replace(output: Path, model: Path) -> None:
    """Stops before an overwritten output takes the model with it."""
    if model.resolve().is_relative_to(output.resolve()):
        raise InputError("the output would replace the model", where=output, remedy="choose another directory")


@contextlib.contextmanager
def staged_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """A directory that becomes ``output`` when all went well, and vanishes otherwise."""
    if output.exists() and not output.is_dir():
        raise InputError("the output is a file", where=output, remedy="choose another directory")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise InputError(
            "the output exists and is not empty", where=output, remedy="choose another directory, or add --overwrite"
        )
    staged = output.parent / f".{output.name}.{os.getpid()}.partial"
    with _write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    replaced = output.parent / f".{output.name}.{os.getpid()}.replaced"
    try:
        yield staged
        with _write_errors(output):
            if output.exists():
                os.replace(output, replaced)
            os.replace(staged, output)
    finally:
        if replaced.exists() and not output.exists():
            os.replace(replaced, output)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError("the output cannot be written", where=output, got=os.strerror(error.errno or 0)) from error
