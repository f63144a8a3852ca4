"""The inputs and outputs of a captured graph: names, roles and symbolic shapes."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

__all__ = ["BATCH", "PAST", "SEQUENCE", "TOTAL", "Dim", "Part", "Port", "Signature"]

Role = Literal["ids", "mask", "positions", "past", "present", "logits", "scores", "other"]
"""``logits`` score the vocabulary at each position; ``scores`` are those of a classifier or a reward model."""
Part = Literal["key", "value", "key_scale", "value_scale", "key_zero_point", "value_zero_point"]
"""What a cache holds. Codes of a quantized one are its ``key`` and ``value``."""
Dim = int | str
"""A size: a number, or an expression of the symbols `BATCH`, `SEQUENCE` and `PAST`."""

BATCH, SEQUENCE, PAST = "batch", "sequence", "past_sequence"
TOTAL = f"{PAST} + {SEQUENCE}"


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: as ONNX Runtime GenAI and Optimum spell it: ``input_ids``, ``past_key_values.3.key``, ``present.3.value``.
        role: what the value is for.
        dtype: torch's name of the dtype, such as ``int64``.
        shape: sizes, symbolic where they vary.
        layer: for caches, the index of the attention layer.
        part: for caches, ``key`` or ``value``; of a quantized cache also what those are read with.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[Dim, ...]
    layer: int | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Signature:
    """The ports of a graph, in call order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def input(self, role: Role) -> Port | None:
        """The first input of a role, or None."""
        return next((port for port in self.inputs if port.role == role), None)

    def index_of_output(self, role: Role) -> int | None:
        """The position of the first output of a role, or None."""
        return next((i for i, port in enumerate(self.outputs) if port.role == role), None)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values enter and leave as caches."""
        return self.input("past") is not None

    @property
    def has_quantized_cache(self) -> bool:
        """Whether keys or values are kept as codes."""
        return any(port.role == "past" and _dtype(port).itemsize == 1 for port in self.inputs)

    @property
    def cache_bytes_per_token(self) -> int | None:
        """What one token of one sequence takes in all caches, scales included; None without a cache."""
        if not self.has_cache:
            return None
        past = (port for port in self.inputs if port.role == "past")
        return sum(_dtype(port).itemsize * math.prod(d for d in port.shape if isinstance(d, int)) for port in past)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is `from_dict`."""
        return {"inputs": [asdict(p) for p in self.inputs], "outputs": [asdict(p) for p in self.outputs]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Signature":
        """Rebuilds a signature from `to_dict`."""

        def ports(items: list[dict[str, Any]]) -> tuple[Port, ...]:
            return tuple(Port(**{**item, "shape": tuple(item["shape"])}) for item in items)

        return cls(ports(fields["inputs"]), ports(fields["outputs"]))


def _dtype(port: Port) -> torch.dtype:
    found: torch.dtype = getattr(torch, port.dtype)
    return found
