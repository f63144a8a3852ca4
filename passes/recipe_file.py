"""`load_recipe`: passes from a name, a TOML file, or the place of somebody else's pass; see docs/recipes.md."""

import dataclasses
import inspect
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import qcompiler.passes as shipped
from qcompiler.errors import RecipeError, did_you_mean
from qcompiler.passes._import_passes import import_passes, is_pass_like
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.protocol import Pass, Pipeline, describe_hint, import_object
from qcompiler.storage import read_named

__all__ = ["load_recipe", "override_schemes", "read_recipe"]

_KEYS = ("base", "schemes", "passes")


def load_recipe(recipe: str | Path | Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes of a recipe.

    Args:
        recipe: a name (`qcompiler.passes.recipes`), a ``.toml`` file, ``package.module:NAME``, ``file.py:NAME``, or
            the passes themselves. A name of the last two kinds is imported, which runs its code.

    Raises:
        RecipeError: if it is none of these, or damaged.
    """
    if not isinstance(recipe, (str, Path)):
        if not isinstance(recipe, (list, tuple)):
            raise RecipeError("a recipe is a name, a file, or a list or tuple of passes", got=repr(recipe))
        return tuple(recipe)
    if str(recipe).endswith(".toml"):
        return read_recipe(Path(recipe))
    if isinstance(recipe, Path) or recipe.endswith(".py"):
        raise RecipeError("not a recipe file", got=recipe, expected="FILE.toml, or FILE.py:NAME")
    return import_passes(recipe) if ":" in recipe else named_recipe(recipe)


def override_schemes(
    passes: Sequence[Pass], overrides: Mapping[str, str | None] | None, *, where: str = "overrides"
) -> tuple[Pass, ...]:
    """Puts overrides behind those of the recipe's `Assign`, so that they win.

    Args:
        passes: of the recipe.
        overrides: glob pattern of site names → scheme name; None, ``"none"`` or ``"float"`` for no scheme.
        where: what errors call the overrides.

    Raises:
        RecipeError: if nothing in the recipe assigns schemes, if two passes do, or for an unknown scheme.
    """
    items = tuple(passes)
    assigns = [item for item in items if isinstance(item, Assign)]
    if len(assigns) > 1:
        raise RecipeError(
            "a recipe assigns schemes twice",
            where=where,
            got="; ".join(map(str, assigns)),
            expected="one Assign, with overrides for the sites that differ",
        )
    if not overrides:
        return items
    if not assigns and any(isinstance(implied, Assign) for item in items for implied in item.implied_passes()):
        items = Pipeline(items).passes
        assigns = [item for item in items if isinstance(item, Assign)]
    if not assigns:
        raise RecipeError(
            "overrides need a recipe that assigns schemes", where=where, got=[item.name for item in passes]
        )
    (assign,) = assigns
    wanted = {pattern: _scheme(scheme) for pattern, scheme in overrides.items()}
    for pattern, scheme in wanted.items():
        try:
            replace(assign, overrides={pattern: scheme})
        except RecipeError as error:
            error.where = f"{where}: {pattern!r}"
            raise
    earlier = {pattern: scheme for pattern, scheme in assign.overrides.items() if pattern not in wanted}
    widened = replace(assign, overrides={**earlier, **wanted})
    return tuple(widened if item is assign else item for item in items)


def _scheme(name: str | None) -> str | None:
    return None if name is None or name.lower() in ("none", "float") else name


def read_recipe(path: Path) -> tuple[Pass, ...]:
    """The passes of a TOML file.

    Raises:
        RecipeError: naming file and key, for anything it cannot stand for.
    """
    try:
        fields = tomllib.loads(read_named(path).decode("utf-8-sig"))  # editors on Windows put a mark at the start
    except OSError as error:
        raise RecipeError("the recipe file cannot be read", where=path, got=error.strerror) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, TOMLDecodeError; arrays in arrays in arrays
        raise RecipeError("the recipe file is not TOML", where=path, got=error) from error
    _refuse_unknown(fields, _KEYS, path, "a recipe")
    base = _typed(fields, "base", str, path)
    tables = _typed(fields, "passes", list, path) or []
    schemes = _typed(fields, "schemes", dict, path) or {}
    if base is None and not tables:
        raise RecipeError("a recipe file needs a base or passes", where=path, got=", ".join(fields) or "nothing")
    if base is None:
        passes = tuple(_build(table, path, index) for index, table in enumerate(tables))
        _refuse_contradiction(passes, schemes, path)
    else:
        passes = _named(base, path)
        changed: set[type[Pass]] = set()
        for index, table in enumerate(tables):
            passes = _with_options(passes, table, changed, path, index)
    for pattern, scheme in schemes.items():
        if not isinstance(scheme, str):
            raise RecipeError(
                "a scheme is a name", where=f"{path}: schemes.{pattern!r}", got=repr(scheme), expected='"w8a16", "none"'
            )
    return override_schemes(passes, schemes, where=f"{path}: schemes")


def _named(name: str, path: Path) -> tuple[Pass, ...]:
    try:
        return named_recipe(name)
    except RecipeError as error:
        error.where = f"{path}: base"
        if error.remedy is None or not error.remedy.startswith("did you mean"):
            error.remedy = "without a base, list all the passes"
        raise


def _refuse_contradiction(passes: Sequence[Pass], schemes: Mapping[str, Any], path: Path) -> None:
    for item in passes:
        for pattern, scheme in item.overrides.items() if isinstance(item, Assign) else ():
            if pattern in schemes and _scheme(schemes[pattern]) != scheme:
                raise RecipeError(
                    "a recipe file says two things about the same sites",
                    where=f"{path}: schemes.{pattern!r}",
                    got=f"{schemes[pattern]} here, {scheme or 'none'} in Assign",
                    remedy="say it once",
                )


def _with_options(
    passes: tuple[Pass, ...], table: object, changed: set[type[Pass]], path: Path, index: int
) -> tuple[Pass, ...]:
    """The passes of a base, one of them with other options."""
    cls, options, where = _read_table(table, path, index)
    places = [i for i, item in enumerate(passes) if type(item) is cls]
    if len(places) != 1 or cls in changed:
        raise RecipeError(
            "with a base, each entry of passes changes the options of one pass that the base has",
            where=where,
            got=f"{cls.__name__} once more" if places else cls.__name__,
            expected=", ".join(type(item).__name__ for item in passes) + ", each once",
            remedy="leave the base out and list all the passes",
        )
    changed.add(cls)
    (place,) = places
    made = _make(lambda: replace(passes[place], **options), where)
    return (*passes[:place], made, *passes[place + 1 :])


def _build(table: object, path: Path, index: int) -> Pass:
    cls, options, where = _read_table(table, path, index)
    missing = [
        item.name
        for item in dataclasses.fields(cls)
        if item.init
        and item.name not in options
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError("an option without a default is missing", where=where, expected=", ".join(missing))
    return _make(lambda: cls(**options), where)


def _make(make: Any, where: str) -> Pass:
    """Calls a constructor; what it refuses is an error that names the place in the file."""
    try:
        made: Pass = make()
    except RecipeError as error:
        error.where = where if error.where is None else f"{where}: {error.where}"
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError("the pass refuses its options", where=where, got=error) from error
    return made


def _read_table(table: object, path: Path, index: int) -> tuple[type[Pass], dict[str, Any], str]:
    """Class, converted options and place of one entry of ``passes``."""
    where = f"{path}: passes[{index}]"
    if not isinstance(table, dict) or not isinstance(table.get("use"), str):
        raise RecipeError(
            'an entry of passes names its pass: use = "GPTQ"', where=f"{where}.use", got=repr(table), expected="a table"
        )
    cls = _pass_class(table["use"], path, where)
    where = f"{where} ({cls.__name__})"
    names = [item.name for item in dataclasses.fields(cls) if item.init]
    _refuse_unknown(table, ("use", *names), where, cls.__name__)
    try:
        hints = get_type_hints(cls)
    except (NameError, TypeError) as error:
        raise RecipeError("the annotations of this pass cannot be read", where=where, got=error) from error
    options = {}
    for name, value in table.items():
        if name != "use":
            try:
                options[name] = _convert(value, hints[name], path.parent)
            except RecipeError as error:
                error.where = f"{where}.{name}" if error.where is None else f"{where}.{name}: {error.where}"
                raise
            except _Misfit as misfit:
                raise RecipeError(
                    "an option of the wrong type",
                    where=f"{where}.{name}",
                    got=repr(misfit.value),
                    expected=describe_hint(misfit.hint, none='"none"'),  # as TOML says it
                ) from None
    return cls, options, where


def _pass_class(name: str, path: Path, where: str) -> type[Pass]:
    known: dict[str, type[Pass]] = {
        key: value for key in shipped.__all__ if _is_pass_class(value := getattr(shipped, key))
    }
    if ":" not in name:
        if name not in known:
            raise RecipeError(
                "unknown pass",
                where=f"{where}.use",
                got=name,
                expected=", ".join(known) + "; or package.module:ClassName, path/to/file.py:ClassName",
                remedy=did_you_mean(name, known),
            )
        return known[name]
    try:
        found = import_object(name, path.parent, offers=is_pass_like)
    except RecipeError as error:
        error.where = f"{where}.use" if error.where is None else f"{where}.use: {error.where}"
        raise
    if not _is_pass_class(found):
        raise RecipeError("this is no class of passes", where=f"{where}.use", got=f"{name} is {found!r}")
    cls: type[Pass] = found
    return cls


def _is_pass_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Pass) and not inspect.isabstract(value)


def _refuse_unknown(fields: Mapping[str, Any], known: Sequence[str], where: object, what: str) -> None:
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise RecipeError(
            f"unknown key in {what}",
            where=f"{where}: {unknown[0]}",
            expected=", ".join(known),
            remedy=did_you_mean(unknown[0], known),
        )


def _typed(fields: Mapping[str, Any], key: str, kind: type[Any], path: Path) -> Any:
    value = fields.get(key)
    if value is not None and not isinstance(value, kind):
        expected = {"base": "a string", "passes": "tables: [[passes]]", "schemes": "a table: [schemes]"}[key]
        raise RecipeError("a key of the wrong type", where=f"{path}: {key}", got=repr(value), expected=expected)
    return value


class _Misfit(Exception):
    """A value that its annotation does not take."""

    def __init__(self, value: object, hint: Any) -> None:
        self.value, self.hint = value, hint
        super().__init__()


def _convert(value: Any, hint: Any, directory: Path) -> Any:
    """A TOML value as an option annotated ``hint`` takes it.

    TOML has no null, so ``"none"`` stands for None; nor classes, so ``"file.py:Name"`` stands for one, a relative path
    beginning at ``directory``.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for candidate in sorted(arguments, key=lambda a: a is not NoneType):
            try:
                return _convert(value, candidate, directory)
            except _Misfit:
                continue
    elif hint is NoneType and value == "none":
        return None
    elif hint is Any or (hint in (bool, str, int) and type(value) is hint):
        return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif origin is type and isinstance(value, str) and ":" in value:
        found = import_object(value, directory)
        if isinstance(found, type):
            return found
    elif origin is Literal and any(value == item and type(value) is type(item) for item in arguments):
        return value
    elif isinstance(hint, type) and issubclass(hint, Enum) and value in [item.value for item in hint]:
        return hint(value)
    elif isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _convert(item, arguments[1], directory) for key, item in value.items()}
    elif isinstance(value, list) and isinstance(origin, type) and issubclass(origin, Sequence):
        if origin is not tuple or arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) == len(value):
            items = [_convert(item, wanted, directory) for item, wanted in zip(value, arguments, strict=True)]
            return tuple(items) if origin is tuple else items
    raise _Misfit(value, hint)
