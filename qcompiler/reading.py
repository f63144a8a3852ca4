"""Files that a user names, which may be no files at all."""

import os
from pathlib import Path

__all__ = ["read_named"]


def read_named(path: Path) -> bytes:
    """All bytes of a file, or of a pipe that something writes to, such as a shell's ``<(...)``.

    A pipe that nothing writes to holds no bytes; opened in the ordinary way it would hold up the program for ever.

    Raises:
        OSError: as `open`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        os.set_blocking(descriptor, True)
        return file.read()
