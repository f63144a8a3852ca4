"""Whether two forms of one model compute the same: what is written is loaded again and compared."""

from typing import Any

import torch

from qcompiler.artifact import Artifact
from qcompiler.errors import VerificationError

__all__ = ["check_parity"]


def check_parity(
    expected: Artifact, actual: Artifact, *, tolerance: float, rows: int = 2, length: int = 32
) -> dict[str, Any]:
    """Compares logits on random tokens, in one piece and through the cache.

    Args:
        expected: the reference.
        actual: what was written.
        tolerance: largest difference allowed, relative to the largest reference logit.
        rows: sequences.
        length: tokens in each (fewer where the model takes fewer).

    Returns:
        ``max_difference`` (relative), ``cached_difference`` (None without a cache), ``top1_agreement``, ``tokens``.

    Raises:
        VerificationError: beyond the tolerance.
    """
    length = min(length, expected.max_positions or length)
    ids = torch.randint(expected.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    reference = expected.forward(ids)
    largest = reference.abs().max().item() or 1.0
    logits = actual.forward(ids)
    difference = (logits - reference).abs().max().item() / largest
    cached = None
    if actual.has_cache and expected.has_cache:
        half = max(1, length // 2)
        first, cache = actual.prefill(ids[:, :half])
        pieces = [first]
        for position in range(half, length):
            step, cache = actual.step(ids[:, position : position + 1], cache)
            pieces.append(step)
        cached = (torch.cat(pieces, dim=1) - reference).abs().max().item() / largest
    found = {
        "max_difference": difference,
        "cached_difference": cached,
        "top1_agreement": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "tokens": rows * length,
    }
    worst = max(difference, cached or 0.0)
    if not worst <= tolerance:
        raise VerificationError(
            "what was written does not compute what the native artifact computes",
            where=actual.path,
            got=f"a relative difference of {worst:.2e} in the logits",
            expected=f"at most {tolerance:.0e}",
            remedy="this is a fault of the lowering; please report the model and the recipe",
        )
    return found
