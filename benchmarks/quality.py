"""How far each recipe moves a model from the original, and what it costs.

``python -m benchmarks.quality MODEL --calib FILE --text FILE``. Every run is a process of its own, so that peak
memory is its own. CPU seconds are those of `qc.compile` over all threads, without import, capture and tokenization.
KL divergence is in thousandths of a nat per token; the ratio is to ``w4a16-rtn`` of the same command.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BASELINE = "w4a16-rtn"


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--recipes", nargs="+", default=["w8a16", BASELINE, "w4a16-gptq", "w3a16-gptq"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory-budget", type=int, help="bytes of calibration values in memory; more goes to disk")
    parser.add_argument("--max-tokens", type=int, default=40_000, help="of each text")
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options, options.one[0], int(options.one[1]))))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for recipe in options.recipes:
        seeds = options.seeds if recipe.endswith("gptq") else options.seeds[:1]
        results[recipe] = [run_apart(recipe, seed) for seed in seeds]
    table = render(results, options)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")


def run_apart(recipe: str, seed: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    print(f"{time.strftime('%H:%M:%S')} {recipe} seed {seed}", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--one", recipe, str(seed)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(options: argparse.Namespace, recipe: str, seed: int) -> dict[str, Any]:
    """Compiles once, then evaluates on every text."""
    import qcompiler as qc
    from qcompiler.report import machine

    graph = qc.capture(options.model)
    calibration = qc.Calibration.from_text(options.calib, samples=options.samples, length=options.length, seed=seed)
    result = qc.compile(graph, recipe, calibration, seed=seed, memory_budget=options.memory_budget)
    report = result.report
    found: dict[str, Any] = {
        "machine": machine(),
        "cpu_seconds": report.cpu_seconds["sweep"],
        "seconds": report.seconds["sweep"],
        "peak_mb": report.peak_rss_bytes / 1e6,
        "bits_per_weight": report.bits_per_weight,
        "texts": {},
    }
    artifact, original = result.artifact(), qc.open_artifact(options.model)
    for text in options.text:
        evaluation = qc.evaluate(artifact, text=text, against=original, max_tokens=options.max_tokens)
        found["texts"][text.stem] = evaluation.to_dict()
    return found


def render(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    texts = [text.stem for text in options.text]
    first = next(iter(results.values()))[0]
    where = ", ".join(f"{key} {value}" for key, value in first["machine"].items())
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        f"`{options.model.name}`, calibrated on {options.samples}×{options.length} tokens, mean of seeds {seeds}; "
        f"{options.max_tokens:,} tokens of each text. {where}.",
        "",
        "| recipe | bits/weight | "
        + " | ".join(f"{t}: perplexity | KL×1000 | ratio to RTN" for t in texts)
        + " | CPU s | peak MB |",
        "|---" * (5 + 3 * len(texts)) + "|",
    ]

    def mean(runs: list[dict[str, Any]], text: str, key: str) -> float:
        return statistics.fmean(run["texts"][text][key] for run in runs)

    for recipe, runs in results.items():
        cells = []
        for text in texts:
            divergence = mean(runs, text, "kl_divergence")
            ratio = divergence / mean(results[BASELINE], text, "kl_divergence") if BASELINE in results else float("nan")
            cells.append(f"{mean(runs, text, 'perplexity'):.2f} | {1000 * divergence:.3f} | {ratio:.3f}")
        costs = [statistics.fmean(run[key] for run in runs) for key in ("cpu_seconds", "peak_mb")]
        lines.append(
            f"| {recipe} | {runs[0]['bits_per_weight']:.2f} | {' | '.join(cells)} | {costs[0]:.1f} | {costs[1]:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
