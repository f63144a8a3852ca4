"""The ``qcompiler`` command: `commands` is what it can do, `run` the boundary around it.

With `qcompiler.api`, the only room that sees every other.
"""

import os
import sys

__all__ = ["main"]

_OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    How OpenMP's waiting threads wait can be settled only before PyTorch is loaded. They spin, which saves microseconds
    on a machine of one's own and costs all where others want the cores: here they sleep, but for `generate`, whose
    steps are that short. A policy of the user's stays.
    """
    command = (sys.argv[1:] if arguments is None else arguments)[:1]
    if "torch" not in sys.modules and "generate" not in command and not any(n in os.environ for n in _OF_THE_USER):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    from qcompiler.cli.run import main as run

    return run(arguments)
