"""Checkpoints as foreign readers see them: recipe × layout × reader, against the native artifact.

``python -m benchmarks.formats MODEL --calib FILE [--vllm PYTHON]``. Each recipe is compiled once, then lowered to each
layout. A reader loads what was written by its own code; ``max`` is the largest difference of logits relative to the
largest logit (of vLLM, of log-probabilities), ``KL`` the divergence from the native artifact in thousandths of a nat
per token, ``greedy`` how many of 64 greedy tokens agree before the first that does not. vLLM computes in the model's
own dtype, so that its differences are mostly those of bfloat16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qcompiler as qc
from qcompiler.errors import QCompilerError
from qcompiler.lowering.checkpoint import CheckpointTarget

DRIVER = Path(__file__).parent / "peer_drivers" / "read_vllm.py"
LAYOUTS = ("compressed-tensors", "gptq", "awq", "modelopt")
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
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vLLM")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="formats-") as scratch:
        for recipe in options.recipes:
            print(recipe, file=sys.stderr)
            calibration = qc.Calibration.from_text(options.calib, samples=16, length=128)
            result = qc.compile(options.model, recipe, calibration)
            for layout in LAYOUTS:
                place = Path(scratch) / f"{recipe}-{layout}"
                rows += measure(result, recipe, layout, place, options.vllm)
    table = render([row.cells() for row in rows])
    print(table)
    if options.output is not None:
        options.output.write_text(table, encoding="utf-8")


def measure(result: qc.CompileResult, recipe: str, layout: str, place: Path, vllm: Path | None) -> list[Row]:
    """The lines of one recipe in one layout."""
    target = CheckpointTarget(layout)  # type: ignore[arg-type]
    try:
        written = qc.lower(result, target, place)
    except QCompilerError as error:
        return [Row(recipe, layout, "", f"refused: {error.expected or error.what}")]
    size = f"{written['bytes'] / 1e6:.1f}"
    rows = []
    if "parity" in written:
        found = written["parity"]
        numbers = (f"{found['max_difference']:.1e}", f"{found['tolerance']:.1e}", f"{1e3 * found['kl_divergence']:.3f}")
        reader = "transformers" if layout == "compressed-tensors" else "qcompiler"
        rows.append(Row(recipe, layout, reader, "yes", *numbers, "", size))
    if vllm is not None:
        rows.append(read_with_vllm(result, recipe, layout, place, vllm, size))
    return rows or [Row(recipe, layout, "none here", "", megabytes=size)]


def read_with_vllm(
    result: qc.CompileResult, recipe: str, layout: str, place: Path, python: Path, megabytes: str
) -> Row:
    """What vLLM makes of a checkpoint, in a process of its environment."""
    native = result.artifact()
    ids = torch.randint(native.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens, out = place.parent / "tokens.json", place.parent / "out.npz"
    tokens.write_text(json.dumps(ids.tolist()))
    out.unlink(missing_ok=True)
    command = [str(python), str(DRIVER), str(place), str(tokens), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        said = [line for line in (run.stderr + run.stdout).splitlines() if "Error" in line]
        return Row(
            recipe, layout, "vLLM", f"no: {said[-1].split('Error:')[-1].strip()[:100] if said else 'it crashed'}"
        )
    read = np.load(out)
    expected = native.forward(ids)[:, :-1].log_softmax(-1)
    found = torch.from_numpy(read["logprobs"])
    largest = (found - expected).abs().max() / expected.abs().max()
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    agreed = [matching(greedy(native, row), list(theirs)) for row, theirs in zip(ids, read["continued"], strict=True)]
    return Row(
        recipe,
        layout,
        "vLLM",
        "yes",
        f"{largest:.1e}",
        "",
        f"{1e3 * float(divergence):.3f}",
        f"{min(agreed)}",
        megabytes,
    )


def greedy(artifact: Any, ids: torch.Tensor, count: int = 64) -> list[int]:
    """The most likely tokens, one after the other."""
    logits, cache = artifact.prefill(ids[None])
    found = [int(logits[0, -1].argmax())]
    while len(found) < count:
        logits, cache = artifact.step(torch.tensor([[found[-1]]]), cache)
        found.append(int(logits[0, -1].argmax()))
    return found


def matching(first: list[int], second: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(first, second, strict=True)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(first))


def render(rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
