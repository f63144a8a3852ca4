"""Checkpoints as readers see them: recipe × layout × reader, against the native artifact.

``python -m benchmarks.formats MODEL --calib FILE [--engines .venv-engines] [--output FILE]``. Each recipe that a layout
holds is compiled once and written in each layout. ``transformers, float32`` and ``qcompiler`` (our own reader) compare
as every lowering does, on 2×32 random tokens; engines as ``qcompiler verify`` does, each in a process of its own: on
2×64 random tokens and the 64 that the native artifact continues them with, all at once and one by one through the
cache. ``max`` is the largest difference of logits and ``mean`` that of tokens, relative to the largest logit, each with
its tolerance; ``KL`` the divergence from the native artifact in thousandths of a nat per token; ``greedy`` how many of
the 64 tokens agree before the first that does not. Engines compute in the model's own dtype, so that their differences
are mostly those of bfloat16; ``make test-engines`` makes their environments.

``--keep FILE`` holds the rows as JSON: what stands there is not measured again. An engine that does not load a scheme
in a layout is not asked for the next recipe of that scheme: the row names the recipe that it was asked for.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import qcompiler as qc
from benchmarks.runs import keep
from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.lowering.checkpoint.readers import ENGINES, Engine, compare
from qcompiler.numerics import Scheme
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipes import RECIPES
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.reporting import machine

READERS = {
    "compressed-tensors": ("transformers", "vllm"),
    "gptq": ("vllm", "gptqmodel"),
    "awq": ("vllm", "gptqmodel"),
    "modelopt": ("vllm",),
    "gguf": ("llama.cpp",),
}
"""Engines by layout."""
HEADINGS = ("recipe", "layout", "reader", "loads", "max", "tolerance", "mean", "tolerance", "KL", "greedy", "MB")
WIDTH = 256
"""Input channels that a layout is asked about: every group and block divides it."""

REFUSED, BEYOND = "no: ", "at most"
"""How what an engine says begins; what is in it where it loads a checkpoint, and computes something else."""


@dataclass
class Row:
    """One line of the table, as text; of a layout that does not hold the recipe, ``loads`` says why."""

    recipe: str
    layout: str
    reader: str
    loads: str
    largest: str = ""
    tolerance: str = ""
    mean: str = ""
    mean_tolerance: str = ""
    divergence: str = ""
    greedy: str = ""
    megabytes: str = ""
    version: str = field(default="", kw_only=True)

    def cells(self) -> list[str]:
        """In the order of the headings."""
        return list(vars(self).values())[: len(HEADINGS)]


def main() -> None:
    """Prints the table, and writes it where ``--output`` says as rows come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, "fp8+kv-fp8-static"])
    parser.add_argument("--engines", type=Path, help="a directory with an environment for each engine")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    is_kept = options.keep is not None and options.keep.is_file()
    rows = [Row(**fields) for fields in json.loads(options.keep.read_text())] if is_kept else []
    for recipe in options.recipes:
        for added in rows_of(recipe, options, rows):
            rows += added
            for row in added:
                print(time.strftime("%H:%M:%S"), *row.cells(), file=sys.stderr, flush=True)
            if options.keep is not None:
                keep(options.keep, [dataclasses.asdict(row) for row in rows])
            if options.output is not None:
                options.output.write_text(render(rows, options), encoding="utf-8")
    print(render(rows, options))


def rows_of(recipe: str, options: argparse.Namespace, rows: list[Row]) -> Iterator[list[Row]]:
    """The lines of one recipe, layout by layout, that are not among the rows. What no layout holds is not compiled."""
    refusals = {layout: refusal(recipe, layout) for layout in READERS}
    missing = [layout for layout in READERS if not any((row.recipe, row.layout) == (recipe, layout) for row in rows)]
    if all(refusals.values()):
        yield [Row(recipe, layout, "", f"refused: {refusals[layout]}") for layout in missing]
        return
    if missing:
        calibration = qc.Calibration.from_text(options.calib, samples=16, length=128)
        result = qc.compile(captured(options.model), recipe, calibration)
    for layout in missing:
        with tempfile.TemporaryDirectory(prefix="formats-") as scratch:
            yield measure(result, recipe, layout, Path(scratch) / layout, options.engines, rows)


@cache
def captured(model: Path) -> Graph:
    """The graph that all recipes begin with."""
    return qc.capture(model)


def schemes_of(recipe: str) -> list[Scheme]:
    """What a recipe assigns."""
    assigned = [item.scheme for item in named_recipe(recipe) if isinstance(item, Assign) and item.scheme]
    return [Scheme.parse(name) for name in assigned]


def refusal(recipe: str, layout: str) -> str:
    """Why a layout does not hold the weights and inputs of a recipe; nothing where it does."""
    target = CheckpointTarget(layout)  # type: ignore[arg-type]
    answers = [target.supports(scheme, WIDTH) for scheme in schemes_of(recipe)]
    return next((answer.reason for answer in answers if answer.status == "refused"), "")


def measure(
    result: qc.CompileResult, recipe: str, layout: str, place: Path, engines: Path | None, rows: Sequence[Row] = ()
) -> list[Row]:
    """The lines of one recipe in one layout, behind others that have been measured."""
    target = CheckpointTarget(layout)  # type: ignore[arg-type]
    try:
        written = qc.lower(result, target, place)
    except QCompilerError as error:
        return [Row(recipe, layout, "", f"refused: {error.expected or error.what}")]
    size = f"{written['bytes'] / 1e6:.1f}"
    reader = "transformers, float32" if layout == "compressed-tensors" else "qcompiler"
    if "parity" in written:
        found = [Row(recipe, layout, reader, "yes", *numbers(written["parity"]), "", size)]
    else:
        why = next((note for note in written["notes"] if note.startswith("not compared")), "not compared")
        found = [Row(recipe, layout, reader, why, megabytes=size)]
    for engine in ENGINES if engines is not None else ():
        python = engines / engine.name / "bin" / "python"
        if engine.name == "transformers":  # a dependency of ours
            python = Path(sys.executable)
        if engine.name not in READERS[layout] or not python.exists():
            continue
        if words := lacking(rows, recipe, layout, engine):
            found.append(Row(recipe, layout, engine.name, words, megabytes=size))
        else:
            found.append(read(result, recipe, layout, place, engine, python, size))
    return found


def lacking(rows: Sequence[Row], recipe: str, layout: str, engine: Engine) -> str:
    """That an engine did not load another recipe of the same schemes, in the same layout; nothing where it did.

    Where inputs are rounded, layers may be left out by what calibration finds, and the engine is asked.
    """
    if any(scheme.activation is not None for scheme in schemes_of(recipe)):
        return ""
    asked = (row for row in rows if (row.layout, row.reader) == (layout, engine.name))
    not_loaded = (row.recipe for row in asked if row.loads.startswith(REFUSED) and BEYOND not in row.loads)
    return next((f"no, as {other}" for other in not_loaded if schemes_of(other) == schemes_of(recipe)), "")


def numbers(found: dict[str, float]) -> list[str]:
    """Largest difference, mean, each with its tolerance, and divergence."""
    names = ("max_difference", "tolerance", "mean_difference", "mean_tolerance")
    return [*(f"{found[name]:.1e}" for name in names), f"{1e3 * found['kl_divergence']:.3f}"]


def read(
    result: qc.CompileResult, recipe: str, layout: str, place: Path, engine: Engine, python: Path, megabytes: str
) -> Row:
    """What an engine makes of a checkpoint, or its own words where it does not take it."""
    try:
        found = compare(result, place, engine, python=python)
    except QCompilerError as error:
        words = f"{error.got or error.what}"[:200] + (f"; {error.expected}" if BEYOND in str(error.expected) else "")
        return Row(recipe, layout, engine.name, f"{REFUSED}{words}", megabytes=megabytes)
    told, version = str(found["greedy_tokens"]), str(found["version"])
    return Row(recipe, layout, engine.name, "yes", *numbers(found), told, megabytes, version=version)


def render(rows: list[Row], options: argparse.Namespace) -> str:
    """The tables of what was read and of what was refused, as Markdown."""
    engines = {row.reader: row.version for row in rows if row.version}
    where = ", ".join(f"{name} {value}" for name, value in {**machine(), **engines}.items())
    order = {recipe: place for place, recipe in enumerate(RECIPES)}
    rows = sorted(rows, key=lambda row: order.get(row.recipe, len(order)))
    held = [row.cells() for row in rows if row.reader]
    refused = [[row.recipe, row.layout, row.loads.removeprefix("refused: ")] for row in rows if not row.reader]
    about = textwrap.fill(f"`{options.model.name}`, calibrated on 16×128 tokens. {where}.", 118)
    lines = ["# Checkpoints and their readers", "", about, "", *table(HEADINGS, held)]
    if refused:
        lines += ["", "Refused, ahead of any work:", "", *table(("recipe", "layout", "what it holds"), refused)]
    return "\n".join(lines) + "\n"


def table(headings: Sequence[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


if __name__ == "__main__":
    main()
