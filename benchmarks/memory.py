"""Does peak memory grow with depth? ``python -m benchmarks.memory`` compiles one architecture with 8 and with 32
layers.

Each run is a process of its own: capture, ``w4a16-gptq`` on tokens given, and ONNX. What counts is the peak resident
memory of compiling and of lowering, less what was resident after imports and capture.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--recipe", default="w4a16-gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as directory:
            build(Path(directory) / "model", layers, options.hidden)
            command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--one", directory]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            rows.append((layers, json.loads(output.splitlines()[-1])))
            print(rows[-1], file=sys.stderr)
    table = render(rows, options)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")


def build(directory: Path, layers: int, hidden: int) -> None:
    """Writes a random model of the Llama kind to disk, one tensor in memory at a time."""
    import torch
    import transformers

    from qcompiler.storage import WeightStore

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=4096,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    store = WeightStore()
    for seed, (name, shape) in enumerate(shapes.items()):

        def draw(seed: int = seed, shape: tuple[int, ...] = shape) -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(seed)
            return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)

        store.derive(name, (), draw, dtype="bfloat16", shape=shape)
    store.save(directory)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles and lowers one model; bytes above what was resident after capture."""
    import torch

    import qcompiler as qc

    graph = qc.capture(options.one / "model")
    before = resident()
    ids = torch.randint(4096, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    result = qc.compile(graph, options.recipe, qc.Calibration.from_tokens(ids))
    compiled = peak()
    result.save(options.one / "out" / "native")
    qc.lower(result, "onnx", options.one / "out" / "onnx", verify=False)
    return {
        "weights": result.report.bytes_before,
        "before": before,
        "compile": compiled - before,
        "with_lowering": peak() - before,
        "cpu_seconds": result.report.cpu_seconds["sweep"],
    }


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(rows: list[tuple[int, dict[str, Any]]], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    from qcompiler.reporting import machine

    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [
        f"{options.recipe}, hidden {options.hidden}, {options.samples}×{options.length} tokens. {where}.",
        "",
        "| layers | weights on disk MB | resident after capture MB | compile, above it MB "
        "| compile and lowering, above it MB | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for layers, row in rows:
        sizes = " | ".join(f"{row[key] / 1e6:.0f}" for key in ("weights", "before", "compile", "with_lowering"))
        lines.append(f"| {layers} | {sizes} | {row['cpu_seconds']:.0f} |")
    growth = rows[-1][1]["with_lowering"] / rows[0][1]["with_lowering"] - 1
    lines += ["", f"From {rows[0][0]} to {rows[-1][0]} layers the last column but one grows by {growth:+.1%}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
