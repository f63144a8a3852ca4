"""The output directory: what may be in it, what is replaced, and what happens when somebody else changes it."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcompiler.cli.output import Kept, Output, opened_output
from qcompiler.errors import InputError
from tests.tiny_checkpoint import file_bytes

NAMES = ("native", "onnx")


@contextmanager
def opened(path: Path, *, overwrite: bool = False, model: Path | None = None) -> Iterator[Output]:
    with opened_output(path, NAMES, Kept(), overwrite=overwrite, model=model) as out:
        yield out


def fill(out: Output, name: str, text: str = "new") -> None:
    with out.part(name, outdated=NAMES if name == "native" else ()) as place:
        (place / "file").write_text(text)


def make_artifact(path: Path, kind: str) -> Path:
    """What the program takes for its own."""
    path.mkdir(parents=True)
    if kind == "native":
        (path / "manifest.json").write_text('{"schema": 1, "provenance": {}}')
    else:
        (path / "model.onnx").write_bytes(b"\x08\x0a\x12\x09qcompiler:")
    return path


def everything(path: Path) -> list[str]:
    return sorted(str(item.relative_to(path)) for item in path.rglob("*"))


def test_parts_appear_whole_and_one_by_one(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with opened(output) as out:
        with out.part("native") as place:
            (place / "file").write_text("new")
            assert not (output / "native").exists()
        assert everything(output) == ["native", "native/file"]
        assert out.kept.artifacts == {"native": str(output / "native")}
    assert everything(tmp_path) == ["deep", "deep/out", "deep/out/native", "deep/out/native/file"]


def test_a_directory_that_got_nothing_is_not_left(tmp_path: Path) -> None:
    """As with ``--to kernels``, which writes nothing."""
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "deep" / "out", tmp_path / "there"):
        with opened(output):
            assert output.is_dir()
    assert everything(tmp_path) == ["there"]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_what_fails_leaves_what_stood(tmp_path: Path, error: type[BaseException]) -> None:
    def work() -> None:
        with opened(tmp_path / "deep" / "out") as out:
            fill(out, "native")
            with out.part("onnx") as place:
                (place / "file").write_text("half")
                raise error

    with pytest.raises(error):
        work()
    assert everything(tmp_path / "deep" / "out") == ["native", "native/file"]


def test_what_fails_first_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with opened(tmp_path / "deep" / "out") as out, out.part("native"):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        work()
    assert everything(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_stay(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "data").mkdir()
    with opened(tmp_path, overwrite=overwrite) as out:
        fill(out, "native")
    assert everything(tmp_path) == ["README.md", "data", "native", "native/file"]


def test_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(Path()) as out:
        fill(out, "native")
        assert out.kept.artifacts == {"native": "native"}
    assert everything(tmp_path) == ["native", "native/file"]


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with opened(tmp_path / "out") as out:
        fill(out, "native")
    assert (tmp_path / "out").is_symlink()
    assert everything(tmp_path / "disk") == ["native", "native/file"]


@pytest.mark.parametrize("target", ["nowhere", "file", "out"])
def test_links_that_lead_to_no_directory(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").symlink_to(target)
    message = "is a file" if target == "file" else "a link that points nowhere"
    with pytest.raises(InputError, match=message) as caught, opened(tmp_path / "out"):
        raise AssertionError("opened")
    assert caught.value.where == str(tmp_path / "out")
    assert everything(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("text", ["mine", None])
def test_names_that_are_taken(tmp_path: Path, kind: str, text: str | None) -> None:
    """A leftover of either kind would lie beside something it was not made of."""
    if text is None:
        make_artifact(tmp_path / kind, kind)
    else:
        (tmp_path / kind).write_text(text)
    before = file_bytes(tmp_path)
    with pytest.raises(InputError, match="has this already") as caught, opened(tmp_path):
        raise AssertionError("opened")
    assert caught.value.where == str(tmp_path / kind)
    assert "--overwrite" in str(caught.value.remedy)
    assert file_bytes(tmp_path) == before


def test_artifacts_are_replaced_with_those_made_of_them(tmp_path: Path) -> None:
    for kind in NAMES:
        make_artifact(tmp_path / kind, kind)
    (tmp_path / "README.md").write_text("mine")
    with opened(tmp_path, overwrite=True) as out:
        before = file_bytes(tmp_path)
        with out.part("native", outdated=NAMES) as place:
            (place / "file").write_text("new")
            assert before.items() <= file_bytes(tmp_path).items()
        assert everything(tmp_path) == ["README.md", "native", "native/file"]


def test_artifacts_stay_when_their_successor_fails(tmp_path: Path) -> None:
    for kind in NAMES:
        make_artifact(tmp_path / kind, kind)
    before = file_bytes(tmp_path)

    def work() -> None:
        with opened(tmp_path, overwrite=True) as out, out.part("native", outdated=NAMES):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        work()
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "directory", "link", "foreign onnx", "foreign manifest"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, what: str) -> None:
    path = tmp_path / "out" / "native"
    path.parent.mkdir()
    if what == "file":
        path.write_text("mine")
    elif what == "link":
        path.symlink_to(make_artifact(tmp_path / "elsewhere", "native"))
    else:
        path.mkdir()
        (path / "notes.txt").write_text("mine")
        if what == "foreign onnx":
            (path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(60) + b"qcompiler")
        if what == "foreign manifest":
            (path / "manifest.json").write_text('{"name": "web app"}')
    before = everything(tmp_path)
    with pytest.raises(InputError) as caught, opened(tmp_path / "out", overwrite=True):
        raise AssertionError("opened")
    assert caught.value.where == str(path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", NAMES)
def test_an_artifact_is_no_output(tmp_path: Path, kind: str) -> None:
    make_artifact(tmp_path / "out", kind)
    with pytest.raises(InputError, match="artifact itself"), opened(tmp_path / "out", overwrite=True):
        raise AssertionError("opened")


@pytest.mark.parametrize("place", [".", "below", "native"])
def test_the_model_is_not_written_into(tmp_path: Path, place: str) -> None:
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(InputError, match="model's directory"),
        opened(tmp_path / "model" / place, model=tmp_path / "model"),
    ):
        raise AssertionError("opened")
    assert everything(tmp_path) == ["model"]


def test_the_model_is_not_replaced(tmp_path: Path) -> None:
    model = make_artifact(tmp_path / "onnx", "onnx") / "source"
    model.mkdir()
    with pytest.raises(InputError, match="would replace"), opened(tmp_path, overwrite=True, model=model):
        raise AssertionError("opened")
    assert model.is_dir()
    with opened(tmp_path / "onnx" / "..", overwrite=True, model=tmp_path / "source") as out:  # beside it is fine
        fill(out, "native")


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    """The second is another process, and comes through a link."""
    (tmp_path / "link").symlink_to(tmp_path / "out")
    script = (
        "import sys; from pathlib import Path; from qcompiler.cli.output import *\n"
        "try:\n"
        "    with opened_output(Path(sys.argv[1]), (), Kept(), overwrite=True): print('opened')\n"
        "except Exception as error: print(error)\n"
    )

    def second() -> str:
        return subprocess.run(
            [sys.executable, "-c", script, tmp_path / "link"], capture_output=True, text=True, check=True
        ).stdout

    with opened(tmp_path / "out") as out:
        assert "another run writes to this output" in second()
        fill(out, "native")
    assert second() == "opened\n"
    assert everything(tmp_path / "out") == ["native", "native/file"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with opened(tmp_path / "out") as out:
        fill(out, "native")
    assert everything(tmp_path / "out") == ["native", "native/file"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["file", "empty directory", "artifact"])
def test_what_somebody_else_puts_there_meanwhile(tmp_path: Path, what: str, overwrite: bool) -> None:
    """Theirs stays, ours gets another name, and the error tells it."""
    if overwrite:
        make_artifact(tmp_path / "native", "native")
    kept = Kept()

    def work() -> None:
        with opened_output(tmp_path, NAMES, kept, overwrite=overwrite) as out:
            if overwrite:
                os.rename(tmp_path / "native", tmp_path / "moved")  # so that the new one has another inode
            theirs = tmp_path / "native"
            if what == "file":
                theirs.write_text("theirs")
            elif what == "artifact":
                make_artifact(theirs, "native")
            else:
                theirs.mkdir()
            (tmp_path / "native-2").mkdir()
            before.update(everything(tmp_path))
            fill(out, "native")

    before: set[str] = set()
    with pytest.raises(InputError, match="somebody else meanwhile") as caught:
        work()
    assert set(everything(tmp_path)) == before | {"native-3", "native-3/file"}
    assert str(tmp_path / "native-3") in str(caught.value)
    assert kept.artifacts == {"native": str(tmp_path / "native-3")}


def test_an_output_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as out:
        (tmp_path / "out").rmdir()
        fill(out, "native")
    assert everything(tmp_path / "out") == ["native", "native/file"]


def test_nothing_is_lost_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_artifact(tmp_path / "native", "native")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if ".partial" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    kept = Kept()

    def work() -> None:
        with opened_output(tmp_path, NAMES, kept, overwrite=True) as out:
            monkeypatch.setattr("qcompiler.cli.output.os.rename", fail)
            fill(out, "native")

    with pytest.raises(InputError) as caught:
        work()
    assert "Input/output error" in str(caught.value)
    assert kept.artifacts == {"native": str(tmp_path / ".native.partial")}
    assert kept.artifacts["native"] in str(caught.value)
    assert everything(tmp_path) == [".native.partial", ".native.partial/file", "native", "native/manifest.json"]


def test_the_last_step_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("qcompiler.cli.output.os.rename", fail)
    with pytest.raises(InputError, match="cannot be written") as caught, opened(tmp_path / "out"):
        raise AssertionError("opened")
    assert caught.value.got == "Invalid cross-device link"
    assert everything(tmp_path) == []


def test_leftovers_of_a_process_that_was_killed_are_in_nobodys_way(tmp_path: Path) -> None:
    for name in (".native.partial", ".native.replaced", ".probe", ".probed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    make_artifact(tmp_path / "native", "native")
    with opened(tmp_path, overwrite=True) as out:
        fill(out, "native")
    assert (tmp_path / "native" / "file").read_text() == "new"


def test_what_makes_the_rest() -> None:
    kept = Kept(wanted={"onnx": "onnx:opset=23", "other": "other"}, output="my out")
    assert kept.next_command() is None
    kept.artifacts["native"] = "my out/native"
    assert kept.next_command() == "qcompiler convert 'my out/native' --to onnx:opset=23 --to other -o 'my out'"
    kept.artifacts["onnx"] = "my out/onnx"
    assert kept.next_command() == "qcompiler convert 'my out/native' --to other -o 'my out'"
    kept.artifacts["other"] = "my out/other"
    assert kept.next_command() is None
