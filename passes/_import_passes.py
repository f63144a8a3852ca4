"""Passes of third parties, named by where they lie: ``package.module:NAME`` or ``path/to/file.py:NAME``.

Importing a file runs it. That happens only for what a user names, on the command line, in Python or in a recipe file.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompiler.errors import QCompilerError, RecipeError
from qcompiler.protocol import Pass, WeightQuantizer

__all__ = ["import_object", "import_passes"]

_FORMS = "package.module:NAME or path/to/file.py:NAME"


def import_passes(place: str) -> tuple[Pass, ...]:
    """The passes behind a name: a class (with its default options), an instance, or a sequence of these.

    Raises:
        RecipeError: if the import fails, or gives something else.
    """
    found = import_object(place)
    items = list(found) if isinstance(found, (tuple, list)) else [found]
    return tuple(_instance(item, place) for item in items)


def import_object(place: str, directory: Path = Path()) -> Any:
    """Whatever a name stands for.

    Args:
        place: ``package.module:NAME``, which Python must be able to import, or ``path/to/file.py:NAME``.
        directory: where a path begins.

    Raises:
        RecipeError: if there is no such file, module or name, or importing it fails.
    """
    source, _, name = place.rpartition(":")
    if not source or not name:
        raise RecipeError("not the place of a pass", got=place, expected=_FORMS)
    found: Any = _run_file(directory / source) if source.endswith(".py") else _import_module(source)
    for part in name.split("."):
        with _foreign("the module of this pass fails when it is asked for a name", source):
            is_there = hasattr(found, part)
        if not is_there:
            public = [key for key, value in getattr(found, "__dict__", {}).items() if _is_pass_like(value)]
            raise RecipeError(
                "no such name in the module", where=source, got=name, expected=", ".join(public) or "a Pass, or several"
            )
        found = getattr(found, part)
    return found


def _instance(item: object, place: str) -> Pass:
    if isinstance(item, type) and issubclass(item, Pass):
        remedy = "name an instance instead, or give the options in a recipe file"
        with _foreign("this pass cannot be made without options", place, remedy):
            return item()
    if isinstance(item, Pass):
        return item
    raise RecipeError(
        "this is no pass", where=place, got=repr(item), expected="a Pass class, an instance, or a tuple of them"
    )


def _is_pass_like(value: object) -> bool:
    items = value if isinstance(value, (tuple, list)) and value else [value]
    return (
        value is not Pass
        and value is not WeightQuantizer
        and all(isinstance(item, Pass) or (isinstance(item, type) and issubclass(item, Pass)) for item in items)
    )


def _import_module(name: str) -> ModuleType:
    remedy = "install it, put its directory on PYTHONPATH, or give the path of its file: file.py:NAME"
    with _foreign("the module of this pass cannot be imported", name, remedy):
        return importlib.import_module(name)


def _run_file(path: Path) -> ModuleType:
    """The module of a file, run once per process like any other module."""
    if not path.is_file():
        raise RecipeError("no such Python file", where=path, expected=_FORMS)
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is being run
    try:
        with _foreign("this file fails when it is imported", path):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextlib.contextmanager
def _foreign(what: str, where: object, remedy: str | None = None) -> Iterator[None]:
    """Whatever somebody else's code raises, be it no Exception, is a `RecipeError`; an interrupt stays one."""
    try:
        yield
    except (KeyboardInterrupt, QCompilerError):
        raise
    except BaseException as error:
        raise RecipeError(what, where=where, got=f"{type(error).__name__}: {error}", remedy=remedy) from error
