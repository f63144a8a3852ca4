"""A compiler for quantized language models: capture a graph, rewrite it with passes, lower it to what runs.

The names below are looked up when they are first used: importing the package loads neither PyTorch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.advice import recommend
    from qcompiler.api import CompileResult, capture, compile, evaluate, generate, load, lower, open_artifact
    from qcompiler.artifacts import Calibration, evaluate_inputs
    from qcompiler.errors import QCompilerError
    from qcompiler.to_target import verify

__all__ = [
    "Calibration",
    "CompileResult",
    "QCompilerError",
    "__version__",
    "capture",
    "compile",
    "evaluate",
    "evaluate_inputs",
    "generate",
    "load",
    "lower",
    "open_artifact",
    "recommend",
    "verify",
]

__version__ = "0.1.0"

_ELSEWHERE = {
    "Calibration": "qcompiler.artifacts",
    "QCompilerError": "qcompiler.errors",
    "evaluate_inputs": "qcompiler.artifacts",
    "recommend": "qcompiler.advice",
    "verify": "qcompiler.to_target",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, "qcompiler.api")), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
