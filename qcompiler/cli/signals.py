"""SIGINT, SIGTERM and SIGHUP: each stops a command once, and what it has begun is cleaned up."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Interruptions"]

_RETRY_SECONDS = 0.05


class Interruptions:
    """A block that a signal ends by one `KeyboardInterrupt`.

    Further signals while that goes on its way, and so while `finally` blocks run, are ignored: half a clean-up leaves
    things behind. One that Python loses, as it came while an object was destroyed, is sent again. Signals that were
    ignored before (by ``nohup``, or a shell for what runs behind it) stay ignored.

    Args:
        for_good: leave signals ignored behind the block, where the program ends and has its last things to remove.
    """

    def __init__(self, for_good: bool) -> None:
        self._for_good = for_good
        self._is_over = False
        self._handlers: dict[int, Any] = {}
        self._hook = sys.unraisablehook

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._for_good else handler)
        sys.unraisablehook = self._hook

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._is_over and not _is_interrupted():
            raise KeyboardInterrupt

    def _send_again(self, lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            self._hook(lost)
        elif not self._is_over:  # from a thread: here, it would be lost in the same way
            threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()


def _is_interrupted() -> bool:
    """Whether a `KeyboardInterrupt` is being handled where the signal came."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
