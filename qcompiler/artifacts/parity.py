"""Whether two forms of one model compute the same: what is written is loaded again and compared."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts.decisions import Decisions
from qcompiler.artifacts.streamed import run_together
from qcompiler.errors import VerificationError
from qcompiler.ir import Around
from qcompiler.protocol import Artifact

__all__ = ["check_parity"]


LOOSEST = 0.25
"""The largest tolerance that still means something: a quarter of the largest logit."""
_SPREAD = 1.5
"""Between the divergences of two samples of one model from its unrounded form, over a few dozen tokens."""


def check_parity(
    expected: Artifact,
    actual: Artifact,
    *,
    tolerance: float,
    unrounded: Artifact | None = None,
    noisy: Iterable[Artifact] = (),
    rows: int = 2,
    length: int = 32,
    steps: int | None = None,
    ids: Tensor | None = None,
    first: int | None = None,
    of_log_probabilities: bool = False,
) -> dict[str, Any]:
    """Compares logits on random tokens, or on given ones, in one piece and through the cache.

    Where activations are rounded, a difference in the last bit ahead of a rounding can put a value on the other side of
    a tie, a whole step away; the layers behind then round differently too. Such a model does not agree with itself
    computed in another order: only as closely as roundings that fall differently everywhere. Each of two such differs
    from the unrounded model by what rounding does, so they are allowed twice that.

    Experts are those that the reference chooses, in everything that torch runs (`qcompiler.artifacts.decisions`).

    Beside the largest difference, the mean difference per token is held to twice the largest such mean of the samples:
    one value in the tail widens the first bound, and hardly the second.

    Where both bounds are too loose to see a fault (four-bit activations, whose roundings one tie throws over), logits
    say little, and another thing is measured besides: the divergence from the unrounded model, which honest samples of
    the model share and a fault adds to. It may be half as much again as the largest of theirs.

    Args:
        expected: the reference.
        actual: what was written.
        tolerance: largest difference allowed, relative to the largest reference logit.
        unrounded: the reference without rounding of activations, where it rounds them: twice its relative difference to
            the reference is added to the tolerance, unless that makes it too loose and there are samples.
        noisy: samples of the reference with errors as large as those that ``actual`` may make: twice the largest
            difference is added to the tolerance.
        rows: sequences.
        length: tokens in each (fewer where the model takes fewer).
        steps: how many are appended to the cache one by one, behind the first of them; the rest at once.
        ids: int64 ``[rows, length]``, in the place of random tokens.
        first: how many of them the cache is given at once; by default half.
        of_log_probabilities: ``actual`` gives these in the place of logits: what is compared is logits less their mean
            over the vocabulary, which are the same of both.

    Returns:
        ``max_difference`` (relative), ``cached_difference`` (None without a cache), ``tolerance``, ``mean_difference``
        and ``mean_tolerance`` (of tokens, root mean square, relative), ``kl_divergence`` (from the reference, in nats
        per token), ``top1_agreement``, ``tokens``; ``unrounded_divergence`` and ``unrounded_divergence_allowed`` where
        they decided, else None.

    Raises:
        VerificationError: beyond a tolerance, or where both are too loose to see a fault and nothing else can be
            measured.
    """
    if ids is None:
        length = min(length, expected.max_positions or length, actual.max_positions or length)
        ids = torch.randint(expected.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    runs = [[ids]]
    if actual.has_cache and expected.has_cache:
        runs.append(_parts(ids, first, steps))
    decisions = Decisions()

    def run(artifact: Artifact, runs: list[list[Tensor]], around: Around) -> list[Tensor]:
        logits = run_together(artifact, runs, around)
        return [part - part.mean(-1, keepdim=True) if of_log_probabilities else part for part in logits]

    reference, *reference_parts = run(expected, runs, decisions.recording())
    largest, mean_size = reference.abs().max().item() or 1.0, _per_token(reference) or 1.0

    def differences(logits: Tensor, reference: Tensor = reference) -> tuple[float, float]:
        """The largest, and the mean of tokens."""
        if logits.shape != reference.shape:
            raise VerificationError(
                "what was written gives logits of another shape",
                where=actual.path,
                got=tuple(logits.shape),
                expected=tuple(reference.shape),
            )
        difference = logits - reference
        return difference.abs().max().item() / largest, _per_token(difference) / mean_size

    def forward(artifact: Artifact) -> Tensor:
        (logits,) = run(artifact, runs[:1], decisions.holding())
        return logits

    own, mean_own = 0.0, 0.0  # what the model's own rounding does
    is_sampled = False
    exact = None if unrounded is None else forward(unrounded)
    spread = 0.0 if exact is None else _kl_divergence(exact, reference)
    for sample in noisy:  # one in memory at a time
        is_sampled = True
        logits = forward(sample)
        most, mean = differences(logits)
        own, mean_own = max(own, 2 * most), max(mean_own, 2 * mean)
        spread = spread if exact is None else max(spread, _kl_divergence(exact, logits))
    if exact is not None:
        most, mean = differences(exact)
        # too loose: the samples alone, whose roundings fall otherwise too
        if mean_own + 2 * mean <= LOOSEST or not is_sampled:
            own, mean_own = own + 2 * most, mean_own + 2 * mean
    is_loose = not min(own, mean_own) <= LOOSEST  # a NaN is not
    if is_loose and not (exact is not None and 0 < spread < float("inf")):
        raise VerificationError(
            "this model cannot be verified: its own rounding moves its logits as far as a fault would",
            where=actual.path,
            got=f"relative differences of up to {own:.2g}, {mean_own:.2g} in the mean of tokens",
            expected=f"at most {LOOSEST}",
            remedy="use a wider dtype or more bits of activations, or lower with verify=False",
        )
    tolerance, mean_tolerance = tolerance + own, tolerance + mean_own
    logits, *parts = run(actual, runs, decisions.holding())
    difference, mean_difference = differences(logits)
    cached = None
    found_differences = [(difference, mean_difference)]
    if parts:
        cached, mean_cached = differences(torch.cat(parts, dim=1), torch.cat(reference_parts, dim=1))
        found_differences.append((cached, mean_cached))
    found = {
        "max_difference": difference,
        "cached_difference": cached,
        "tolerance": tolerance,
        "mean_difference": mean_difference,
        "mean_tolerance": mean_tolerance,
        "kl_divergence": _kl_divergence(reference, logits),
        "top1_agreement": (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "tokens": ids.numel(),
        "unrounded_divergence": None,
        "unrounded_divergence_allowed": None,
    }
    if is_loose:
        assert exact is not None
        forms = [logits] if cached is None else [logits, torch.cat(parts, dim=1)]
        divergence, allowed = max(_kl_divergence(exact, form) for form in forms), _SPREAD * spread
        found |= {"unrounded_divergence": divergence, "unrounded_divergence_allowed": allowed}
        if not divergence <= allowed:
            raise VerificationError(
                "what was written is further from the unrounded model than the native artifact is",
                where=actual.path,
                got=f"{divergence:.3g} nats per token",
                expected=f"at most {allowed:.3g}",
                remedy="this is a fault of the lowering; please report the model and the recipe",
            )
    if not all(most <= tolerance and mean <= mean_tolerance for most, mean in found_differences):  # a NaN is not
        raise VerificationError(
            "what was written does not compute what the native artifact computes",
            where=actual.path,
            got=f"relative differences of {_and(most for most, _ in found_differences)} in the logits, "
            f"{_and(mean for _, mean in found_differences)} in the mean of tokens",
            expected=f"at most {tolerance:.0e}, and {mean_tolerance:.0e} in the mean",
            remedy="this is a fault of the lowering; please report the model and the recipe",
        )
    return found


def _and(differences: Iterable[float]) -> str:
    return " and ".join(f"{value:.2e}" for value in differences)


def _parts(ids: Tensor, first: int | None, steps: int | None) -> list[Tensor]:
    """The first of the tokens, some of the others one by one, and what is left."""
    first = first or max(1, ids.shape[1] // 2)
    left = ids.shape[1] - first
    alone = left if steps is None else min(steps, left)
    sizes = [first, *[1] * alone, *([left - alone] if left > alone else [])]
    return list(ids.split(sizes, dim=1))


def _per_token(logits: Tensor) -> float:
    """The root mean square of each token's logits, in the mean of tokens."""
    return logits.double().square().mean(-1).sqrt().mean().item()


def _kl_divergence(reference: Tensor, logits: Tensor) -> float:
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())
