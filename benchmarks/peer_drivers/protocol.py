"""What every driver does alike: read its request, measure the quantization call, write what came out of it.

That is the effective weights or, where activations are rounded too and weights do not say all, the distance from the
original that `evaluate` finds here. Drivers run under the interpreter of another tool's virtual environment, so this
file needs only torch, safetensors, transformers and what comes with Python; nothing of qcompiler.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Request", "evaluate", "load_model", "measured", "read_request", "versions", "write_result"]


@dataclass(frozen=True)
class Request:
    """One quantization.

    Attributes:
        model: a Hugging Face directory.
        tokens: calibration tokens, int64 ``[samples, length]``.
        windows: title → evaluation tokens, int64 ``[windows, length]``.
        method: which of the tool's methods.
        threads: of torch.
        out: an existing directory for the result.
    """

    model: str
    tokens: Tensor
    windows: dict[str, Tensor]
    method: str
    threads: int
    out: Path


def read_request() -> Request:
    """The request whose file is the only argument; also sets the number of threads."""
    fields = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(fields["threads"])
    tokens, windows = load_file(fields["tokens"])["ids"], load_file(fields["windows"])
    return Request(fields["model"], tokens, windows, fields["method"], fields["threads"], Path(fields["out"]))


def load_model(request: Request) -> nn.Module:
    """The model by transformers in float32, in which every tool computes on a CPU without loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32, local_files_only=True)
    return model.eval()


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Runs the quantization call alone: what it returns, and its CPU and wall seconds and memory.

    CPU seconds are user and system time of all threads and of child processes that have ended. Memory is resident, in
    MB (10^6 bytes): ``peak_rss_mb`` of the whole process up to now, imports and model included, and ``grown_mb``, by
    how much the call raised it above what was resident before.
    """
    before, loaded = _status_mb("VmRSS"), _status_mb("VmHWM")
    _forget_peak()
    cpu, wall = _cpu_seconds(), time.perf_counter()
    result = call()
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - wall
    peak = _status_mb("VmHWM")
    memory = {"peak_rss_mb": max(peak, loaded), "grown_mb": peak - before}
    return result, {"cpu_seconds": cpu, "wall_seconds": wall, **memory}


def evaluate(model: nn.Module, request: Request) -> dict[str, dict[str, float]]:
    """Scores the quantized model as `qcompiler.artifacts.evaluation` does, beside the original in this process.

    Every position of a window but the first is scored, from float32 log-softmax; the KL divergence is the mean of
    KL(original ‖ quantized) in nats per token.

    Returns:
        Title of the text → fields of the same names and meanings as those of `qcompiler.artifacts.evaluation`.
    """
    original = load_model(request)
    return {title: _score(model, original, windows) for title, windows in request.windows.items()}


def _score(model: nn.Module, original: nn.Module, windows: Tensor) -> dict[str, float]:
    loss = reference_loss = divergence = 0.0
    agreements = count = 0
    with torch.no_grad():
        for batch in windows.split(4):
            targets = batch[:, 1:, None]
            log_p, log_q = (
                m(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1) for m in (original, model)
            )
            loss -= float(log_q.gather(-1, targets).double().sum())
            reference_loss -= float(log_p.gather(-1, targets).double().sum())
            agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            divergence += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
            count += targets.numel()
    return {
        "perplexity": math.exp(loss / count),
        "reference_perplexity": math.exp(reference_loss / count),
        "kl_divergence": max(0.0, divergence / count),
        "top1_agreement": agreements / count,
        "tokens": count,
    }


def write_result(
    request: Request, numbers: Mapping[str, float], weights: Mapping[str, Tensor], *, notes: str = "", **more: Any
) -> None:
    """Writes ``weights.safetensors`` and ``result.json``.

    Args:
        request: what was asked.
        numbers: of `measured`.
        weights: the effective weights in float, under the names of the original model: every parameter that differs.
            None are needed where ``texts``, what `evaluate` found, is given.
        notes: what a reader of the table should know.
        more: other plain fields.
    """
    save_file({n: t.detach().float().contiguous() for n, t in weights.items()}, request.out / "weights.safetensors")
    text = json.dumps({**numbers, "notes": notes, **more}, indent=2)
    (request.out / "result.json").write_text(text, encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {name: metadata.version(name) for name in packages}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _status_mb(field: str) -> float:
    """A field of /proc/self/status. Not ru_maxrss: that one starts from the peak of the parent process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def _forget_peak() -> None:
    """Lets VmHWM start again from here, where the kernel allows it; else it includes the imports."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
