import os
from pathlib import Path

import pytest

from qcompiler.cli.output import staged_directory
from qcompiler.errors import InputError


def test_output_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged_directory(output, overwrite=False) as staged:
        (staged / "file").write_text("new")
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "file").read_text() == "new"


def test_output_is_replaced_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with staged_directory(output, overwrite=True) as staged:
        (staged / "file").write_text("new")
        assert (output / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["file"]


def test_output_stays_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("qcompiler.cli.output.os.replace", fail)
    with pytest.raises(InputError), staged_directory(output, overwrite=True) as staged:
        (staged / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["old"]
