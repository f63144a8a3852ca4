"""Models run with one segment of their weights in memory at a time, and parts of texts run by whatever a model is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, fx

from qcompiler.artifacts.native import NativeArtifact
from qcompiler.ir import Around, feed_run, run_by_segments
from qcompiler.protocol import Artifact, RunsTogether

__all__ = ["StreamedArtifact", "run_together"]


def run_together(
    artifact: Artifact, runs: Sequence[Sequence[Tensor]], around: Around = lambda _: nullcontext()
) -> Iterator[Tensor]:
    """Logits of parts of texts, one after another: as an artifact runs many together, or else one by one.

    Args:
        artifact: of several parts in one run, it has a cache.
        runs: of each the parts, int64 ``[batch, length]``, which follow one another in the cache.
        around: entered with the number of a part, counted through all runs, whenever something of it is computed.

    Yields:
        float32 ``[batch, length, vocab]``.
    """
    if isinstance(artifact, RunsTogether):
        yield from artifact.run_together(runs, around)
        return
    number = 0
    for first, *others in runs:
        cache: object = None
        with around(number):
            if others:
                logits, cache = artifact.prefill(first)
            else:
                logits = artifact.forward(first)
        yield logits
        number += 1
        for part in others:
            with around(number):
                logits, cache = artifact.step(part, cache)
            yield logits
            number += 1


class StreamedArtifact(NativeArtifact):
    """As `NativeArtifact`, to the bit, with the weights of one segment in memory at a time.

    Whatever is asked for reads all weights once; `run_together` for many texts. So it is not for generation, which asks
    for one token after another.
    """

    def run_together(
        self, runs: Sequence[Sequence[Tensor]], around: Around = lambda _: nullcontext()
    ) -> Iterator[Tensor]:
        """See `qcompiler.protocol.RunsTogether`; the caches of one segment are in memory at a time."""
        batches = [feed_run(self._graph, [ids.to(self._device) for ids in parts]) for parts in runs]
        for (logits,) in self._by_segments(batches, [self._logits], around):
            yield logits.float()

    def _values(self, batch: Mapping[fx.Node, Any], wanted: list[fx.Node]) -> list[Tensor]:
        return next(self._by_segments([[batch]], wanted))

    def _by_segments(
        self,
        runs: Sequence[Sequence[Mapping[fx.Node, Any]]],
        wanted: list[fx.Node],
        around: Around = lambda _: nullcontext(),
    ) -> Iterator[list[Any]]:
        return run_by_segments(
            self._graph, runs, self._device, wanted, passed_through=self._passed_through, around=around
        )
