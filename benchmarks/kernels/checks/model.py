"""The shipped model, quantized without calibration, as kernels on the device against its graph in float32 on the CPU.

What is compared is each next token's distribution: in one go, and token by token from a cache. The model is small and
its text made of random tokens; the rounding of activations to 16 bits is all that may set the two apart.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.records import Record, Verdict
from benchmarks.kernels.sections import Bench, Case

__all__ = ["LIMIT", "RECIPES", "cases"]

_MODEL = Path(__file__).resolve().parents[3] / "examples" / "booklm"
RECIPES = ("w4a16-rtn", "w8a8-dynamic", "fp8-dynamic", "w4a16-rtn+kv-int8", "w8a16", "w4a16-rtn+kv-fp8")
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Mean divergence, in nats per token, of the model on the device from the graph. On a CPU bfloat16 measured 1e-4 with
weights alone quantized, and up to 2e-3 where activations are, of which rounding moves some to the next code."""
_ROWS, _LENGTH, _STEPS = 2, 64, 4


def cases(bench: Bench) -> Iterator[Case]:
    """One per recipe."""
    for recipe in RECIPES[:1] if bench.quick else RECIPES:
        yield Case(f"model {recipe}", _case(recipe))


def _case(recipe: str) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        import qcompiler
        from qcompiler.artifacts import NativeArtifact
        from qcompiler.lowering.kernels.module.model import lower

        graph = qcompiler.capture(_MODEL)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4096, (_ROWS, _LENGTH), generator=generator)
        calibration = qcompiler.Calibration.from_tokens(ids) if "kv" in recipe else None
        result = qcompiler.compile(graph, recipe, calibration)
        expected = NativeArtifact(result.graph).forward(ids).log_softmax(-1)
        for dtype in (torch.bfloat16,) if bench.device.type == "cpu" else (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            model = lower(result.graph, device=bench.device, dtype=name)
            yield from _verdicts(bench, f"model {recipe} {name}", model, ids, expected, LIMIT[dtype])

    return run


def _verdicts(bench: Bench, name: str, model: Any, ids: Tensor, expected: Tensor, limit: float) -> Iterator[Verdict]:
    section = bench.section.name
    runs = [model.forward(ids).cpu() for _ in range(2)]
    yield _close(section, f"{name}: at once", runs[0], expected, limit)
    yield Verdict(section, f"{name}: again", torch.equal(*runs), "the same bits twice")
    logits, cache = model.prefill(ids[:, :-_STEPS])
    steps = [logits[:, -1:]]
    for place in range(_LENGTH - _STEPS, _LENGTH):
        logits, cache = model.step(ids[:, place : place + 1], cache)
        steps.append(logits)
    stepwise = torch.cat(steps, dim=1).cpu()
    yield _close(section, f"{name}: token by token", stepwise, expected[:, -_STEPS - 1 :], limit)
    if bench.device.type == "cuda":
        slow = [f"{site['site']} ({site['reason']})" for site in model.report["sites"] if _is_slow(site)]
        yield Verdict(section, f"{name}: kernels", not slow, "; ".join(slow[:3]) or "every quantized layer has one")


def _is_slow(site: dict[str, Any]) -> bool:
    return site["weight"] is not None and site["implementation"] == "reference"


def _close(section: str, name: str, logits: Tensor, expected: Tensor, limit: float) -> Verdict:
    found = logits.float().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    detail = f"{divergence:.1e} nats per token, allowed {limit:.0e}"
    return Verdict(section, name, abs(divergence) <= limit, detail, divergence / limit)
