"""Compiles the shipped model with two recipes, compares them with the original, and generates text from the INT4 model.

``make demo`` runs it. Each recipe is compiled by the ``qcompiler`` command in a process of its own, so that the peak
memory shown is its own.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import qcompiler as qc

EXAMPLES = Path(__file__).parent
MODEL = EXAMPLES / "booklm"
CALIBRATION, HELD_OUT = EXAMPLES / "text" / "calibration.txt", EXAMPLES / "text" / "held-out.txt"
RECIPES = ("w4a16-rtn", "w4a16-gptq")
PROMPT = "It was late in the evening when"


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="replaced if it exists")
    output: Path = parser.parse_args().output
    console = Console(width=110)
    start = time.perf_counter()

    table = Table("model", "MiB", "bits/weight", "perplexity", "KL to original", "top-1", "seconds", "peak MiB")
    for index, recipe in enumerate(RECIPES):
        console.print(f"compiling with {recipe} ...")
        directory = output / recipe
        compiled = run(
            "compile", MODEL, "-r", recipe, "-o", directory, "--to", "onnx", "--overwrite",
            "--calib", CALIBRATION, "--samples", 44, "--length", 256,
        )  # fmt: skip
        measured = run("evaluate", directory, "--text", HELD_OUT, "--against", MODEL)
        if index == 0:
            size = f"{compiled['bytes_before'] / 2**20:.1f}"
            table.add_row(
                "original (bfloat16)", size, "16.00", f"{measured['reference_perplexity']:.2f}", "0", "1", "", ""
            )
        table.add_row(
            recipe,
            f"{compiled['bytes_after'] / 2**20:.1f}",
            f"{compiled['bits_per_weight']:.2f}",
            f"{measured['perplexity']:.2f}",
            f"{measured['kl_divergence']:.5f}",
            f"{measured['top1_agreement']:.3f}",
            f"{compiled['seconds']:.1f}",
            f"{compiled['peak_rss_bytes'] / 2**20:.0f}",
        )
    console.print(table)
    console.print("seconds and peak memory are those of compiling; the embedding table stays in bfloat16")

    folder = output / RECIPES[-1] / "onnx"
    console.print(f"\ngenerating with ONNX Runtime from {folder}:")
    generated = qc.generate(folder, PROMPT, max_new_tokens=60, temperature=0.8, top_k=40, seed=3)
    console.print(PROMPT + generated.text, style="italic", highlight=False)
    rate = len(generated.tokens) / generated.seconds
    console.print(f"\n{rate:.0f} tokens per second; {time.perf_counter() - start:.0f} s in all")


def run(*arguments: Any) -> dict[str, Any]:
    """Runs the ``qcompiler`` command and returns its result."""
    command = [sys.executable, "-m", "qcompiler", *map(str, arguments), "--json"]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    if not answer["ok"]:
        sys.exit(f"{' '.join(command)}\n{json.dumps(answer['error'], indent=2)}")
    result: dict[str, Any] = answer["result"]
    return result


if __name__ == "__main__":
    main()
