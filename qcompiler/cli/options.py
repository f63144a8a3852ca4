"""The options that several commands share, and what their texts mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from qcompiler import api
from qcompiler.artifacts import Calibration
from qcompiler.errors import InputError, RecipeError, TargetError
from qcompiler.protocol import Target

__all__ = [
    "Engine",
    "Json",
    "Overwrite",
    "Place",
    "Stream",
    "Threads",
    "To",
    "Trust",
    "Verbose",
    "first_tokens",
    "parse_bytes",
    "parse_overrides",
    "parse_targets",
    "read_calibration",
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Engine = Annotated[
    str | None, typer.Option(help="kernels: run a native artifact by fused low-bit operators, not by the reference.")
]
Place = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or auto; by default auto with kernels, and cpu without.")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Keep one segment of a native artifact's weights in memory at a time, or all; by default, all if they "
        "take no more than half of the free memory.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="To compute with; by default one for each core that is allowed and free.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell on stderr what is done, with times.")]
To = Annotated[
    list[str] | None,
    typer.Option(
        help="A target, such as onnx or onnx:opset=23 (see `qcompiler targets`), or FILE.py:NAME, which is run."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace artifacts that the output holds, with all that is in them.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code the model directory brings along.")
]


def parse_overrides(texts: Sequence[str]) -> dict[str, str | None]:
    """In the order given, so that the last match wins; a repeated pattern counts where it stands last."""
    found: dict[str, str | None] = {}
    for pattern, scheme in map(_override, texts):
        if pattern in found and found.pop(pattern) != scheme:
            raise RecipeError(
                "two overrides of one pattern", got=", ".join(t for t in texts if t.startswith(f"{pattern}="))
            )
        found[pattern] = scheme
    return found


def _override(text: str) -> tuple[str, str | None]:
    pattern, equals, scheme = text.partition("=")
    if not equals or not pattern:
        raise RecipeError("an override is PATTERN=SCHEME", got=text, expected="such as 'lm_head=w8a16' or '*.0.*=none'")
    return pattern, None if scheme.lower() in ("none", "float", "") else scheme


def parse_targets(texts: Sequence[str]) -> dict[str, Target]:
    """The targets of texts such as ``onnx:opset=23``, by text.

    Raises:
        TargetError: for one that is unknown, or named twice.
    """
    found = [api.make_target(text) for text in texts]
    names = [target.name for target in found]
    if len(set(names)) < len(names):
        raise TargetError("a target is named twice", got=", ".join(names), expected="each at most once")
    return dict(zip(texts, found, strict=True))


def parse_bytes(text: str) -> int:
    """Bytes of an amount such as ``500MB`` or ``4GB``; units are powers of 1024."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = text.upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in "KMGT":
        number, unit = number[:-1], number[-1]
    try:
        value = int(float(number) * units[unit])
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise InputError("not an amount of memory", got=text, expected="such as 500MB or 4GB")
    return value


def read_calibration(path: Path, samples: int, length: int, seed: int) -> Calibration:
    """Of a text; of inputs by name where the file is an ``.npz``."""
    if path.suffix == ".npz":
        return Calibration.from_inputs(path)
    return Calibration.from_text(path, samples=samples, length=length, seed=seed)


def first_tokens(text: Path, directory: Path) -> Tensor:
    """int64 ``[1, 64]``: a window of a text, by the tokenizer of a directory."""
    return Calibration.from_text(text, samples=1, length=64).bind(directory).ids
