"""ONNX models among what users name; the packages that read them are imported when there is one."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from types import ModuleType

    from qcompiler.ir import Graph

__all__ = ["capture_onnx", "find_onnx", "has_onnx_codes", "import_with_onnx"]

_READER = "qcompiler.frontend.onnx"


def find_onnx(path: str | Path) -> Path | None:
    """The ONNX file that a path names: itself, or the only one of a directory without ``config.json``.

    Raises:
        InputError: for a file ``.onnx`` that is not there, and a directory of several.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise InputError("no such file", where=path, expected="an ONNX model")
        return path
    if not path.is_dir() or (path / "config.json").exists() or (path / "manifest.json").exists():
        return None
    found = sorted(path.glob("*.onnx"))
    if len(found) > 1:
        raise InputError(
            "several ONNX models in one directory",
            where=path,
            got=", ".join(file.name for file in found[:4]),
            remedy="name one of the files",
        )
    return found[0] if found else None


def capture_onnx(path: Path) -> "Graph":
    """See `qcompiler.frontend.onnx.capture_onnx`.

    Raises:
        MissingDependencyError: without onnx and onnx_ir.
    """
    graph: Graph = import_with_onnx(_READER).capture_onnx(path)
    return graph


def has_onnx_codes(path: Path) -> bool:
    """Whether the weights of an ONNX file are codes already; errors as those of `capture_onnx`."""
    found: bool = import_with_onnx(_READER).has_codes(path)
    return found


def import_with_onnx(module: str) -> "ModuleType":
    """A module that reads or writes ONNX, imported when it is wanted.

    Raises:
        MissingDependencyError: without the packages it needs.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnx_ir", "ml_dtypes"):
            raise
        raise MissingDependencyError(
            "ONNX needs packages that are not installed",
            got=f"no module {error.name}",
            remedy="pip install onnx onnx-ir",
        ) from error
