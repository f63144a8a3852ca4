"""How far each recipe moves a model from the original, and what it costs.

``python -m benchmarks.quality MODEL --calib FILE --text FILE``. Every run is a process of its own, so that peak
memory is its own. CPU seconds are those of the sweeps in `qc.compile` over all threads, without import, capture and
tokenization. KL divergence is in thousandths of a nat per token; the ratio is to ``w4a16-rtn`` on the same model in the
same command. Recipes that are calibrated are run once for each seed. Bits per weight are those of the layers that are
quantized; what is left in float, such as embeddings, counts in the size. A quantized cache is measured by decoding with
it (``cached`` of `qc.evaluate`).

``--planted FACTOR`` measures every recipe a second time, on the same model with outlier channels
(`benchmarks.plant`), in a table of its own. The models compute the same function, so their rows may be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.runs import environment, keep, models, peak_mb

BASELINE = "w4a16-rtn"


def main() -> None:
    """Runs the benchmark and prints a Markdown table for each model; a recipe that fails is named below its table."""
    options = _options()
    if options.one:
        model, recipe, seed = options.one
        print(json.dumps(measure(options, Path(model), recipe, int(seed))))
        return
    seeds_of = {recipe: options.seeds if _is_calibrated(recipe) else options.seeds[:1] for recipe in options.recipes}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        for title, model in models(options.model, options.planted, Path(scratch)).items():
            for recipe, seeds in seeds_of.items():
                for seed in seeds:
                    print(f"{time.strftime('%H:%M:%S')} {title}: {recipe} seed {seed}", file=sys.stderr)
                    outcome = run_apart(model, recipe, seed, options.threads)
                    runs.append({"model": title, "recipe": recipe, "seed": seed, **outcome})
                    if options.json:  # after each run: hours of work survive an interruption
                        keep(options.json, _document(runs, options))
    table = render(runs, options)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")
    if any("error" in run for run in runs):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    from qcompiler.passes.recipes import CACHES, RECIPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; may be repeated")
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, *CACHES], help="by default every named one")
    parser.add_argument("--planted", type=float, metavar="FACTOR", help="also the model with outliers, e.g. 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibrated recipes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory-budget", type=int, help="bytes of calibration values in memory; more goes to disk")
    parser.add_argument("--max-tokens", type=int, default=40_000, help="of each text")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every run")
    parser.add_argument("--json", type=Path, help="write every run here, as they end")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "RECIPE", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _is_calibrated(name: str) -> bool:
    from qcompiler.passes.recipe_file import load_recipe
    from qcompiler.protocol import Pipeline

    return Pipeline(load_recipe(name)).is_calibrated


def run_apart(model: Path, recipe: str, seed: int, threads: int) -> dict[str, Any]:
    """One measurement in a process of its own; what went wrong, under ``error``, if it fails."""
    command = [sys.executable, "-m", "benchmarks.quality", *sys.argv[1:], "--one", str(model), recipe, str(seed)]
    done = subprocess.run(command, env={**os.environ, **environment(threads)}, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"exit {done.returncode}: {lines[-1][:300] if lines else 'no output'}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(options: argparse.Namespace, model: Path, recipe: str, seed: int) -> dict[str, Any]:
    """Compiles once, then evaluates on every text."""
    import qcompiler as qc
    from qcompiler.reporting import machine, quantized_bits_per_weight

    graph = qc.capture(model)
    calibration = qc.Calibration.from_text(options.calib, samples=options.samples, length=options.length, seed=seed)
    result = qc.compile(graph, recipe, calibration, seed=seed, memory_budget=options.memory_budget)
    report = result.report
    found: dict[str, Any] = {
        "machine": machine(),
        "cpu_seconds": report.cpu_seconds["sweep"],
        "seconds": report.seconds["sweep"],
        "peak_mb": peak_mb(),
        "mebibytes": report.bytes_after / 2**20,
        "bits_per_weight": quantized_bits_per_weight(result.graph),
        "cache_bytes_per_token": report.cache_bytes_per_token,
        "inputs_left_in_float": sum(skip.method == "insert-qdq" for skip in report.skipped),
        "texts": {},
    }
    artifact, original = result.artifact(), qc.open_artifact(model)
    for text in options.text:
        evaluation = qc.evaluate(artifact, text=text, against=original, max_tokens=options.max_tokens)
        found["texts"][text.stem] = evaluation.to_dict()
    return found


def _document(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model.name,
        "planted": options.planted,
        "calibration": {"file": options.calib.name, "samples": options.samples, "length": options.length},
        "max_tokens": options.max_tokens,
        "runs": runs,
    }


def render(runs: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as Markdown, a table for each model: means over seeds, and ratios to `BASELINE` on the same model."""
    machine: dict[str, Any] = next((run["machine"] for run in runs if "machine" in run), {})
    where = ", ".join(f"{key} {value}" for key, value in machine.items()) or "no run went well"
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        f"Calibrated on {options.samples}×{options.length} tokens, mean of seeds {seeds} where calibrated; "
        f"{options.max_tokens:,} tokens of each text. {where}."
    ]
    for title in dict.fromkeys(run["model"] for run in runs):
        lines += ["", f"`{title}`", "", *_table([run for run in runs if run["model"] == title], options)]
    return "\n".join(lines) + "\n"


def _table(runs: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    texts = [text.stem for text in options.text]
    lines = [
        "| recipe | seeds | bits/weight | MiB | cache bytes/token | "
        + " | ".join(f"{text}: perplexity | KL×1000 | ratio to RTN" for text in texts)
        + " | inputs left in float | CPU s | peak MB |",
        "|---" * (8 + 3 * len(texts)) + "|",
    ]
    done: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if "error" not in run:
            done.setdefault(run["recipe"], []).append(run)

    def mean(recipe: str, text: str, key: str) -> float:
        return statistics.fmean(run["texts"][text][key] for run in done[recipe])

    for recipe, of_recipe in done.items():
        first = of_recipe[0]
        cells = [recipe, str(len(of_recipe)), _or_dash(first["bits_per_weight"], ".2f"), f"{first['mebibytes']:.1f}"]
        cells.append(_or_dash(first["cache_bytes_per_token"], "d"))
        for text in texts:
            divergence = mean(recipe, text, "kl_divergence")
            cells += [f"{mean(recipe, text, 'perplexity'):.2f}", f"{1000 * divergence:.3f}"]
            cells.append(f"{divergence / mean(BASELINE, text, 'kl_divergence'):.3f}" if BASELINE in done else "–")
        cells.append(f"{statistics.fmean(run['inputs_left_in_float'] for run in of_recipe):.0f}")
        cells.append(f"{statistics.fmean(run['cpu_seconds'] for run in of_recipe):.1f}")
        cells.append(f"{statistics.fmean(run['peak_mb'] for run in of_recipe):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    failed = [run for run in runs if "error" in run]
    return lines + [f"\n{run['recipe']} seed {run['seed']} failed: {run['error']}" for run in failed]


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


if __name__ == "__main__":
    main()
