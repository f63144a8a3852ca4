"""Output files that appear whole, synced to disk and together, or not at all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qcompiler.errors import InputError, QCompilerError, ResourceError

__all__ = ["StagedFiles"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StagedFiles:
    """Files written beside their final names and renamed to them, in order, when the ``with`` block ends well.

    Every file is synced to disk before the first rename, and the directory after the last. If the block fails, or a
    rename does, nothing is left under a temporary name, nor under a final one that this block made.

    Args:
        directory: where the files go; made if missing.

    Raises:
        InputError: if the directory or a file cannot be written.
        ResourceError: if the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._staged: list[tuple[Path, Path]] = []

    def __enter__(self) -> Self:
        with _write_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def file(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """Opens a file; yields a function that appends bytes to it. ``a/b`` lies in a folder, made if missing."""
        final = self._directory / name
        temporary = final.parent / f".{final.name}.{os.getpid()}.partial"
        with _write_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._staged.append((temporary, final))

        def write(data: bytes | memoryview) -> None:
            view = memoryview(data)
            with _write_errors(final):
                while len(view):
                    view = view[os.write(fd, view) :]

        try:
            yield write
            with _write_errors(final):
                os.fsync(fd)
        finally:
            os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        made: list[Path] = []
        try:
            if kind is None:
                for temporary, final in self._staged:
                    with _write_errors(final):
                        os.replace(temporary, final)
                    made.append(final)
                with _write_errors(self._directory):
                    _sync_directory(self._directory)
        except BaseException:
            for final in made:
                final.unlink(missing_ok=True)
            raise
        finally:
            for temporary, _ in self._staged:
                temporary.unlink(missing_ok=True)
                if temporary.parent != self._directory:
                    with suppress(OSError):  # a folder with files in it stays
                        temporary.parent.rmdir()


def _sync_directory(path: Path) -> None:
    """Makes renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _write_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        failure: QCompilerError
        if error.errno in _FULL:
            failure = ResourceError(
                "the disk is full, or a limit on file sizes was reached",
                where=where,
                got=reason,
                remedy="free some space or choose another directory; nothing was left behind",
            )
        else:
            failure = InputError("the output cannot be written", where=where, got=reason)
        raise failure from error
