"""What compiling did to a model, measured on tokens that calibration did not see, one segment in memory at a time."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts import Scores
from qcompiler.ir import Graph, feed, run_by_segments, static_caches

__all__ = ["HeldOutCheck", "precision_note"]

_MOST_TOKENS = 512
_MOST_LOGITS = 2**24  # 64 MiB in float32
_LARGE_DIVERGENCE = 0.03
"""Nats per token from which on a reader sees a difference: about one most likely token in six is another one."""


@dataclass(frozen=True)
class HeldOutCheck:
    """The logits of a model before it is compiled, and those of the compiled one against them.

    The tokens are few: at most 512, or as many as have logits of 64 MiB. The divergence of two models on the same
    tokens varies little from text to text; their perplexities do, and are given to compare with each other only.

    Attributes:
        ids: int64 ``[1, tokens]``.
        logits: float32 ``[1, tokens, vocab]``, of the original.
    """

    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, graph: Graph, held_out: Tensor, device: torch.device) -> "HeldOutCheck | None":
        """Runs a graph as it stands on the first of some tokens ``[n, length]``; None for one that gives no logits."""
        index = graph.signature.index_of_output("logits")
        if index is None:
            return None
        most = min(_MOST_TOKENS, max(2, _MOST_LOGITS // int(graph.signature.outputs[index].shape[-1])))
        ids = held_out[:1, :most]
        return None if ids.shape[1] < 2 else cls(ids, _logits(graph, ids, device))

    def measure(self, graph: Graph, device: torch.device) -> dict[str, Any]:
        """What the compiled graph gives, as plain JSON values.

        Returns:
            ``tokens``, ``perplexity``, ``reference_perplexity``, ``kl_divergence`` (nats per token),
            ``top1_agreement``; and ``static_cache_kl_divergence``, that of the same graph with static scales in the
            place of those per token in its cache (`static_caches`), None where there are none.

        Raises:
            ArtifactError: if what was compiled gives logits that are not finite.
        """
        scores, static = self._scores(graph, device), static_caches(graph)
        return {
            "tokens": scores.tokens,
            "perplexity": scores.perplexity,
            "reference_perplexity": scores.reference_perplexity,
            "kl_divergence": scores.kl_divergence,
            "top1_agreement": scores.top1_agreement,
            "static_cache_kl_divergence": None if static is None else self._scores(static, device).kl_divergence,
        }

    def _scores(self, graph: Graph, device: torch.device) -> Scores:
        scores = Scores()
        scores.add(_logits(graph, self.ids, device)[:, :-1], self.logits[:, :-1], self.ids[:, 1:], where=None)
        return scores


def _logits(graph: Graph, ids: Tensor, device: torch.device) -> Tensor:
    index = graph.signature.index_of_output("logits")
    assert index is not None
    (logits,) = next(run_by_segments(graph, [[feed(graph, ids.to(device))]], device, [graph.outputs[index]]))
    found: Tensor = logits.float().cpu()
    return found


def precision_note(found: dict[str, Any], parameters: int) -> str | None:
    """What to tell the user about what was measured; None where there is nothing to say."""
    divergence = found["kl_divergence"]
    if divergence < _LARGE_DIVERGENCE:
        return None
    return (
        f"this model of {parameters / 1e6:,.1f} million parameters is small for the precision asked: on "
        f"{found['tokens']} held-out tokens it moved {divergence:.3f} nats per token from the original, perplexity "
        f"{found['reference_perplexity']:.2f} -> {found['perplexity']:.2f}, and the most likely token changed at "
        f"{1 - found['top1_agreement']:.0%} of the positions; more bits, smaller groups or a larger model lose less"
    )
