"""The accuracy level of weight products: what it costs is measured on text, and said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from qcompiler.lowering.onnx import by_onnxruntime
from qcompiler.storage import StagedFiles

__all__ = ["BOUND", "Chosen", "choose_level", "set_level"]

BOUND = 0.005
"""Nats per token that int8 activations inside products may cost: half a percent of perplexity."""

_EXACT, _INT8 = 0, 4
_MODEL_FILE = "model.onnx"
_TOKENS = 512


@dataclass(frozen=True)
class Chosen:
    """An accuracy level, and why.

    Attributes:
        level: 0 to 4.
        kl_divergence: of level 4 from the exact products, in nats per token; None where it was not measured.
        tokens: that it was measured on.
        asked: whether the level was asked for.
    """

    level: int
    kl_divergence: float | None = None
    tokens: int = 0
    asked: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields."""
        return {"accuracy_level": self.level, "level_kl_divergence": self.kl_divergence, "level_tokens": self.tokens}

    def __str__(self) -> str:
        if self.asked:
            return f"accuracy level {self.level}, as asked"
        if self.kl_divergence is None:
            return f"accuracy level {self.level}: no held-out text to measure level {_INT8} with, which is faster"
        sign = "below" if self.kl_divergence < BOUND else "not below"
        return (
            f"accuracy level {self.level}: level {_INT8} diverges by {self.kl_divergence:.2g} nats per token from "
            f"exact products on {self.tokens} held-out tokens, {sign} {BOUND:g}"
        )


def choose_level(directory: Path, wanted: int | str, tokens: Tensor | None) -> Chosen:
    """Sets the level of a folder whose products are exact.

    Args:
        directory: with the model.
        wanted: a level, or ``auto``.
        tokens: int64 ``[rows, length]`` of held-out text.
    """
    if isinstance(wanted, int):
        _write_level(directory, wanted)
        return Chosen(wanted, asked=True)
    if tokens is None or not tokens.numel():
        return Chosen(_EXACT)
    ids = tokens[: max(1, _TOKENS // tokens.shape[1]), :_TOKENS]
    reference = by_onnxruntime(directory).forward(ids).log_softmax(-1)
    _write_level(directory, _INT8)
    found = by_onnxruntime(directory).forward(ids).log_softmax(-1)
    divergence = float((reference.exp() * (reference - found)).sum(-1, dtype=torch.float64).mean())
    level = _INT8 if divergence < BOUND else _EXACT  # a NaN is not
    if level != _INT8:
        _write_level(directory, level)
    return Chosen(level, divergence, ids.numel())


def set_level(model: onnx.ModelProto, level: int) -> None:
    """Gives every weight product of a model an accuracy level, in place."""
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level


def _write_level(directory: Path, level: int) -> None:
    model = onnx.load(directory / _MODEL_FILE, load_external_data=False)
    set_level(model, level)
    with StagedFiles(directory) as staged, staged.file(_MODEL_FILE) as append:
        append(model.SerializeToString())
