"""The ``qcompiler`` program: settles how waiting threads wait, which can be done only before PyTorch is loaded.

OpenMP's threads spin while they wait for each other. That saves microseconds on a machine of one's own and costs all
where others want the cores. Only `generate`, whose steps are that short, is left to spin; a policy of the user's stays.
It is no part of the package because importing the package loads PyTorch, and must change no process it is imported in.
"""

import os
import sys

__all__ = ["main"]

_OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> int:
    """Runs the command line; returns the exit status."""
    if "generate" not in sys.argv[1:2] and not any(name in os.environ for name in _OF_THE_USER):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    from qcompiler.cli import main as run

    return run()
