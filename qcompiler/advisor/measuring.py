"""This machine, measured: what its memory gives, and what it multiplies, in about a second."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from qcompiler.advisor.hardware import Hardware

__all__ = ["measure_machine"]

_COPIED = 128 << 20  # bytes, more than caches hold
_SIDES = (256, 512, 1024, 2048, 4096)  # of square matrices, the next as long as a product is short
_LONG = 0.05  # seconds
_BEST_OF = 3


def measure_machine(*, copied: int = _COPIED, sides: Sequence[int] = _SIDES) -> Hardware:
    """Copies and multiplies on the GPU where there is one, else on the CPU; the best of three counts.

    The bandwidth is bytes read and written per second of a copy, the rates are those of products of square matrices.
    Of a CPU, rates are those of as many threads as PyTorch has.

    Args:
        copied: bytes.
        sides: of the matrices.
    """
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _shortest(partial(target.copy_, source), device)
    rates = {}
    for name in ("float16", "bfloat16") if is_cuda else ("float32", "bfloat16"):
        rates[name] = _rate(getattr(torch, name), sides, device)
    types = set(rates)
    if is_cuda:
        properties = torch.cuda.get_device_properties(device)
        capability, memory, name = properties.major * 10 + properties.minor, properties.total_memory, properties.name
        types |= {"int8"} | ({"float8"} if capability >= 89 else set()) | ({"float4"} if capability >= 100 else set())
    else:
        capability, name = None, platform.processor() or platform.machine() or "CPU"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        types.add("int8")
    return Hardware(
        key="this",
        name=f"this machine ({name})",
        kind="workstation" if is_cuda else "cpu",
        memory=float(memory),
        bandwidth=2 * copied / seconds,
        types=frozenset(types),
        rates=rates,
        source=f"measured: a copy of {copied >> 20} MiB, square products, {torch.get_num_threads()} threads",
        vendor="nvidia" if is_cuda and torch.version.cuda else "amd" if is_cuda else "",
        capability=capability,
    )


def _rate(dtype: torch.dtype, sides: Sequence[int], device: torch.device) -> float:
    """Operations per second of the largest product that is not long."""
    rate = 0.0
    for side in sides:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        seconds = _shortest(partial(torch.matmul, matrix, matrix), device)
        rate = 2 * side**3 / seconds
        if seconds > _LONG:
            break
    return rate


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of three runs, behind one that warms up."""
    found = []
    for _ in range(_BEST_OF + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found[1:]), 1e-9)
