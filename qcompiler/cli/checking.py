"""The command ``check``: what a target makes of a file that somebody else wrote."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.cli.options import Json
from qcompiler.cli.output import Kept
from qcompiler.errors import TargetError
from qcompiler.reporting import print_rows

if TYPE_CHECKING:
    from qcompiler.lowering.tensorrt.legality import Checked

__all__ = ["check"]

_FOUND = 3  # as where a verification failed


def check(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="An ONNX file, anybody's; its weights are not read.")],
    target: Annotated[
        str, typer.Option("--for", help="tensorrt:sm=89, or of several compute capabilities tensorrt:sm=80+89.")
    ],
    as_json: Json = False,
) -> dict[str, Any]:
    """Tell what TensorRT refuses, computes differently or does not fuse in FILE; status 3 if anything but the last."""
    from qcompiler.lowering.tensorrt import check as check_file

    found = check_file(file, _capabilities(target))
    if not as_json:
        _print(found)
    kept: Kept = context.obj
    kept.status = 0 if found.builds else _FOUND
    return found.to_dict()


def _capabilities(text: str) -> tuple[int, ...]:
    """Of ``tensorrt:sm=80+89``; 89 where none is named."""
    name, _, options = text.partition(":")
    option, equals, numbers = (options or "sm=89").partition("=")
    parts = numbers.split("+")
    if name != "tensorrt" or option != "sm" or not equals or not all(part.isdecimal() for part in parts):
        raise TargetError(
            "files are checked for TensorRT alone, by compute capability",
            where="--for",
            got=text,
            expected="such as tensorrt:sm=89 or tensorrt:sm=80+89",
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _print(checked: "Checked") -> None:
    """Prints a table of findings, why and what to do, and what is fused."""
    findings = checked.findings
    if findings:
        rows = [
            [each.verdict, str(each.count), each.found, each.node, "+".join(map(str, each.sm))] for each in findings
        ]
        print_rows(("verdict", "count", "found", "first at", "sm"), rows)
    said = dict.fromkeys((each.rule, each.reason, each.remedy) for each in findings)
    for rule, reason, remedy in said:
        print(f"{rule}: {reason}\n  instead: {remedy}")
    for kind, count in checked.fused.items():
        print(f"fused: {kind}: {count}")
    print("it builds" if checked.builds else "it does not build as it is meant")
