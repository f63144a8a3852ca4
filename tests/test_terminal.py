import io
import sys

import pytest

from qcompiler.terminal import print_rows, print_table, show_progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"size": "3 MiB", "seconds": 1.23456789, "sites": 4})
    assert capsys.readouterr().out == "size     3 MiB\nseconds  1.23457\nsites    4\n"


def test_a_table_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(("recipe", "onnx"), [["w8a16", "fused"], ["w4a16-rtn", "runs"]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["recipe", "onnx"], ["w8a16", "fused"], ["w4a16-rtn", "runs"]]


@pytest.mark.parametrize(("terminal", "quiet"), [(_Terminal(), True), (io.StringIO(), False)])
def test_no_bar_where_nobody_looks(monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO, quiet: bool) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress(quiet) as show:
        show(1, 3, "layer")
    assert terminal.getvalue() == ""


def test_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with show_progress(False) as show:
        show(1, 3, "one.very.long.site.name, " * 4)
    shown = terminal.getvalue()
    assert "1/3" in shown
    assert "..." in shown
    assert "MiB" in shown
    assert capsys.readouterr().out == ""
