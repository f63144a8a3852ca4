"""Output files and directories that appear whole, synced to disk and together, or not at all."""

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qcompiler.errors import InputError, QCompilerError, ResourceError

__all__ = [
    "StagedFiles",
    "filled_directory",
    "made_directory",
    "output_path",
    "remove_tree",
    "undisturbed",
    "write_errors",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_EMPTY = ("lost+found",)  # what a file system that holds nothing may hold


class StagedFiles:
    """Files written beside their final names and renamed to them, in order, when the ``with`` block ends well.

    Every file is synced to disk before the first rename, and the directory after the last. If the block fails, or a
    rename does, nothing is left under a temporary name, nor under a final one that this block made; a file that was
    there before stays whole, older or newer.

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
        with write_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        return self

    @contextmanager
    def file(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """Opens a file; yields a function that appends bytes to it. ``a/b`` lies in a folder, made if missing."""
        final = self._directory / name
        temporary = final.parent / f".{final.name}.{os.getpid()}.partial"
        self._staged.append((temporary, final))
        with write_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

        def write(data: bytes | memoryview) -> None:
            view = memoryview(data)
            with write_errors(final):
                while len(view):
                    view = view[os.write(fd, view) :]

        try:
            yield write
            with write_errors(final):
                os.fsync(fd)
        finally:
            os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        made: list[Path] = []
        with undisturbed():
            try:
                if kind is None:
                    for temporary, final in self._staged:
                        is_new = not os.path.lexists(final)
                        with write_errors(final):
                            os.replace(temporary, final)
                        if is_new:
                            made.append(final)
                    with write_errors(self._directory):
                        _sync_directory(self._directory)
            except BaseException:
                for final in made:
                    final.unlink(missing_ok=True)
                raise
            finally:
                for temporary, _ in self._staged:
                    with suppress(FileNotFoundError, NotADirectoryError):
                        temporary.unlink()
                    if temporary.parent != self._directory:
                        with suppress(OSError):  # a folder with files in it stays
                            temporary.parent.rmdir()


def output_path(path: str | Path) -> Path:
    """Where an output goes: what a link points at, if it is or may become a directory.

    Raises:
        InputError: for a link that points nowhere, or a file.
    """
    given = Path(path)
    with write_errors(given):
        resolved = Path(os.path.realpath(given))
        if given.is_symlink() and not resolved.exists():
            raise InputError(
                "the output is a link that points nowhere",
                where=given,
                got=resolved,
                expected="a link to a directory",
                remedy="make that directory, or choose another output",
            )
        if resolved.exists() and not resolved.is_dir():
            raise InputError("the output is a file", where=given, remedy="choose another directory")
    return resolved


@contextmanager
def made_directory(root: Path) -> Iterator[None]:
    """Makes a directory, with its parents; those it made go again, as far as empty, when the ``with`` block ends."""
    with write_errors(root):
        made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        with write_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with undisturbed():
            for path in made:
                with suppress(OSError):  # it holds something, of this run or of somebody else; or it is not there
                    path.rmdir()


@contextmanager
def filled_directory(directory: str | Path, last: str) -> Iterator[Path]:
    """A place for files that appear in ``directory`` together when the ``with`` block ends well.

    The place lies inside the directory, which may therefore be a mount point, the working directory, or a link to
    either; ``last`` comes behind all other files, so that where it is, they are. If the block fails, nothing is left,
    and the directory goes too if it was made here. Nothing is ever replaced.

    Raises:
        InputError: if the directory is not empty, cannot be written, or is given files by somebody else meanwhile.
        ResourceError: if the disk is full.
    """
    root = output_path(directory)
    with write_errors(root):
        found = sorted(path.name for path in root.iterdir() if path.name not in _IN_EMPTY) if root.exists() else []
    if found:
        raise InputError(
            "the output is not empty",
            where=directory,
            got=", ".join(found[:4]) + (", ..." if len(found) > 4 else ""),
            remedy="choose another directory",
        )
    staged: Path | None = None
    with made_directory(root), write_errors(root):
        try:
            with undisturbed():
                staged = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
            yield staged
            _move_content(staged, root, last)
        finally:
            if staged is not None:
                remove_tree(staged)


def _move_content(staged: Path, root: Path, last: str) -> None:
    moved: list[Path] = []
    try:
        with undisturbed():
            for path in sorted(staged.iterdir(), key=lambda path: (path.name == last, path.name)):
                if path.name == last:
                    _sync_directory(root)
                final = root / path.name
                if os.path.lexists(final):
                    raise InputError("the output was given this file by somebody else meanwhile", where=final)
                os.rename(path, final)
                moved.append(final)
            _sync_directory(root)
    except BaseException:
        with undisturbed():
            for path in moved:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        raise


def remove_tree(path: str | Path) -> None:
    """Removes a directory of our own as far as it can be; a signal does not stop that halfway."""
    with undisturbed():
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts off what Python does on SIGINT, SIGTERM and SIGHUP to the end of the block.

    Half a clean-up leaves things behind. Signals that are ignored, or that end the process by themselves, stay so.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main one
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in handled:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
        for pending in dict.fromkeys(came):
            signal.raise_signal(pending)


def _sync_directory(path: Path) -> None:
    """Makes renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def write_errors(where: Path) -> Iterator[None]:
    """Makes a system error of the block an `InputError` about ``where``, or a `ResourceError` if the disk is full."""
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
                remedy="free some space or choose another directory; nothing of it was left behind",
            )
        else:
            failure = InputError("the output cannot be written", where=where, got=reason)
        raise failure from error
