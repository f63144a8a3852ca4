"""Where a command writes: a directory that gets one part after the other, each whole, beside what is there already."""

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcompiler.artifacts import MANIFEST
from qcompiler.errors import InputError
from qcompiler.lowering import targets as known_targets
from qcompiler.protocol import Target
from qcompiler.storage import (
    made_directory,
    output_path,
    remove_tree,
    undisturbed,
    write_errors,
)

__all__ = ["Kept", "Output", "directory_bytes", "opened_output"]

Writers = Sequence[Target | type[Target]]


def directory_bytes(path: Path) -> int:
    """Bytes of all files below a directory: what is shipped."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@dataclass
class Kept:
    """What stands of a command's work, however the command ends.

    Attributes:
        artifacts: paths by name, of what is finished.
        wanted: targets by name, as on the command line.
        source: the artifact they are made of; by default the native one of ``artifacts``.
        output: the directory for all.
        status: with which a command that did its work ends.
    """

    artifacts: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    source: str | None = None
    output: str = ""
    status: int = 0

    def next_command(self) -> str | None:
        """What makes the rest of what was wanted, where something stands to make it of."""
        source = self.source or self.artifacts.get("native")
        missing = [text for name, text in self.wanted.items() if name not in self.artifacts]
        if not self.artifacts or source is None or not missing:
            return None
        options = [word for text in missing for word in ("--to", text)]
        return shlex.join(["qcompiler", "convert", source, *options, "-o", self.output])


@dataclass
class Output:
    """An output directory that this process alone fills.

    Attributes:
        given: the directory as the user named it.
        root: what it is: no link.
        kept: parts that are finished are entered here.
    """

    given: Path
    root: Path
    kept: Kept
    _replaceable: dict[str, tuple[int, int]]  # artifacts found at the start, by device and inode

    @contextlib.contextmanager
    def part(self, name: str, *, outdated: Sequence[str] = ()) -> Iterator[Path]:
        """A place to make ``name`` in, which becomes ``root/name`` when the ``with`` block ends well.

        Artifacts of this name that were found at the start, and those named in ``outdated``, are removed then. If
        something else stands there by now, it stays, and what was made gets another name, which the error tells.

        Raises:
            InputError: if the place cannot be made, or another name had to be taken.
            ResourceError: if the disk is full.
        """
        place = _unused(self.root, f".{name}.partial")
        try:
            with write_errors(self.root):
                self.root.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile
                place.mkdir()
            yield place
            with undisturbed():
                self._put(place, name, outdated)
        except BaseException:
            if name not in self.kept.artifacts:
                remove_tree(place)
            raise

    def _put(self, place: Path, name: str, outdated: Sequence[str]) -> None:
        final, aside = self.root / name, self._set_aside((name, *outdated))
        try:
            if os.path.lexists(final):
                raise FileExistsError("something else stands there by now")
            os.rename(place, final)
        except OSError as error:
            for before, path in aside.items():
                if not os.path.lexists(self.root / before):
                    os.rename(path, self.root / before)
            found = _unused(self.root, name)
            try:
                os.rename(place, found)
            except OSError:
                found = place
            self.kept.artifacts[name] = str(self.given / found.name)
            raise InputError(
                "the output was changed by somebody else meanwhile",
                where=self.given / name,
                got=error.strerror or error,
                remedy=f"what was made is whole, in {self.given / found.name}: move it where it should be",
            ) from error
        self.kept.artifacts[name] = str(self.given / name)
        for path in aside.values():
            remove_tree(path)

    def _set_aside(self, names: Sequence[str]) -> dict[str, Path]:
        aside = {}
        for name in names:
            path = self.root / name
            with contextlib.suppress(OSError):  # what stays where it is is found to be in the way
                if name in self._replaceable and _identity(path) == self._replaceable[name]:
                    hidden = _unused(self.root, f".{name}.replaced")
                    os.rename(path, hidden)
                    aside[name] = hidden
        return aside


def _unused(root: Path, name: str) -> Path:
    """``root/name``, or with the first number behind it that gives a name nobody uses."""
    path, number = root / name, 1
    while os.path.lexists(path):
        number += 1
        path = root / f"{name}-{number}"
    return path


@contextlib.contextmanager
def opened_output(
    path: Path,
    names: Sequence[str],
    kept: Kept,
    *,
    overwrite: bool,
    targets: Sequence[Target] = (),
    model: Path | None = None,
    inputs: Sequence[Path | None] = (),
) -> Iterator[Output]:
    """Checks an output directory, and tries whether it can be written, before the work whose parts go there.

    A link stands for the directory it points at. Files that have nothing to do with us may be in it and stay. It is
    locked until the block ends, and removed if it was made here and got nothing.

    Args:
        path: the directory.
        names: of the artifacts that must not be there already, or are to be replaced.
        kept: filled by what gets finished.
        overwrite: artifacts of these names, if we wrote them, are replaced.
        targets: that the parts are for, beside those that come along: to know what they wrote.
        model: what is compiled; the output may not lie in its directory.
        inputs: what else the work reads, which must not be replaced either.

    Raises:
        InputError: if the output holds, or is, something that it should not, if another run writes to it, or if it
            cannot be written.
    """
    root = output_path(path)
    if model is not None and root.is_relative_to(model.resolve()):
        raise InputError("the output lies in the model's directory", where=path, remedy="choose another directory")
    with made_directory(root), _locked(root, path):
        writers: Writers = [*known_targets(), *targets]
        if _is_ours(root, writers):
            raise InputError("the output is an artifact itself", where=path, remedy="choose the directory around it")
        found = [name for name in names if os.path.lexists(root / name)]
        for name in found:
            _check_replaceable(root / name, overwrite, (model, *inputs), writers)
        _try_renaming(root)
        yield Output(path, root, kept, {name: _identity(root / name) for name in found})


def _check_replaceable(path: Path, overwrite: bool, inputs: Sequence[Path | None], writers: Writers) -> None:
    if any(item is not None and item.resolve().is_relative_to(path.resolve()) for item in inputs):
        raise InputError("the output would replace what is read", where=path, remedy="choose another directory")
    if not overwrite:
        raise InputError(
            "the output has this already", where=path, remedy="choose another directory, or add --overwrite"
        )
    if path.is_symlink() or path.is_mount():
        what = "a link" if path.is_symlink() else "a mount point"
        raise InputError("this cannot be replaced", where=path, got=what, remedy="choose another directory")
    if not _is_ours(path, writers):
        raise InputError(
            "this was not written by qcompiler, and is not replaced",
            where=path,
            remedy="move it away, or choose another directory",
        )


def _is_ours(path: Path, writers: Writers) -> bool:
    """Whether a directory is an artifact that we wrote."""
    try:
        if (path / MANIFEST).is_file():
            manifest = json.loads((path / MANIFEST).read_bytes())
            return isinstance(manifest, dict) and manifest.keys() >= {"schema", "provenance"}
    except (OSError, ValueError):
        return False
    return any(writer.wrote(path) for writer in writers)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _locked(root: Path, path: Path) -> Iterator[None]:
    """Locks the directory itself: there is no file to be left behind, and the system frees it if we are killed."""
    with write_errors(root):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another run writes to this output", where=path, remedy="wait for it, or choose another directory"
            ) from error
        except OSError:
            pass  # a file system that knows no locks: renames still replace nothing
        yield
    finally:
        os.close(descriptor)


def _try_renaming(root: Path) -> None:
    """The last step of the work, ahead of it."""
    with undisturbed(), write_errors(root):
        before, after = _unused(root, ".probe"), _unused(root, ".probed")
        before.mkdir()
        try:
            os.rename(before, after)
        except OSError:
            before.rmdir()
            raise
        after.rmdir()
