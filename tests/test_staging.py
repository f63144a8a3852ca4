import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.errors import InputError, ResourceError
from qcompiler.staging import StagedFiles


def everything(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def write_one(staged: StagedFiles, name: str) -> None:
    with staged.file(name) as write:
        write(b"x")


def write_two(directory: Path) -> None:
    with StagedFiles(directory) as staged:
        for name in ("a", "b"):
            with staged.file(name) as write:
                write(b"con")
                write(memoryview(b"tent"))


def test_files_appear_together_at_the_end(tmp_path):
    with StagedFiles(tmp_path / "new" / "deep") as staged:
        with staged.file("a") as write:
            write(b"x")
        assert all(name.startswith(".") for name in everything(tmp_path / "new" / "deep"))
    assert everything(tmp_path / "new" / "deep") == ["a"]


def test_a_file_in_a_folder(tmp_path):
    with StagedFiles(tmp_path) as staged:
        write_one(staged, "templates/a.jinja")
    assert (tmp_path / "templates" / "a.jinja").read_bytes() == b"x"

    def write_where_no_folder_can_be():
        with StagedFiles(tmp_path) as staged:
            write_one(staged, "other/a")
            write_one(staged, "templates/a.jinja/b")

    with pytest.raises(InputError):
        write_where_no_folder_can_be()
    assert everything(tmp_path) == ["templates"]


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"older and longer content")
    write_two(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_by_an_interrupted_block(tmp_path, interruption):
    def interrupted() -> None:
        with StagedFiles(tmp_path) as staged:
            with staged.file("a") as write:
                write(b"whole")
            with staged.file("b") as write:
                write(b"half")
                raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "at"),  # the third fsync is the directory's: without it the renames could be lost
    [("write", 1), ("write", 2), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)],
)
@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EROFS, InputError), (errno.EIO, InputError)],
)
def test_nothing_is_left_when_the_system_refuses(tmp_path, monkeypatch, call, at, number, error):
    genuine, calls = getattr(os, call), []

    def refusing(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))
        return genuine(*args)

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(error) as caught:
        write_two(tmp_path)
    monkeypatch.undo()
    assert len(calls) == at
    assert str(tmp_path) in str(caught.value.where)
    assert caught.value.got == os.strerror(number)
    assert everything(tmp_path) == []


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    genuine = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: genuine(fd, data[:2]))
    write_two(tmp_path)
    assert (tmp_path / "b").read_bytes() == b"content"


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written"):
            write_two(directory)
    assert everything(tmp_path) == ["file"]


def test_a_real_limit_on_file_size(tmp_path):
    script = (
        "import resource, sys, pathlib\n"
        "from qcompiler.staging import StagedFiles\n"
        "from qcompiler.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with StagedFiles(pathlib.Path(sys.argv[1])) as staged, staged.file('a') as write:\n"
        "        write(bytes(200_000))\n"
        "except ResourceError:\n"
        "    sys.exit(7)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert everything(tmp_path) == []
