"""Passes of third parties, named by where they lie: ``package.module:NAME`` or ``path/to/file.py:NAME``.

Importing a file runs it. That happens only for what a user names, on the command line, in Python or in a recipe file.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompiler.errors import RecipeError
from qcompiler.pass_base import Pass

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
        if not hasattr(found, part):
            public = [key for key, value in getattr(found, "__dict__", {}).items() if _is_pass_like(value)]
            raise RecipeError(
                "no such name in the module", where=source, got=name, expected=", ".join(public) or "a Pass, or several"
            )
        found = getattr(found, part)
    return found


def _instance(item: object, place: str) -> Pass:
    if isinstance(item, type) and issubclass(item, Pass):
        try:
            return item()
        except TypeError as error:
            raise RecipeError(
                "this pass has options without a default",
                where=place,
                got=error,
                remedy="name an instance instead, or give the options in a recipe file",
            ) from error
    if isinstance(item, Pass):
        return item
    raise RecipeError(
        "this is no pass", where=place, got=repr(item), expected="a Pass class, an instance, or a tuple of them"
    )


def _is_pass_like(value: object) -> bool:
    items = value if isinstance(value, (tuple, list)) and value else [value]
    return value is not Pass and all(
        isinstance(item, Pass) or (isinstance(item, type) and issubclass(item, Pass)) for item in items
    )


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever somebody else's code raises
        raise RecipeError(
            "the module of this pass cannot be imported",
            where=name,
            got=f"{type(error).__name__}: {error}",
            remedy="install it, put its directory on PYTHONPATH, or give the path of its file: file.py:NAME",
        ) from error


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
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(
            "this file fails when it is imported", where=path, got=f"{type(error).__name__}: {error}"
        ) from error
    return module
