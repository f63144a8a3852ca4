"""Existing tools on the same tokens: ``python -m benchmarks.peers MODEL --calib FILE --text FILE --venv NAME=DIR``.

Each tool lives in a virtual environment of its own, given as ``--venv NAME=DIRECTORY`` (`benchmarks/README.md` says how
to make them); none is a dependency of this project. A driver from ``peer_drivers/`` runs under that environment's
interpreter, quantizes the model in float32, and hands back the weights that the quantized model effectively computes
with. All of them, and this project's own artifacts, are then scored by the one evaluator, `qcompiler.artifacts`:
windows of 512 tokens, every position but the first, in float32. Where another tool rounds activations too (``int8``,
``smoothquant``, ``fp8``), weights do not say all: its driver runs the quantized model beside the original on the same
windows and hands back the distance by the same definition (`peer_drivers/protocol.py`); a test holds the two together.

Common settings of the 4-bit methods: linear weights to symmetric groups of 128 along the input, damping 0.01. The 8-bit
ones round the weights and inputs of linear layers, with ranges fixed in calibration: ``int8`` to nearest and nothing
else; ``smoothquant``; ``fp8`` in E4M3. The language-model head is left out; otherwise each tool's defaults. This
project's recipes of the last two names choose codes as GPTQ does, which others' do not. The drivers name what a
method's suffix changes.

``--planted FACTOR`` measures everything a second time, on the same model with outlier channels (`benchmarks.plant`).

CPU seconds are of the quantization call alone, all threads and child processes, without imports and without reading the
model (this project reads weights as it goes, so its figure includes that). Threads that wait sleep (OMP_WAIT_POLICY):
spinning would count as work, many times over on a machine that does something else as well. ``peak MB`` is the largest
resident memory of the process, ``grew MB`` by how much the call raised it, both in 10^6 bytes. Ratios are to rounding
to nearest by the same tool on the same model: to ``rtn``, and of ``smoothquant`` to ``int8``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import environment, keep, models

OWN = "qcompiler"
METHODS: dict[str, tuple[str, ...]] = {
    OWN: ("rtn", "gptq", "awq", "awq-gptq", "int8", "smoothquant", "fp8"),
    "llm-compressor": ("rtn", "gptq", "gptq-mse", "awq"),
    "gptqmodel": ("rtn", "gptq", "gptq-static", "gptq-mse"),
    "modelopt": ("rtn", "gptq", "gptq-layerwise", "awq", "int8", "smoothquant", "fp8"),
}
UNCALIBRATED = "rtn"  # one seed says all
BASELINES = {"int8": "int8", "smoothquant": "int8", "fp8": None}  # what ratios are to; of all other methods, "rtn"

_DRIVERS = Path(__file__).parent / "peer_drivers"
_COSTS = {"cpu_seconds": 1, "wall_seconds": 1, "peak_rss_mb": 0, "grown_mb": 0}  # and the digits they are shown with


@dataclass(frozen=True)
class Job:
    """One quantization by one tool.

    Attributes:
        title, model: what the table calls the model, and its directory.
        tool, method: a key of `METHODS` and one of its values.
        seed: of the calibration tokens.
        python: the interpreter that has the tool.
    """

    title: str
    model: Path
    tool: str
    method: str
    seed: int
    python: Path


def main() -> None:
    """Runs the benchmark and prints a Markdown table for each model; a tool that fails is a row of it."""
    options = _options()
    tools = {OWN: Path(sys.executable)} if options.own else {}
    for item in options.venv:
        name, _, directory = item.partition("=")
        if name not in METHODS or name == OWN:
            raise SystemExit(
                f"--venv {item}: unknown tool {name!r}; expected one of {', '.join(METHODS)}, but not {OWN}"
            )
        tools[name] = Path(directory).absolute() / "bin" / "python"
        if not tools[name].exists():
            raise SystemExit(f"--venv {item}: there is no {tools[name]}")
    chosen = {tool: [m for m in METHODS[tool] if not options.methods or m in options.methods] for tool in tools}
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        tokens, windows = _write_tokens(options, Path(scratch)), _write_windows(options, Path(scratch))
        jobs = [
            Job(title, model, tool, method, seed, tools[tool])
            for title, model in models(options.model, options.planted, Path(scratch)).items()
            for tool, methods in chosen.items()
            for method in methods
            for seed in (options.seeds[:1] if method == UNCALIBRATED else options.seeds)
        ]
        results: list[dict[str, Any]] = []
        for job in jobs:
            results.append(_run(job, tokens[job.seed], windows, options))
            if options.json:  # after each run: hours of work survive an interruption
                keep(options.json, _document(results, options))
    table = render(results, options)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")
    if any("error" in result for result in results):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; may be repeated")
    parser.add_argument("--venv", action="append", default=[], metavar="TOOL=DIRECTORY", help="may be repeated")
    parser.add_argument("--methods", nargs="+", help="only these; by default all")
    parser.add_argument("--planted", type=float, metavar="FACTOR", help="also the model with outliers, e.g. 64")
    parser.add_argument("--no-own", dest="own", action="store_false", help="leave this project's own recipes out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=40_000, help="of each held-out text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for one quantization")
    parser.add_argument("--json", type=Path, help="write every run here, as they end")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    return parser.parse_args()


def _write_tokens(options: argparse.Namespace, scratch: Path) -> dict[int, Path]:
    """The calibration tokens of each seed as files, int64 ``[samples, length]``."""
    from safetensors.torch import save_file

    import qcompiler as qc

    files: dict[int, Path] = {}
    for seed in options.seeds:
        made = qc.Calibration.from_text(options.calib, samples=options.samples, length=options.length, seed=seed)
        files[seed] = scratch / f"tokens-{seed}.safetensors"
        save_file({"ids": made.bind(options.model).ids.contiguous()}, files[seed])
    return files


def _write_windows(options: argparse.Namespace, scratch: Path) -> Path:
    """The evaluation tokens of each text, int64 ``[windows, length]``, cut as `qcompiler.artifacts` would."""
    from safetensors.torch import save_file

    from qcompiler.artifacts import WINDOW, TokenStream, load_tokenizer, read_corpus, read_limits

    length = min(WINDOW, read_limits(options.model)[1] or WINDOW)
    tokenizer = load_tokenizer(options.model)
    windows = {}
    for text in options.text:
        whole = read_corpus(text).stream(tokenizer)
        stream = TokenStream(whole.ids[: options.max_tokens], whole.opening)
        windows[text.stem] = stream.windows(length).contiguous()
        if len(windows[text.stem]) == 0:
            raise SystemExit(f"--text {text}: {len(stream)} tokens are less than one window of {length}")
    save_file(windows, scratch / "windows.safetensors")
    return scratch / "windows.safetensors"


def _run(job: Job, tokens: Path, windows: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantizes in the tool's environment, then evaluates in this one what has not been evaluated there."""
    print(f"{time.strftime('%H:%M:%S')} {job.title}: {job.tool} {job.method} seed {job.seed}", file=sys.stderr)
    found: dict[str, Any] = {"model": job.title, "tool": job.tool, "method": job.method, "seed": job.seed}
    with tempfile.TemporaryDirectory(prefix="peers-run-") as directory:
        out = Path(directory)
        try:
            _quantize(job, tokens, windows, out, options)
            found |= json.loads((out / "result.json").read_text(encoding="utf-8"))
            if "texts" not in found:
                found["texts"] = _evaluate(out, job.model, windows)
        except PeerError as error:
            print(f"  failed: {error}", file=sys.stderr)
            found["error"] = str(error)
    return found


class PeerError(Exception):
    """A tool did not do what it was asked; the others go on."""


def _quantize(job: Job, tokens: Path, windows: Path, out: Path, options: argparse.Namespace) -> None:
    """Runs a driver, which leaves its result in the directory."""
    request = {
        "model": str(job.model.absolute()),
        "tokens": str(tokens),
        "windows": str(windows),
        "method": job.method,
        "threads": options.threads,
        "out": str(out),
    }
    (out / "request.json").write_text(json.dumps(request), encoding="utf-8")
    driver = _DRIVERS / f"drive_{job.tool.replace('-', '_')}.py"
    with (out / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            done = subprocess.run(
                [job.python, driver, out / "request.json"],
                cwd=out,  # tools leave logs behind
                env={**os.environ, **environment(options.threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=options.timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"not done after {options.timeout} s") from error
        if done.returncode != 0:
            log.seek(0)
            lines = [line.strip() for line in log.read().splitlines() if line.strip()]
            raise PeerError(f"exit {done.returncode}: {lines[-1][:300] if lines else 'no output'}")


def _evaluate(out: Path, model: Path, windows: Path) -> dict[str, dict[str, Any]]:
    from safetensors.torch import load_file

    import qcompiler as qc

    native = out / "native"
    artifact = qc.open_artifact(native if native.is_dir() else _float_model(out, model))
    original = qc.open_artifact(model)
    return {
        title: qc.evaluate(artifact, tokens=tokens, against=original).to_dict()
        for title, tokens in load_file(windows).items()
    }


def _float_model(out: Path, model: Path) -> Path:
    """A float32 Hugging Face directory with the effective weights a driver wrote."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = load_file(out / "weights.safetensors")
    quantized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    before = {name: parameter.detach().clone() for name, parameter in quantized.named_parameters()}
    unknown = quantized.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise PeerError(f"the driver gave weights that the model does not have: {unknown[:4]}")
    state = quantized.state_dict()
    torn = [name for name, tensor in weights.items() if not torch.equal(state[name], tensor)]
    if torn:
        raise PeerError(f"tied weights that the tool has made different cannot be evaluated here: {torn[:4]}")
    if all(torch.equal(before[name], parameter) for name, parameter in quantized.named_parameters()):
        raise PeerError("the driver gave back the original weights: nothing was quantized")
    quantized.save_pretrained(out / "float")
    return out / "float"


def _document(results: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    from qcompiler.reporting import machine

    return {
        "model": options.model.name,
        "calibration": {"file": options.calib.name, "samples": options.samples, "length": options.length},
        "planted": options.planted,
        "max_tokens": options.max_tokens,
        "threads": options.threads,
        "machine": machine(),
        "runs": results,
    }


def render(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The results as Markdown, a table for each model: means over seeds, and ratios as in `BASELINES`."""
    lines = [_caption(results, options)]
    for title in dict.fromkeys(result["model"] for result in results):
        lines += ["", f"`{title}`", "", *_table([result for result in results if result["model"] == title], options)]
    return "\n".join(lines) + "\n"


def _table(results: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    texts = [text.stem for text in options.text]
    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        runs = done.setdefault((result["tool"], result["method"]), [])
        if "error" not in result:
            runs.append(result)

    def divergence(tool: str, method: str | None, text: str) -> float:
        return _mean(run["texts"][text]["kl_divergence"] for run in done.get((tool, method or ""), []))

    lines = [
        f"| tool | method | seeds | {' | '.join(f'{text}: KL×1000 | ratio' for text in texts)}"
        " | CPU s | s | peak MB | grew MB |",
        "|---" * (7 + 2 * len(texts)) + "|",
    ]
    for (tool, method), runs in done.items():
        cells = [tool, method, str(len(runs))]
        for text in texts:
            found, baseline = (divergence(tool, name, text) for name in (method, BASELINES.get(method, "rtn")))
            cells += [f"{1000 * found:.3f}", f"{found / baseline:.3f}"]
        cells += [f"{_mean(run[cost] for run in runs):.{digits}f}" for cost, digits in _COSTS.items()]
        lines.append("| " + " | ".join("–" if cell == "nan" else cell for cell in cells) + " |")
    failed = [run for run in results if "error" in run]
    return lines + [f"\n{run['tool']} {run['method']} seed {run['seed']} failed: {run['error']}" for run in failed]


def _caption(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    from qcompiler.reporting import machine

    here = {key: value for key, value in machine().items() if key != "threads"}  # the drivers' count is in options
    where = ", ".join(f"{key} {value}" for key, value in here.items())
    versions = {name: v for run in results for name, v in run.get("versions", {}).items() if name not in here}
    tools = ", ".join(f"{name} {version}" for name, version in versions.items()) or "this one alone"
    return (
        f"Calibrated on {options.samples}×{options.length} tokens, mean over seeds; {options.max_tokens:,} tokens of "
        f"each text; threads: {options.threads}. {where}. Tools: {tools}."
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else float("nan")


if __name__ == "__main__":
    main()
