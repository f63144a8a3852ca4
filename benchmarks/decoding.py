"""How fast does each form of a compiled model decode on this CPU? One sequence, one token at a time, greedily.

``python -m benchmarks.decoding MODEL OUT``: MODEL is the original, OUT what was compiled of it with ``--to onnx``. All
forms run in one process with the same number of threads, in turns; what counts is the median of the turns, because
other work may run on the machine, and with it the spread.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import qcompiler as qc
from qcompiler.lowering.kernels.module.model import KernelModel
from qcompiler.protocol import Artifact
from qcompiler.reporting import machine

__all__ = ["main", "table", "tokens_per_second"]


def tokens_per_second(artifact: Artifact, prompt: torch.Tensor, steps: int) -> float:
    """Of ``steps`` single tokens behind a prompt ``[1, n]``, which is not counted, nor are the first two."""
    logits, cache = artifact.prefill(prompt)
    start = 0.0
    for step in range(-2, steps):
        if step == 0:
            start = time.perf_counter()
        logits, cache = artifact.step(logits[:, -1:].argmax(-1), cache)
    return steps / (time.perf_counter() - start)


def table(found: Mapping[str, list[float]]) -> str:
    """Markdown: tokens per second by form, and ratios to the first."""
    lines = ["| form | tokens/s, median | smallest to largest | to the original |", "|---|---|---|---|"]
    base = statistics.median(next(iter(found.values())))
    for form, rates in found.items():
        median = statistics.median(rates)
        lines.append(f"| {form} | {median:.0f} | {min(rates):.0f} to {max(rates):.0f} | {median / base:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="an output directory with native and onnx")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = qc.load(options.out)
    forms: dict[str, Artifact] = {
        "original, float32": qc.open_artifact(options.model, exact=False),
        "native, reference": qc.open_artifact(options.out, exact=False),
        "kernels, as for CUDA": KernelModel(result.graph, torch.device("cpu"), torch.bfloat16),
        "kernels (CPU)": qc.open_artifact(options.out, engine="kernels", device="cpu"),
        "onnx": qc.open_artifact(options.out / "onnx"),
    }
    prompt = torch.randint(next(iter(forms.values())).vocab_size, (1, options.prompt))
    found: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(options.turns):
        for form, artifact in forms.items():
            found[form].append(tokens_per_second(artifact, prompt, options.tokens))
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    text = (
        f"{table(found)}\nPrompt of {options.prompt} tokens, {options.turns} turns of {options.tokens}. {described}.\n"
    )
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
