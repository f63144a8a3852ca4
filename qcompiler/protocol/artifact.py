"""What every runnable form of a model offers, whatever runs it: all that evaluation and generation know of it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from qcompiler.ir import Around

__all__ = ["Artifact", "RunsInputs", "RunsTogether"]


@runtime_checkable
class Artifact(Protocol):
    """A causal language model that can be run: the original, the native artifact, an ONNX folder.

    A cache is opaque: it goes from `prefill` to `step` and from each `step` to the next, and may be changed in place,
    so an earlier one must not be used again.
    """

    @property
    def vocab_size(self) -> int:
        """Length of the last axis of the logits; token ids are below it."""

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model takes, in tokens; None where nothing limits it."""

    @property
    def has_cache(self) -> bool:
        """Whether `prefill` and `step` work."""

    @property
    def path(self) -> Path | None:
        """The directory with the tokenizer's files, if there is one."""

    @property
    def provenance(self) -> Mapping[str, object]:
        """Where it comes from: source, recipe, versions."""

    def forward(self, ids: Tensor) -> Tensor:
        """float32 logits ``[batch, length, vocab]`` of int64 ``[batch, length]``, without a cache."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """float32 logits ``[batch, length, vocab]`` of int64 ``[batch, length]``, and the cache that holds them."""

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Appends int64 ``[batch, new]`` to the cache: float32 logits ``[batch, new, vocab]``, and the longer cache."""

    def stored_bytes(self) -> int:
        """Bytes of all weight tensors as stored."""

    def bits_per_weight(self) -> float:
        """Stored bits of all weight tensors, divided by the number of parameters of the original model."""


class RunsInputs(Protocol):
    """A model without token ids, run by somebody's code."""

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """All outputs, in order, of one tensor for each input, in order; floats are float32."""


@runtime_checkable
class RunsTogether(Protocol):
    """An artifact with a part of its weights in memory at a time, which is given much to run while it is there."""

    def run_together(self, runs: Sequence[Sequence[Tensor]], around: Around = ...) -> Iterator[Tensor]:
        """Logits of parts of texts.

        Args:
            runs: of each text the parts, int64 ``[batch, length]``, which follow one another in the cache.
            around: entered with the number of a part, counted through all runs, whenever something of it is computed.

        Yields:
            float32 ``[batch, length, vocab]`` of one part after another.
        """
