import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.errors import InputError, ResourceError
from qcompiler.storage.staging import (
    StagedFiles,
    filled_directory,
    made_directory,
    output_path,
    remove_tree,
    undisturbed,
)


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


@pytest.mark.parametrize("call", ["write", "replace"])
def test_what_was_there_stays_whole_when_the_system_refuses(tmp_path, monkeypatch, call):
    (tmp_path / "a").write_bytes(b"older")
    (tmp_path / "b").write_bytes(b"older")
    genuine, calls = getattr(os, call), []

    def refusing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        return genuine(*args)

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(InputError):
        write_two(tmp_path)
    monkeypatch.undo()
    assert everything(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == (b"older" if call == "write" else b"content")
    assert (tmp_path / "b").read_bytes() == b"older"


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
        "from qcompiler.storage.staging import StagedFiles\n"
        "from qcompiler.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    with StagedFiles(pathlib.Path(sys.argv[1])) as staged, staged.file('a') as write:\n"
        "        write(bytes(200_000))\n"
        "except ResourceError:\n"
        "    sys.exit(7)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert everything(tmp_path) == []


# --- directories -----------------------------------------------------------------------------------------------------


def fill(directory: Path, names: str = "ab", error: BaseException | None = None) -> None:
    with filled_directory(directory, last="a") as place:
        for name in names:
            (place / name).write_text("content")
        if error is not None:
            raise error


@pytest.mark.parametrize("kind", ["new", "deep", "empty", "link", "here", "mount point"])
def test_a_directory_is_filled(tmp_path, monkeypatch, kind):
    out = {"deep": tmp_path / "new" / "deep", "here": Path()}.get(kind, tmp_path / "out")
    if kind == "here":
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
    if kind in ("empty", "mount point"):
        out.mkdir()
    if kind == "mount point":  # as a new file system looks
        (out / "lost+found").mkdir()
    if kind == "link":
        (tmp_path / "disk").mkdir()
        out.symlink_to("disk")
    fill(out)
    assert set(everything(out)) - {"lost+found"} == {"a", "b"}
    assert out.is_symlink() == (kind == "link")


def test_the_last_file_comes_last(tmp_path, monkeypatch):
    renamed, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed.append(Path(b).name), rename(a, b)))
    fill(tmp_path / "out", "cab")
    assert renamed == ["b", "c", "a"]


@pytest.mark.parametrize("error", [ArithmeticError(), KeyboardInterrupt()])
def test_nothing_is_left_of_a_directory_that_fails(tmp_path, error):
    with pytest.raises(type(error)):
        fill(tmp_path / "new" / "deep", error=error)
    assert everything(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(type(error)):
        fill(tmp_path / "out", error=error)
    assert everything(tmp_path) == ["out"]
    assert everything(tmp_path / "out") == []


def test_system_errors_of_a_directory_are_typed(tmp_path):
    with pytest.raises(ResourceError):
        fill(tmp_path / "out", error=OSError(errno.ENOSPC, "full"))
    with pytest.raises(InputError, match="cannot be written"):
        fill(tmp_path / "out", error=OSError(errno.EIO, "broken"))


def test_what_somebody_else_puts_into_a_directory_stays(tmp_path):
    def work() -> None:
        with filled_directory(tmp_path / "out", last="a") as place:
            (place / "a").write_text("ours")
            (place / "b").write_text("ours")
            (tmp_path / "out" / "b").write_text("theirs")

    with pytest.raises(InputError, match="somebody else"):
        work()
    assert everything(tmp_path / "out") == ["b"]
    assert (tmp_path / "out" / "b").read_text() == "theirs"


def test_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="not empty") as caught:
        fill(tmp_path)
    assert caught.value.got == "mine"
    assert everything(tmp_path) == ["mine"]


@pytest.mark.parametrize("target", ["nowhere", "file", "out"])
def test_links_to_no_directory(tmp_path, target):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(InputError):
        output_path(tmp_path / "out")
    with pytest.raises(InputError, match="file"):
        output_path(tmp_path / "file")
    assert output_path(tmp_path / "new") == tmp_path.resolve() / "new"


def test_directories_that_were_made_go_as_far_as_they_are_empty(tmp_path):
    def work(path: Path) -> None:
        with made_directory(path):
            (tmp_path / "new" / "kept").touch()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        work(tmp_path / "new" / "deep")
    assert everything(tmp_path / "new") == ["kept"]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_for_the_end_of_a_clean_up(number):
    came = []
    before = signal.signal(number, lambda *_: came.append("signal"))
    try:
        with undisturbed():
            os.kill(os.getpid(), number)
            with undisturbed():
                os.kill(os.getpid(), number)
            came.append("end")
        assert came == ["end", "signal"]
    finally:
        signal.signal(number, before)


def test_signals_that_are_not_pythons_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with undisturbed():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_tree_is_removed_whole(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / "tree" / name).mkdir(parents=True)
    genuine = os.rmdir

    def interrupting(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return genuine(*args, **options)

    monkeypatch.setattr(os, "rmdir", interrupting)
    with pytest.raises(KeyboardInterrupt):
        remove_tree(tmp_path / "tree")
    monkeypatch.undo()
    assert everything(tmp_path) == []
