"""Files that a user names, which may be no files at all."""

import errno
import os
import stat
from pathlib import Path

__all__ = ["read_named"]


def read_named(path: Path) -> bytes:
    """All bytes of a file, or of a pipe that something writes to, such as a shell's ``<(...)``.

    A pipe that nothing writes to holds no bytes; opened in the ordinary way it would hold up the program for ever.

    Raises:
        OSError: as `open`, and for a device, which may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "a device, not a file", str(path))
        os.set_blocking(descriptor, True)
        return file.read()
