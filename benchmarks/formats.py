"""Checkpoints as foreign readers see them: recipe × layout × reader, against the native artifact.

``python -m benchmarks.formats MODEL --calib FILE [--engines .venv-engines]``. Each recipe is compiled once, then
lowered to each layout. A reader loads what was written by its own code; ``max`` is the largest difference of logits
relative to the largest logit, ``KL`` the divergence from the native artifact in thousandths of a nat per token,
``greedy`` how many of 64 greedy tokens agree before the first that does not. Engines compute in the
model's own dtype, so that their differences are mostly those of bfloat16; ``make test-engines`` makes their
environments.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import qcompiler as qc
from qcompiler.errors import QCompilerError
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.lowering.checkpoint.readers import ENGINES, Engine, compare

READERS = {
    "compressed-tensors": ("vllm",),
    "gptq": ("vllm", "gptqmodel"),
    "awq": ("vllm", "gptqmodel"),
    "modelopt": ("vllm",),
    "gguf": ("llama.cpp",),
}
"""Engines by layout; transformers is run as the checkpoint is written."""
RECIPES = ("w8a16", "w4a16-gptq", "w3a16-gptq", "w4a16-awq", "w8a8-smoothquant", "w8a8-dynamic", "fp8", "fp8-dynamic")
HEADINGS = ("recipe", "layout", "reader", "loads", "max", "tolerance", "KL", "greedy", "MB")


@dataclass
class Row:
    """One line of the table, as text."""

    recipe: str
    layout: str
    reader: str
    loads: str
    largest: str = ""
    tolerance: str = ""
    divergence: str = ""
    greedy: str = ""
    megabytes: str = ""

    def cells(self) -> list[str]:
        """In the order of the headings."""
        return list(vars(self).values())


def main() -> None:
    """Prints the table, and writes it where ``--output`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--engines", type=Path, help="a directory with an environment for each engine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="formats-") as scratch:
        for recipe in options.recipes:
            print(recipe, file=sys.stderr)
            calibration = qc.Calibration.from_text(options.calib, samples=16, length=128)
            result = qc.compile(options.model, recipe, calibration)
            for layout in READERS:
                place = Path(scratch) / f"{recipe}-{layout}"
                rows += measure(result, recipe, layout, place, options.engines)
    table = render([row.cells() for row in rows])
    print(table)
    if options.output is not None:
        options.output.write_text(table, encoding="utf-8")


def measure(result: qc.CompileResult, recipe: str, layout: str, place: Path, engines: Path | None) -> list[Row]:
    """The lines of one recipe in one layout."""
    target = CheckpointTarget(layout)  # type: ignore[arg-type]
    try:
        written = qc.lower(result, target, place)
    except QCompilerError as error:
        return [Row(recipe, layout, "", f"refused: {error.expected or error.what}")]
    size = f"{written['bytes'] / 1e6:.1f}"
    rows = []
    if "parity" in written:
        reader = "transformers" if layout == "compressed-tensors" else "qcompiler"
        rows.append(Row(recipe, layout, reader, "yes", *numbers(written["parity"]), "", size))
    for engine in ENGINES if engines is not None else ():
        python = engines / engine.name / "bin" / "python"
        if engine.name in READERS[layout] and python.exists():
            rows.append(read(result, recipe, layout, place, engine, python, size))
    return rows or [Row(recipe, layout, "none here", "", megabytes=size)]


def numbers(found: dict[str, float]) -> tuple[str, str, str]:
    """Largest difference, tolerance and divergence."""
    return (f"{found['max_difference']:.1e}", f"{found['tolerance']:.1e}", f"{1e3 * found['kl_divergence']:.3f}")


def read(
    result: qc.CompileResult, recipe: str, layout: str, place: Path, engine: Engine, python: Path, megabytes: str
) -> Row:
    """What an engine makes of a checkpoint, or its own words where it does not take it."""
    try:
        found = compare(result, place, engine, python=python)
    except QCompilerError as error:
        return Row(recipe, layout, engine.name, f"no: {(error.got or error.what)[:100]}", megabytes=megabytes)
    return Row(recipe, layout, engine.name, "yes", *numbers(found), str(found["greedy_tokens"]), megabytes)


def render(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
