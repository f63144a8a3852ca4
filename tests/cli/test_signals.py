"""What signals do inside a command, and what is left as it was behind it. Whole processes: tests/integration."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from qcompiler.cli.signals import Interruptions

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_one_interrupt(number: signal.Signals) -> None:
    before = [signal.getsignal(item) for item in STOPPING], sys.unraisablehook
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            for item in STOPPING:
                os.kill(os.getpid(), item)
            try:
                raise OSError
            except OSError:
                os.kill(os.getpid(), number)
            cleaned.append(True)

    with Interruptions(for_good=False):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert cleaned
        with pytest.raises(KeyboardInterrupt):  # of work that begins anew
            os.kill(os.getpid(), number)
    assert ([signal.getsignal(item) for item in STOPPING], sys.unraisablehook) == before


def test_signals_behind_the_end_of_the_work() -> None:
    with Interruptions(for_good=False) as interruptions:
        interruptions.finish()
        for item in STOPPING:
            os.kill(os.getpid(), item)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptions(for_good=False):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_that_ends_is_not_stopped_halfway() -> None:
    before = [signal.getsignal(item) for item in STOPPING]
    try:
        with Interruptions(for_good=True):
            pass
        assert {signal.getsignal(item) for item in STOPPING} == {signal.SIG_IGN}
    finally:
        for item, handler in zip(STOPPING, before, strict=True):
            signal.signal(item, handler)


def test_an_interrupt_that_somebody_catches_is_sent_again() -> None:
    caught = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException as error:
            caught.append(error)
        time.sleep(10)

    with Interruptions(for_good=False):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert len(caught) == 1
    time.sleep(1.2)  # nothing comes behind the end


def test_an_interrupt_that_python_loses_is_sent_again() -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def work() -> None:
        dying = [Dying()]
        dying.clear()
        gc.collect()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.01)

    with Interruptions(for_good=False), pytest.raises(KeyboardInterrupt):
        work()


def test_other_threads_do_without() -> None:
    failures = []

    def run() -> None:
        try:
            with Interruptions(for_good=False):
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
