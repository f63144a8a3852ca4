"""Carries a pipeline through a graph.

In: a graph, a `Pipeline`, calibration tokens. Out: a `CompileResult`, the graph rewritten, what was done in its
report. `compiling` is the whole way: `calibration_batches` are bound; `streaming` goes through the segments, and
`position` runs the batches inside one, whose values wait in a `value_store`; `held_out` measures what was lost.
`fisher` is a backward sweep of its own.
"""

from qcompiler.sweep.compiling import (
    CalibrationInput,
    check_work_dir,
    compile_graph,
)
from qcompiler.sweep.fisher import measure_fisher
from qcompiler.sweep.streaming import Progress
from qcompiler.sweep.threads import contention, use_threads

__all__ = [
    "CalibrationInput",
    "Progress",
    "check_work_dir",
    "compile_graph",
    "contention",
    "measure_fisher",
    "use_threads",
]
