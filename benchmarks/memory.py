"""Does peak memory grow with depth? ``python -m benchmarks.memory`` runs the command line with 8 and with 32 layers.

Each row is what users run, a process of its own: ``qcompiler compile MODEL -r RECIPE --calib TEXT --to TARGET``, which
compares what it wrote; ``qcompiler convert OUT --to TARGET`` for ``convert:TARGET``; and ``qcompiler.lower(OUT,
"kernels")``, whose result is a module with all weights, for ``module``. What counts is the largest resident memory of
the process, imports included. Other shapes by option; that of Llama-2-7B: ``--hidden 4096 --intermediate 11008
--heads 32 --kv-heads 32 --vocabulary 32000 --untied``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "booklm"
NOTHING, MODULE, CONVERT = "none", "module", "convert:"


@dataclass(frozen=True)
class Row:
    """What a process took.

    Attributes:
        target: that was lowered to.
        layers: of the model.
        peak: bytes of resident memory.
        seconds: of the processor.
    """

    target: str
    layers: int
    peak: int
    seconds: float


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, help="by default 2.75 times as wide")
    parser.add_argument("--heads", type=int, help="by default of 64 channels")
    parser.add_argument("--kv-heads", type=int, help="by default half as many")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--recipe", default="w4a16-gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--targets", nargs="+", default=[NOTHING, "onnx", "checkpoint", "kernels:device=cpu", MODULE])
    parser.add_argument("--output", type=Path, help="write the table here too")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build, options)
        return
    baseline = run([sys.executable, "-c", "import qcompiler, transformers, torch"])[0]
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            own = [*sys.argv[1:], "--layers", str(layers), "--build", root / "model"]  # the last of a kind counts
            subprocess.run([sys.executable, "-m", "benchmarks.memory", *own], check=True)
            for target in options.targets:
                peak, seconds = run(command(root, target, options))
                rows.append(Row(target, layers, peak, seconds))
                print(rows[-1], file=sys.stderr, flush=True)
    table = render(rows, baseline, options)
    print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(table, encoding="utf-8")


def command(root: Path, target: str, options: argparse.Namespace) -> list[str | Path]:
    """What users run. A module, and what is converted, is made of what was compiled for the target that came first."""
    compiled = root / options.targets[0].partition(":")[0]
    if target == MODULE:
        lower = "import sys, qcompiler; qcompiler.lower(sys.argv[1], 'kernels', device='cpu')"
        return [sys.executable, "-c", lower, compiled]
    if target.startswith(CONVERT):
        made = ["--to", target.removeprefix(CONVERT), "-o", root / "converted"]
        return [sys.executable, "-m", "qcompiler", "convert", compiled, *made]
    out = root / target.partition(":")[0]
    arguments = ["-r", options.recipe, "--calib", root / "model" / "text.txt"]
    arguments += [] if target == NOTHING else ["--to", target]
    arguments += ["--samples", str(options.samples), "--length", str(options.length)]
    return [sys.executable, "-m", "qcompiler", "compile", root / "model", *arguments, "-o", out]


def run(arguments: list[str | Path]) -> tuple[int, float]:
    """Peak resident bytes and processor seconds of a process that must go well."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def build(directory: Path, options: argparse.Namespace) -> None:
    """Writes a random model of the Llama kind to disk, one tensor in memory at a time, a tokenizer, and a text."""
    import torch
    import transformers

    from qcompiler.storage import WeightStore

    heads = options.heads or options.hidden // 64
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate or options.hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=options.layers[0],
        num_attention_heads=heads,
        num_key_value_heads=options.kv_heads or heads // 2,
        vocab_size=options.vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=not options.untied,
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
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    (directory / "text.txt").write_text(" ".join(f"line {i} of the log, at sea" for i in range(20_000)))


def render(rows: list[Row], baseline: int, options: argparse.Namespace) -> str:
    """The results as Markdown: a line per target, a column per depth."""
    from qcompiler.reporting import machine

    depths = sorted({row.layers for row in rows})
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [
        f"{options.recipe}, hidden {options.hidden}, {options.samples}×{options.length} tokens. {where}. "
        f"Imports alone: {baseline / 1e6:.0f} MB.",
        "",
        "| target | " + " | ".join(f"{depth} layers, peak MB" for depth in depths) + " | growth | CPU s |",
        "|---|" + "---|" * (len(depths) + 2),
    ]
    for target in dict.fromkeys(row.target for row in rows):
        own = {row.layers: row for row in rows if row.target == target}
        peaks = [own[depth].peak for depth in depths]
        seconds = " / ".join(f"{own[depth].seconds:.0f}" for depth in depths)
        sizes = " | ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        lines.append(f"| {target} | {sizes} | {peaks[-1] / peaks[0] - 1:+.1%} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
