"""Whether two forms of one model compute the same: what is written is loaded again and compared."""

from typing import Any

import torch
from torch import Tensor

from qcompiler.artifact import Artifact
from qcompiler.errors import VerificationError

__all__ = ["check_parity"]


def check_parity(
    expected: Artifact,
    actual: Artifact,
    *,
    tolerance: float,
    unrounded: Artifact | None = None,
    noisy: Artifact | None = None,
    rows: int = 2,
    length: int = 32,
) -> dict[str, Any]:
    """Compares logits on random tokens, in one piece and through the cache.

    Where activations are rounded, a difference in the last bit ahead of a rounding can put a value on the other side of
    a tie, a whole step away; the layers behind then round differently too. Such a model does not agree with itself
    computed in another order: only as closely as roundings that fall differently everywhere. Each of two such differs
    from the unrounded model by what rounding does, so they are allowed twice that.

    Args:
        expected: the reference.
        actual: what was written.
        tolerance: largest difference allowed, relative to the largest reference logit.
        unrounded: the reference without rounding of activations, where it rounds them: twice its relative difference to
            the reference is added to the tolerance.
        rows: sequences.
        length: tokens in each (fewer where the model takes fewer).

    Returns:
        ``max_difference`` (relative), ``cached_difference`` (None without a cache), ``tolerance``, ``kl_divergence``
        (from the reference, in nats per token), ``top1_agreement``, ``tokens``.

    Raises:
        VerificationError: beyond the tolerance.
    """
    length = min(length, expected.max_positions or length, actual.max_positions or length)
    ids = torch.randint(expected.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    reference = expected.forward(ids)
    largest = reference.abs().max().item() or 1.0

    def difference_of(logits: Tensor) -> float:
        if logits.shape != reference.shape:
            raise VerificationError(
                "what was written gives logits of another shape",
                where=actual.path,
                got=tuple(logits.shape),
                expected=tuple(reference.shape),
            )
        return (logits - reference).abs().max().item() / largest

    for other in (unrounded, noisy):
        if other is not None:
            tolerance += 2 * difference_of(other.forward(ids))
    logits = actual.forward(ids)
    difference = difference_of(logits)
    cached = None
    if actual.has_cache and expected.has_cache:
        half = max(1, length // 2)
        first, cache = actual.prefill(ids[:, :half])
        pieces = [first]
        for position in range(half, length):
            step, cache = actual.step(ids[:, position : position + 1], cache)
            pieces.append(step)
        cached = difference_of(torch.cat(pieces, dim=1))
    found = {
        "max_difference": difference,
        "cached_difference": cached,
        "tolerance": tolerance,
        "kl_divergence": _kl_divergence(reference, logits),
        "top1_agreement": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "tokens": rows * length,
    }
    differences = [difference] if cached is None else [difference, cached]
    if not all(value <= tolerance for value in differences):  # a NaN is not
        raise VerificationError(
            "what was written does not compute what the native artifact computes",
            where=actual.path,
            got=f"relative differences of {' and '.join(f'{value:.2e}' for value in differences)} in the logits",
            expected=f"at most {tolerance:.0e}",
            remedy="this is a fault of the lowering; please report the model and the recipe",
        )
    return found


def _kl_divergence(reference: Tensor, logits: Tensor) -> float:
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
