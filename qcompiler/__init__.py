"""A compiler for quantized language models: capture a graph, rewrite it with passes, lower it to what runs."""

from qcompiler.api import CompileResult, capture, compile, evaluate, generate, load, lower, open_artifact
from qcompiler.calibration import Calibration
from qcompiler.errors import QCompilerError

__all__ = [
    "Calibration",
    "CompileResult",
    "QCompilerError",
    "__version__",
    "capture",
    "compile",
    "evaluate",
    "generate",
    "load",
    "lower",
    "open_artifact",
]

__version__ = "0.1.0"
