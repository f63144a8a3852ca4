"""What third parties give, named by where it lies: ``package.module:NAME`` or ``path/to/file.py:NAME``.

Importing a file runs it. That happens only for what a user names, on the command line, in Python or in a recipe file.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompiler.errors import QCompilerError, RecipeError

__all__ = ["foreign", "import_object"]

_FORMS = "package.module:NAME or path/to/file.py:NAME"


def import_object(
    place: str,
    directory: Path = Path(),
    *,
    kind: str = "pass",
    offers: Callable[[object], bool] = lambda value: False,
    error: type[QCompilerError] = RecipeError,
) -> Any:
    """Whatever a name stands for.

    Args:
        place: ``package.module:NAME``, which Python must be able to import, or ``path/to/file.py:NAME``.
        directory: where a path begins.
        kind: what is expected, for messages.
        offers: what is of that kind, for messages.
        error: what to raise.

    Raises:
        RecipeError: or ``error``, if there is no such file, module or name, or importing it fails.
    """
    source, _, name = place.rpartition(":")
    if not source or not name:
        raise error(f"not the place of a {kind}", got=place, expected=_FORMS)
    if source.endswith(".py"):
        found: Any = _run_file(directory / source, error)
    else:
        found = _import_module(source, kind, error)
    for part in name.split("."):
        with foreign(f"the module of this {kind} fails when it is asked for a name", source, error=error):
            is_there = hasattr(found, part)
        if not is_there:
            public = [key for key, value in getattr(found, "__dict__", {}).items() if offers(value)]
            raise error("no such name in the module", where=source, got=name, expected=", ".join(public) or f"a {kind}")
        found = getattr(found, part)
    return found


def _import_module(name: str, kind: str, error: type[QCompilerError]) -> ModuleType:
    remedy = "install it, put its directory on PYTHONPATH, or give the path of its file: file.py:NAME"
    with foreign(f"the module of this {kind} cannot be imported", name, remedy, error):
        return importlib.import_module(name)


def _run_file(path: Path, error: type[QCompilerError]) -> ModuleType:
    """The module of a file, run once per process like any other module."""
    if not path.is_file():
        raise error("no such Python file", where=path, expected=_FORMS)
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    try:
        with foreign("this file fails when it is imported", path, error=error):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def foreign(
    what: str, where: object, remedy: str | None = None, error: type[QCompilerError] = RecipeError
) -> Iterator[None]:
    """Whatever somebody else's code raises, be it no Exception, is an ``error`` of ours; an interrupt stays one."""
    try:
        yield
    except (KeyboardInterrupt, QCompilerError):
        raise
    except BaseException as raised:
        raise error(what, where=where, got=f"{type(raised).__name__}: {raised}", remedy=remedy) from raised
