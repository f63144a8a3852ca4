"""What an engine made of a checkpoint, held against the native artifact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts import (
    CompileResult,
    StreamedArtifact,
    check_parity,
    with_block_noise,
    with_noise,
)
from qcompiler.ir import Graph
from qcompiler.lowering.checkpoint.readers.engines import Engine, read

__all__ = ["compare"]

_SAMPLES = 3


def compare(
    result: CompileResult,
    directory: Path,
    engine: Engine,
    *,
    prompts: Tensor | None = None,
    new_tokens: int = 64,
    python: Path | None = None,
    timeout: float = 3600,
) -> dict[str, Any]:
    """Compares what an engine computes from a checkpoint with the native artifact.

    The tokens are prompts, and what the native artifact continues them with, greedily. The engine is given all of them
    at once, and besides the prompts at once and the others one by one, through its cache.

    Differences are those of logits less their mean, relative to the largest. They may be as large as the engine's
    arithmetic makes them in the graph itself: the errors of its dtype behind every value, or of 8-bit inputs of
    products where it rounds those, sampled and doubled (`check_parity`).

    Args:
        result: the compiled model that the checkpoint was written of.
        directory: the checkpoint.
        engine: who reads it.
        prompts: int64 ``[rows, length]``; by default two rows of up to 64 random tokens.
        new_tokens: to continue them with.
        python: the interpreter of an environment that has the engine; by default this one.
        timeout: seconds that the engine may take.

    Returns:
        What `check_parity` does, ``reader``, ``version`` and ``dtype`` of the engine, and ``greedy_tokens``: how many
        greedy tokens agree before the first that does not, in the row where they are fewest.

    Raises:
        VerificationError: beyond the tolerance, or where the engine does not load the checkpoint.
        QCompilerError: as `read`.
    """
    native = result.artifact()
    if prompts is None:
        length = min(64, max(1, ((native.max_positions or 128) - 1) // 2))
        prompts = torch.randint(native.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    new_tokens = min(new_tokens, (native.max_positions or prompts.shape[1] + new_tokens + 1) - prompts.shape[1] - 1)
    ids, first = continued(native, prompts, new_tokens), prompts.shape[1]
    reading = read(engine, directory, ids, first, native.vocab_size, python=python, timeout=timeout)
    agree = reading.decoded[:, :-1].argmax(-1) == ids[:, first:]
    rounds = any(scheme.activation is not None for scheme in result.graph.schemes.values())
    unrounded = StreamedArtifact(result.graph, round_activations=False) if rounds else None
    found = check_parity(
        native,
        reading,
        ids=ids,
        first=first,
        of_log_probabilities=True,
        tolerance=1e-3,
        unrounded=unrounded,
        noisy=_samples(result.graph, reading.dtype, engine.input_block),
    )
    entry = {"reader": engine.name, "version": reading.version, "dtype": str(reading.dtype).removeprefix("torch.")}
    return {**entry, **found, "greedy_tokens": int(agree.int().cumprod(-1).sum(-1).min())}


def continued(artifact: Any, prompts: Tensor, count: int) -> Tensor:
    """int64 ``[rows, length + count]``: prompts, and the most likely tokens one after the other."""
    logits, cache = artifact.prefill(prompts)
    found = [prompts, logits[:, -1:].argmax(-1)]
    while len(found) <= count:
        logits, cache = artifact.step(found[-1], cache)
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found[: count + 1], dim=1)


def _samples(graph: Graph, dtype: torch.dtype, input_block: int | None) -> Iterator[StreamedArtifact]:
    names = [node.name for node in graph.fx.nodes if node.op == "call_function"]
    for sample in range(_SAMPLES):
        if input_block is not None:
            yield StreamedArtifact(with_block_noise(graph, input_block, sample=sample))
        else:
            yield StreamedArtifact(with_noise(graph, names, dtype, sample=sample))
