"""How a result is held against a reference: on poisoned memory, more than once, within what its dtype can hold."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.kernels.records import Verdict

__all__ = ["TOLERANCE", "compare", "compare_codes", "poisoned", "repeated"]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Largest error over the largest magnitude of the reference: rounding of the result to its dtype (2^-12 and 2^-9 of
that), of operands that a kernel holds in it, and of sums in another order."""
_RUNS = 3


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, or the largest integer: what is not written, or is read before, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that are not deterministic, which is not asked here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def repeated(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], bool]:
    """What a function gives on poisoned memory, and whether it gives the same bits every time."""
    with poisoned():
        results = [tuple(t.clone() for t in run()) for _ in range(_RUNS)]
    first = results[0]
    return first, all(_same_bits(a, b) for other in results[1:] for a, b in zip(first, other, strict=True))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def compare(section: str, name: str, run: Callable[[], Tensor], expected: Tensor) -> Verdict:
    """Holds a floating point result against a reference in float32."""
    (found,), is_same = repeated(lambda: (run(),))
    if found.shape != expected.shape:
        return Verdict(section, name, False, f"shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not found.numel():
        return Verdict(section, name, is_same, "empty")
    limit = TOLERANCE[found.dtype]
    error = float((found.float() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    passed = error <= limit and is_same  # a NaN is not <= anything
    detail = f"error {error:.1e}, allowed {limit:.0e}" + ("" if is_same else "; runs differ")
    return Verdict(section, name, passed, detail, error / limit)


def compare_codes(
    section: str, name: str, run: Callable[[], tuple[Tensor, ...]], codes: Tensor, others: tuple[Tensor, ...]
) -> Verdict:
    """Holds codes, and scales (float) or zero points beside them, against a reference.

    A sum in another order may move a value over the border between two codes: up to one in a thousand may be the
    neighbour of the reference's. Scales may differ by their own rounding.
    """
    (found, *rest), is_same = repeated(run)
    if found.shape != codes.shape or found.dtype != codes.dtype:
        return Verdict(section, name, False, f"codes {found.dtype} {tuple(found.shape)}, not {tuple(codes.shape)}")
    steps = (_ordered(found) - _ordered(codes)).abs()
    moved = float((steps != 0).float().mean()) if steps.numel() else 0.0
    furthest = int(steps.max()) if steps.numel() else 0
    passed = is_same and furthest <= 1 and moved <= 1e-3
    worst = 0.0
    for mine, wanted in zip(rest, others, strict=True):
        if mine.shape != wanted.shape:
            return Verdict(section, name, False, f"scales {tuple(mine.shape)}, not {tuple(wanted.shape)}")
        if mine.numel():
            error = float(((mine.float() - wanted.float()).abs() / wanted.float().abs().clamp_min(1e-30)).max())
            passed &= error <= (1e-6 if mine.dtype == torch.float32 else 1e-3)
            worst = max(worst, error) if error == error else error
    detail = f"{moved:.2%} of codes moved, by {furthest} at most; scales off by {worst:.0e}"
    return Verdict(section, name, passed, detail + ("" if is_same else "; runs differ"), moved)


def _ordered(codes: Tensor) -> Tensor:
    """Codes as integers in the order of what they stand for; neighbours differ by one."""
    if not codes.dtype.is_floating_point:
        return codes.long()
    raw = codes.view(torch.int8).long()
    return torch.where(raw < 0, -128 - raw, raw)
