"""What flows through an ONNX graph while it is interpreted: tensors, and numbers that are known already.

Shapes are computed by operators in ONNX, too. Their values are kept as numbers, symbolic ones among them, so that a
size never depends on what a tensor holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "DTYPES",
    "Known",
    "Unsupported",
    "Value",
    "as_number",
    "as_sizes",
    "as_tensor",
    "is_float",
    "known",
    "shortest",
]

Number = int | float | bool | torch.SymInt | torch.SymBool | torch.SymFloat
MOST_KNOWN = 64
"""Elements; larger tensors of integers are no shapes."""

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float64,
    16: torch.float32,
    17: torch.float8_e4m3fn,
    19: torch.float8_e5m2,
    21: torch.uint8,
    22: torch.int8,
}
"""By ONNX's number of a dtype: what a graph computes in. Floats narrower than float32 are computed in float32, as those
of other models are; codes of 4 bits are held in 8.
"""


class Unsupported(Exception):
    """An operator is used in a way that is not read, for this reason."""


@dataclass(frozen=True, eq=False)
class Known:
    """Numbers that are known while a graph is traced.

    Attributes:
        array: of Python numbers and symbolic ones, any rank.
        dtype: what a tensor of them would have.
    """

    array: NDArray[Any]
    dtype: torch.dtype

    def map(self, function: Callable[[Any], Any], dtype: torch.dtype | None = None) -> "Known":
        """Each number replaced."""
        changed = np.empty(self.array.size, dtype=object)
        for place, number in enumerate(self.array.reshape(-1)):
            changed[place] = function(number)
        return Known(changed.reshape(self.array.shape), dtype or self.dtype)


Value = Tensor | Known


def known(data: Any, dtype: torch.dtype = torch.int64, shape: Sequence[int] | None = None) -> Known:
    """Numbers (a number or a flat list of them) as a value.

    Args:
        data: Python or symbolic numbers.
        dtype: of the value.
        shape: by default that of the data, 0-D or 1-D.
    """
    items = data if isinstance(data, (list, tuple)) else [data]
    array = np.empty(len(items), dtype=object)
    for place, item in enumerate(items):
        array[place] = item
    if shape is None:
        shape = (len(items),) if isinstance(data, (list, tuple)) else ()
    return Known(array.reshape(tuple(shape)), dtype)


def shortest(number: float) -> float:
    """The decimal that a float32 was written as: 1e-06, not 9.999999974752427e-07."""
    decimal = float(str(np.float32(number)))
    return decimal if abs(decimal) <= float(np.finfo(np.float32).max) else number


def is_float(value: Value) -> bool:
    """Whether it holds floats."""
    return value.dtype.is_floating_point


def as_tensor(value: Value, device: torch.device) -> Tensor:
    """A value as a tensor; known numbers become one by operators of the graph."""
    if isinstance(value, Tensor):
        return value
    items = list(value.array.reshape(-1))
    if all(isinstance(item, (bool, int, float)) for item in items):
        if len(items) == 1:
            return torch.full(value.array.shape, items[0], dtype=value.dtype, device=device)
        if not items:
            return torch.empty(value.array.shape, dtype=value.dtype, device=device)
        flat = torch.tensor(items, dtype=value.dtype, device=device)
    else:
        flat = torch.stack([torch.full((), item, dtype=value.dtype, device=device) for item in items])
    return flat.reshape(value.array.shape)


def as_sizes(value: Value | None, what: str = "a shape") -> list[Any]:
    """A value's numbers, in order.

    Raises:
        Unsupported: if they depend on data.
    """
    if isinstance(value, Known):
        return list(value.array.reshape(-1))
    raise Unsupported(f"{what} that depends on data")


def as_number(value: Value, what: str = "a number") -> Any:
    """The one number that a value is.

    Raises:
        Unsupported: if it depends on data, or is several.
    """
    numbers = as_sizes(value, what)
    if len(numbers) != 1:
        raise Unsupported(f"{what} that is {len(numbers)} numbers")
    return numbers[0]
