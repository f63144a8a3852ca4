"""Real signals sent to real processes: one JSON object, exit status 130, and nothing left but what was finished."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny_checkpoint import Outcome, command, save_checkpoint

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
_PATIENCE = 200  # seconds, on a busy machine

_SLOW = """
import os, sys, time, qcompiler.{module} as module
original = module.{name}
def slow(*arguments, **options):
    open({mark!r}, "w").close()
    end = time.monotonic() + {seconds}
    while time.monotonic() < end and not os.path.exists({mark!r} + "-end"):
        time.sleep(0.01)
    return original(*arguments, **options)
module.{name} = slow
from qcompiler.cli import main
sys.exit(main())
"""


def slowed(module: str, name: str, mark: Path, seconds: float = 1000) -> str:
    """The program, except that a function takes as long as it would for a large model, and leaves a mark first."""
    return _SLOW.format(module=module, name=name, mark=str(mark), seconds=seconds)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", layers=1)


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    assert command("compile", model, "-r", "w8a16", "-o", model.parent / "out").status == 0
    return model.parent / "out"


@contextmanager
def started(
    arguments: Sequence[object],
    temporary: Path,
    until: Callable[[], object],
    *,
    script: str | None = None,
    ignored: Sequence[signal.Signals] = (),
) -> Iterator["subprocess.Popen[str]"]:
    """A process that has come to the point where ``until`` holds."""
    temporary.mkdir()

    def heed() -> None:  # a shell that runs the tests in the background would pass an ignored signal on
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    program = ["-m", "qcompiler"] if script is None else ["-c", script]
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=heed,
    ) as process:
        try:
            deadline = time.monotonic() + _PATIENCE
            while not until():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def ended(process: "subprocess.Popen[str]") -> Outcome:
    output, errors = process.communicate(timeout=_PATIENCE)
    return Outcome(process.returncode, output, errors)


def check_interrupted(outcome: Outcome) -> None:
    assert outcome.status == 130, outcome.errors
    assert outcome.error["type"] == "Interrupted"
    assert "Traceback" not in outcome.errors


@pytest.mark.parametrize("number", [STOPPING[0], *(pytest.param(n, marks=pytest.mark.slow) for n in STOPPING[1:])])
def test_while_text_is_generated(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """More of it than the test could wait for."""
    options = ("--samples", 100000, "--length", 64, "--json")
    arguments = ("compile", model, "-r", "w4a16-gptq", "-o", tmp_path / "out", *options)
    temporary = tmp_path / "temporary"
    with started(arguments, temporary, lambda: list(temporary.glob("qcompiler-*"))) as process:
        time.sleep(0.3)
        process.send_signal(number)
        check_interrupted(ended(process))
    assert list(tmp_path.iterdir()) == [temporary]
    assert not list(temporary.glob("qcompiler-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_while_a_target_is_written(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The native artifact stands by then, and stays."""
    mark, temporary = tmp_path / "mark", tmp_path / "temporary"
    script = slowed("to_target", "check_parity", mark)
    arguments = ("compile", model, "-r", "w8a16", "-o", tmp_path / "out", "--to", "onnx", "--json")
    with started(arguments, temporary, mark.exists, script=script) as process:
        process.send_signal(number)
        outcome = ended(process)
    check_interrupted(outcome)
    assert outcome.fields["error"]["artifacts"] == {"native": str(tmp_path / "out" / "native")}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["native"]
    assert (tmp_path / "out" / "native" / "manifest.json").is_file()
    assert not list(temporary.glob("qcompiler-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_in_the_middle_of_a_conversion(compiled: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = sorted(compiled.rglob("*"))
    mark, temporary = tmp_path / "mark", tmp_path / "temporary"
    script = slowed("to_target", "check_parity", mark)
    arguments = ("convert", compiled, "--to", "onnx", "-o", compiled, "--json")
    with started(arguments, temporary, mark.exists, script=script) as process:
        process.send_signal(number)
        check_interrupted(ended(process))
    assert sorted(compiled.rglob("*")) == before
    assert not list(temporary.glob("qcompiler-*"))


def test_further_signals_during_clean_up(model: Path, tmp_path: Path) -> None:
    """Removing the workspace takes its time; the second and third signal come meanwhile."""
    mark, temporary = tmp_path / "mark", tmp_path / "temporary"
    script = slowed("storage.staging", "shutil.rmtree", mark, seconds=1.5)
    arguments = ("compile", model, "-r", "w4a16-gptq", "-o", tmp_path / "out", "--samples", 100000, "--length", 64)
    with started(
        (*arguments, "--json"), temporary, lambda: list(temporary.glob("qcompiler-*")), script=script
    ) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while not mark.exists():
            assert process.poll() is None, process.communicate()  # it went without cleaning up
            assert time.monotonic() < deadline, "it goes on, as if there had been no signal"
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
            time.sleep(0.05)
        check_interrupted(ended(process))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark", "temporary"]
    assert not list(temporary.glob("qcompiler-*"))


def test_a_hangup_that_nohup_has_ignored_stays_ignored(compiled: Path, tmp_path: Path) -> None:
    mark, temporary = tmp_path / "mark", tmp_path / "temporary"
    script = slowed("to_target", "check_parity", mark)
    arguments = ("convert", compiled, "--to", "onnx", "-o", tmp_path / "other", "--json")
    with started(arguments, temporary, mark.exists, script=script, ignored=[signal.SIGHUP]) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        (tmp_path / "mark-end").touch()
        assert ended(process).result["artifacts"] == {"onnx": str(tmp_path / "other" / "onnx")}
