"""What a format is expected to cost: ``quality.toml``, each entry with its source, and what that means for a choice."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qcompiler.ir import CacheFormat
from qcompiler.numerics import Scheme

__all__ = ["LIMITS", "Expectation", "expect_cache", "expect_weights", "level_of"]

LIMITS = (0.01, 0.03, 0.2)
"""Nats per token up to which a loss is level 0 (no evaluation tells it from the original), 1 (small: verify it) or 2
(felt); beyond, 3. 0.01 is one per cent of perplexity, 0.03 three."""
_MEASURED_AT = 6.7e9  # parameters of the model of the published figures
_EXPONENT = 0.3
"""How losses grow as models get smaller than that: GPTQ at four bits costs 0.029 at 6.7 billion parameters (published)
and 0.094 at 135 million (benchmarks/results/real-model.md), a third power of their ratio."""


@dataclass(frozen=True)
class Expectation:
    """An expected loss.

    Attributes:
        loss: nats per token; None: nothing is known of the format.
        source: of the figure.
    """

    loss: float | None
    source: str


def expect_weights(scheme: Scheme, passes: Sequence[str], parameters: float) -> Expectation:
    """Of weights and activations.

    Args:
        scheme: of the layers.
        passes: of the recipe, by their classes' names.
        parameters: of the model: one smaller than that measured loses more.
    """
    if scheme.weight is None:
        return Expectation(0.0, "nothing is rounded")
    formats = (scheme.weight.dtype, None if scheme.activation is None else scheme.activation.dtype)
    entries = [
        entry
        for entry in _tables()["weights"]
        if (entry["weight"], entry.get("activation")) == formats and set(entry.get("passes", ())) <= set(passes)
    ]
    if not entries:
        return Expectation(None, "nothing is known of this format")
    entry = max(entries, key=lambda entry: len(entry.get("passes", ())))
    growth = max(entry.get("parameters", _MEASURED_AT) / parameters, 1.0) ** _EXPONENT
    source = entry["source"]
    if growth > 1:
        source += f"; times {growth:.2f}, as this model is smaller than the one measured"
    return Expectation(entry["loss"] * growth, source)


def expect_cache(spec: CacheFormat | None) -> Expectation:
    """Of keys and values."""
    if spec is None:
        return Expectation(0.0, "nothing is rounded")
    entries = [
        entry
        for entry in _tables()["caches"]
        if entry["format"] == spec.dtype and entry.get("scales", spec.scales) == spec.scales
    ]
    entry = max(entries, key=lambda entry: "scales" in entry, default=None)
    return Expectation(None, "nothing is known of this cache") if entry is None else Expectation(**_loss(entry))


def _loss(entry: dict[str, Any]) -> dict[str, Any]:
    return {"loss": entry["loss"], "source": entry["source"]}


def level_of(loss: float | None) -> int:
    """Of `LIMITS`; unknown is the last."""
    return len(LIMITS) if loss is None else sum(loss > limit for limit in LIMITS)


@cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(Path(__file__).with_name("quality.toml").read_text(encoding="utf-8"))
