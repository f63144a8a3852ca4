"""The ``qcompiler`` command: `commands` is what it can do, `run` the boundary around it.

With `qcompiler.api`, the only room that sees every other.
"""

from qcompiler.cli.run import main

__all__ = ["main"]
