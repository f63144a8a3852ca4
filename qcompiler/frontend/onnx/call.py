"""`Call`: one node of an ONNX graph as it is interpreted, its inputs computed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler.frontend.onnx.values import Known, Unsupported, Value, as_sizes, as_tensor

__all__ = ["Call", "Operator", "Operators"]

_WITHOUT_EFFECT = frozenset(
    {
        *("accuracy_level", "consumed_inputs", "kernel_shape", "momentum", "num_outputs", "output_dtype", "precision"),
        *("qk_matmul_output_mode", "ratio", "round_mode", "saturate", "seed", "softmax_precision", "sorted"),
        *("spatial", "stash_type", "num_heads", "q_num_heads", "kv_num_heads", "allowzero", "then_branch"),
        *("else_branch", "mask_filter_value", "rotary_interleaved", "storage_order"),
    }
)
"""Attributes that say nothing new, or how exactly to compute: results are in float32."""


@dataclass(frozen=True)
class Call:
    """One node.

    Attributes:
        inputs: values; None for an optional one that is left out.
        attributes: by name: numbers, texts, lists of them.
        version: of the operator set.
        outputs: how many outputs are read.
        device: of the tensors.
    """

    inputs: Sequence[Value | None]
    attributes: Mapping[str, Any]
    version: int
    outputs: int
    device: torch.device
    _looked_at: set[str] = field(default_factory=set)

    def value(self, index: int) -> Value:
        """A required input.

        Raises:
            Unsupported: if it is left out.
        """
        found = self.optional(index)
        if found is None:
            raise Unsupported(f"without input {index}")
        return found

    def optional(self, index: int) -> Value | None:
        """An input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def tensor(self, index: int) -> Tensor:
        """A required input as a tensor."""
        return as_tensor(self.value(index), self.device)

    def optional_tensor(self, index: int) -> Tensor | None:
        """An input as a tensor, or None."""
        found = self.optional(index)
        return None if found is None else as_tensor(found, self.device)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        self._looked_at.add(name)
        return self.attributes.get(name, default)

    def numbers(self, index: int, name: str) -> list[Any] | None:
        """Integers that newer versions of an operator take as an input and older ones as an attribute."""
        given = self.optional(index)
        if given is not None:
            return as_sizes(given, name)
        found = self.get(name)
        return None if found is None else list(found)

    def check_attributes(self) -> None:
        """Refuses attributes that nothing looked at, but those that change no result.

        Raises:
            Unsupported: naming them.
        """
        left = sorted(set(self.attributes) - self._looked_at - _WITHOUT_EFFECT)
        if left:
            raise Unsupported(", ".join(f"{name} {self.attributes[name]}" for name in left))

    def refuse(self, *names: str, **usual: Any) -> None:
        """Refuses attributes that are not read, unless they say what is usual.

        Raises:
            Unsupported: for one of another value.
        """
        for name in names:
            usual.setdefault(name, None)
        for name, value in usual.items():
            found = self.get(name, value)
            if found != value:
                raise Unsupported(f"{name} {found}")

    def is_known(self) -> bool:
        """Whether all inputs are known numbers."""
        return all(isinstance(value, Known) for value in self.inputs if value is not None)


Operator = Callable[[Call], Value | tuple[Value | None, ...]]
Operators = dict[str, Operator]
