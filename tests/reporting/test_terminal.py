import io
import re
import sys
import time

import pytest

from qcompiler.reporting.terminal import (
    _clock,
    print_rows,
    print_table,
    show_progress,
)


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


@pytest.mark.parametrize("terminal", [_Terminal(), io.StringIO()])
def test_nothing_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress(True, every=0.001) as show:
        show(1, 3, "layer")
        time.sleep(0.02)
    assert terminal.getvalue() == ""


def _lines_of(monkeypatch: pytest.MonkeyPatch, *states: tuple[int, int, str]) -> list[str]:
    """What is written where stderr is no terminal, the last line for each state."""
    stream, found = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", stream)
    with show_progress(False, every=0.002) as show:
        for state in states:
            show(*state)
            before = stream.getvalue().count("\n")
            for _ in range(5000):
                if stream.getvalue().count("\n") > before + 1:
                    break
                time.sleep(0.002)
            found.append(stream.getvalue().splitlines()[-1])
    return found


def test_lines_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = _lines_of(monkeypatch, (0, 0, "capture"), (0, 28, "layer.0"), (7, 28, "layer.7"))
    assert re.fullmatch(r"capture; 0:0\d elapsed; peak [\d,]+ MiB", first)
    assert re.fullmatch(r"0 of 28: layer.0; 0:0\d elapsed; peak [\d,]+ MiB", second)
    assert re.fullmatch(r"7 of 28: layer.7; 0:0\d elapsed; about 0:0\d left; peak [\d,]+ MiB", third)


def test_lines_come_though_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with show_progress(False, every=0.002):
        for _ in range(5000):
            if stream.getvalue().count("\n") > 2:
                break
            time.sleep(0.002)
    assert {line.partition(";")[0] for line in stream.getvalue().splitlines()} == {"starting"}


def test_a_reader_that_is_gone_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with show_progress(False, every=0.001) as show:
        stream.close()
        time.sleep(0.02)
        show(1, 2, "layer")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert _clock(seconds) == text


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
