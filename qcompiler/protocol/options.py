"""What the options of a pass or a target may be, said in their annotations and checked when it is made.

``damping: Annotated[float, Within(0, 1)] = 0.05`` is a number from 0 to 1. Types are checked as far as an annotation is
made of plain types, literals, unions and None; what else it says is left to the pass.
"""

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import Doc

from qcompiler.errors import QCompilerError, RecipeError, did_you_mean

__all__ = ["Option", "Within", "check_options", "describe_hint", "list_options", "read_options", "unknown_option"]


_WORDS = {"true": True, "false": False, "none": None}


@dataclasses.dataclass(frozen=True)
class Within:
    """Numbers from ``least`` to ``most``, both included unless ``above`` or ``below`` says so.

    Attributes:
        least, most: the bounds; None: none.
        above: ``least`` itself is not among them.
        below: ``most`` itself is not among them.
    """

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is among them; one that is not a number is not."""
        if not math.isfinite(value):
            return False
        if self.least is not None and not (value > self.least if self.above else value >= self.least):
            return False
        return self.most is None or (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        parts = []
        if self.least is not None:
            parts.append(f"above {self.least:g}" if self.above else f"at least {self.least:g}")
        if self.most is not None:
            parts.append(f"below {self.most:g}" if self.below else f"at most {self.most:g}")
        return "a finite number" if not parts else ", ".join(parts)


def check_options(instance: Any, error: type[QCompilerError] = RecipeError) -> None:
    """Checks every field of a dataclass against its annotation.

    Args:
        instance: of the dataclass.
        error: what to raise.

    Raises:
        RecipeError: or ``error``, naming class and option, for a value of another type or out of its bounds.
    """
    cls = type(instance)
    try:
        hints = get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations of somebody else's that cannot be looked up
        return
    for item in dataclasses.fields(instance):
        value, hint = getattr(instance, item.name), hints[item.name]
        where = f"{cls.__name__}.{item.name}"
        if not _fits(value, hint):
            literals = [str(word) for word in _literals(hint)]
            raise error(
                "an option of the wrong kind",
                where=where,
                got=repr(value),
                expected=describe_hint(hint),
                remedy=did_you_mean(value, literals),
            )
        for bounds in _bounds(hint):
            if isinstance(value, numbers.Real) and not bounds.holds(float(value)):
                raise error("an option out of range", where=where, got=value, expected=bounds)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option that a pass or target has.

    Attributes:
        name: of the field.
        values: what it takes, in words.
        default: as text.
        help: what it is for; empty where its annotation has no ``Doc``.
    """

    name: str
    values: str
    default: str
    help: str


def list_options(cls: type[Any]) -> list[Option]:
    """The options of a class, in order."""
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for item in dataclasses.fields(cls):
        extras = getattr(hints[item.name], "__metadata__", ())
        documented = [extra.documentation for extra in extras if isinstance(extra, Doc)]
        default = "" if item.default is dataclasses.MISSING else str(item.default).lower()
        found.append(Option(item.name, describe_hint(hints[item.name]), default, " ".join(documented)))
    return found


def read_options(cls: type[Any], texts: Mapping[str, str], error: type[QCompilerError] = RecipeError) -> dict[str, Any]:
    """Values of options written as text, as on a command line: numbers, words, ``true``, ``false`` and ``none``.

    Args:
        cls: a dataclass of options.
        texts: by name, or by the beginning of a name that no other has.
        error: what to raise.

    Returns:
        By name. A text that no type of its option can be read from stays text, which `check_options` refuses.

    Raises:
        RecipeError: or ``error``, for an option that the class has not.
    """
    hints, found = get_type_hints(cls, include_extras=True), {}
    names = [item.name for item in dataclasses.fields(cls)]
    for given, text in texts.items():
        matching = [given] if given in names else [name for name in names if name.startswith(given)]
        if len(matching) != 1 or matching[0] in found:
            raise unknown_option(cls, given, error, is_known=bool(matching))
        found[matching[0]] = _read(text, hints[matching[0]])
    return found


def unknown_option(
    cls: type[Any], name: str, error: type[QCompilerError] = RecipeError, *, is_known: bool = False
) -> QCompilerError:
    """The error for an option that a class has not; ``is_known``: for a name that several begin with."""
    options = list_options(cls)
    return error(
        "which option is meant is not clear" if is_known else "unknown option",
        where=cls.__name__,
        got=name,
        expected=", ".join(f"{option.name} ({option.values})" for option in options) or "no options",
        remedy=did_you_mean(name, [option.name for option in options]),
    )


def _read(text: str, hint: Any) -> Any:
    values: list[Any] = [_WORDS[text.lower()]] if text.lower() in _WORDS else []
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            values.append(kind(text))
    return next((value for value in values if _fits(value, hint)), text)


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == item and type(value) is type(item) for item in arguments)
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin is type:
        return isinstance(value, type)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    return True


def _literals(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for argument in get_args(hint) for word in _literals(argument))


def _bounds(hint: Any) -> list[Within]:
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Within)]
    return own + [found for argument in get_args(hint) if get_origin(argument) for found in _bounds(argument)]


def describe_hint(hint: Any, none: str = "none") -> str:
    """An annotation in words, as far as they are shorter; ``none`` is what None is called."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = ", ".join(map(str, _bounds(hint)))
        return describe_hint(arguments[0], none) + (f" {bounds}" if bounds else "")
    if hint in (None, NoneType):
        return none
    if origin in (Union, UnionType):
        return " or ".join(describe_hint(argument, none) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is type:
        return f"a class of {describe_hint(arguments[0], none)}"
    if isinstance(origin, type) and issubclass(origin, (Mapping, Sequence)):
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return hint.__name__ if isinstance(hint, type) else str(hint)
