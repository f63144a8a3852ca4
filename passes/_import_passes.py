"""Passes of third parties, named by where they lie: ``package.module:NAME`` or ``path/to/file.py:NAME``.

Importing a file runs it. That happens only for what a user names, on the command line, in Python or in a recipe file.
"""

from qcompiler.errors import RecipeError
from qcompiler.protocol import Pass, WeightQuantizer, foreign, import_object

__all__ = ["import_passes", "is_pass_like"]


def import_passes(place: str) -> tuple[Pass, ...]:
    """The passes behind a name: a class (with its default options), an instance, or a sequence of these.

    Raises:
        RecipeError: if the import fails, or gives something else.
    """
    found = import_object(place, offers=is_pass_like)
    items = list(found) if isinstance(found, (tuple, list)) else [found]
    return tuple(_instance(item, place) for item in items)


def _instance(item: object, place: str) -> Pass:
    if isinstance(item, type) and issubclass(item, Pass):
        remedy = "name an instance instead, or give the options in a recipe file"
        with foreign("this pass cannot be made without options", place, remedy):
            return item()
    if isinstance(item, Pass):
        return item
    raise RecipeError(
        "this is no pass", where=place, got=repr(item), expected="a Pass class, an instance, or a tuple of them"
    )


def is_pass_like(value: object) -> bool:
    """Whether something is a pass, a class of passes, or several."""
    items = value if isinstance(value, (tuple, list)) and value else [value]
    return value not in (Pass, WeightQuantizer) and all(
        isinstance(item, Pass) or (isinstance(item, type) and issubclass(item, Pass)) for item in items
    )
