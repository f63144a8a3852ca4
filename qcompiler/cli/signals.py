"""SIGINT, SIGTERM and SIGHUP: each stops a command once, and what it has begun is cleaned up."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interruptions"]

_RETRY_SECONDS = 0.05
_REMINDER_SECONDS = 1.0


class Interruptions:
    """A block that a signal ends by one `KeyboardInterrupt`.

    Further signals while that goes on its way, and so while `finally` blocks run, are ignored: half a clean-up leaves
    things behind. One that Python loses, as it came while an object was destroyed, is sent again, and so is one that
    somebody's code caught and went on: the block is reminded until it ends. Signals that were ignored before (by
    ``nohup``, or a shell for what runs behind it) stay ignored.

    Args:
        for_good: leave signals ignored behind the block, where the program ends and has its last things to remove.
    """

    def __init__(self, for_good: bool) -> None:
        self._for_good = for_good
        self._is_over = False
        self._handlers: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        self._reminder: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may say what signals do
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self._handlers[number] = handler
                    signal.signal(number, self._interrupt)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._send_again
        return self

    def finish(self) -> None:
        """Ignores signals from here on: what was asked for is done."""
        self._is_over = True
        self._stop_reminding()

    def _stop_reminding(self) -> None:
        if self._reminder is not None:
            self._reminder.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._for_good else handler)
        sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:
            return
        self._stop_reminding()
        self._reminder = _send_later(_REMINDER_SECONDS)
        if not _is_interrupted():
            raise KeyboardInterrupt

    def _send_again(self, lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook(lost)
        elif not self._is_over:  # from a thread: here, it would be lost in the same way
            _send_later(_RETRY_SECONDS)


def _send_later(seconds: float) -> threading.Timer:
    """Interrupts this program from a thread, which does not keep it alive."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    return timer


def _is_interrupted() -> bool:
    """Whether a `KeyboardInterrupt` is being handled where the signal came."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
