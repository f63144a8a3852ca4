"""How a tensor is quantized (`QuantSpec`) and what is quantized at one linear layer (`Scheme`)."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qcompiler.errors import RecipeError

__all__ = ["QuantSpec", "Scheme"]

Granularity = Literal["per_tensor", "per_channel", "per_group"]

_INT_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DEFAULT_GROUP = 128
_SCHEME = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?P<options>(-(g\d+|channel|tensor|sym|asym))*)")


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one quantized tensor.

    Attributes:
        dtype: ``int2``, ``int3``, ``int4`` or ``int8``. Symmetric codes are signed, in ``[-2^(b-1), 2^(b-1) - 1]``;
            asymmetric codes are unsigned, in ``[0, 2^b - 1]``, with a zero point of the same type.
        granularity: how many elements share a scale. ``per_group`` groups run along the last axis (a linear layer's
            input channels); the last group is short where the size does not divide the width.
        group_size: elements per group; given exactly when the granularity is ``per_group``.
        symmetric: no zero point.
        scale_dtype: the dtype scales are stored in (``float32``, ``float16`` or ``bfloat16``); ``None`` means the dtype
            of the tensor that is quantized. Scales are rounded to it *before* codes are computed.

    Raises:
        RecipeError: for a combination that means nothing.
    """

    dtype: str = "int4"
    granularity: Granularity = "per_group"
    group_size: int | None = _DEFAULT_GROUP
    symmetric: bool = True
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _INT_BITS:
            raise RecipeError("unknown quantized dtype", got=self.dtype, expected=", ".join(_INT_BITS))
        if self.granularity not in ("per_tensor", "per_channel", "per_group"):
            raise RecipeError(
                "unknown granularity", got=self.granularity, expected="per_tensor, per_channel or per_group"
            )
        if (self.group_size is not None) != (self.granularity == "per_group"):
            raise RecipeError(
                "group_size goes with granularity per_group, and only with it",
                got=f"granularity={self.granularity}, group_size={self.group_size}",
            )
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError("group_size must be positive", got=self.group_size, expected="16, 32, 64, 128, ...")
        if self.scale_dtype is not None and self.scale_dtype not in _SCALE_DTYPES:
            raise RecipeError("unknown scale dtype", got=self.scale_dtype, expected=", ".join(_SCALE_DTYPES))

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return _INT_BITS[self.dtype]

    @property
    def quant_min(self) -> int:
        """Smallest code, inclusive."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Largest code, inclusive."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype that holds unpacked codes, one per element."""
        return torch.int8 if self.symmetric else torch.uint8

    def scale_torch_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in, for a tensor of ``weight_dtype`` (one that is no scale dtype: float32)."""
        if self.scale_dtype is not None:
            return _SCALE_DTYPES[self.scale_dtype]
        return weight_dtype if weight_dtype in _SCALE_DTYPES.values() else torch.float32

    def group_of(self, width: int) -> int:
        """Elements along the last axis (of length ``width``) that share one scale."""
        return min(self.group_size, width) if self.group_size is not None else width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is ``QuantSpec(**d)``."""
        return {
            "dtype": self.dtype,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
        }

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.granularity == "per_group" else self.granularity
        return f"{self.dtype} {where} {'symmetric' if self.symmetric else 'asymmetric'}"


@dataclass(frozen=True)
class Scheme:
    """What is quantized at one site: its weight, and later its input activation. ``None`` means left in float."""

    weight: QuantSpec | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
    ) -> "Scheme":
        """Reads a scheme name such as ``w4a16``, ``w8a16``, ``w4a16-g64``, ``w3a16-channel`` or ``w4a16-g128-asym``.

        Without a group in the name, ``group_size`` decides (``-1``: per channel); without that, up to four bits take
        groups of 128 and eight bits one scale per output channel.

        Raises:
            RecipeError: for a name that is not a scheme, or one that says two things at once.
        """
        match = _SCHEME.fullmatch(str(name))
        if match is None or f"int{match['w']}" not in _INT_BITS or match["a"] != "16":
            raise RecipeError(
                "unknown scheme",
                got=name,
                expected="w2a16, w3a16, w4a16 or w8a16, with -g<size>, -channel, -tensor, -sym or -asym behind it",
            )
        bits = int(match["w"])
        granularity: Granularity = "per_group" if bits <= 4 else "per_channel"
        size: int | None = _DEFAULT_GROUP
        if group_size is not None:
            granularity, size = ("per_channel", None) if group_size == -1 else ("per_group", group_size)
        is_symmetric = True if symmetric is None else symmetric
        options = match["options"].split("-")[1:]
        signs = sum(option in ("sym", "asym") for option in options)
        if signs > 1 or len(options) - signs > 1:
            raise RecipeError("a scheme name that says two things at once", got=name)
        for option in options:
            if option in ("sym", "asym"):
                is_symmetric = option == "sym"
            elif option in ("channel", "tensor"):
                granularity = "per_channel" if option == "channel" else "per_tensor"
            else:
                granularity, size = "per_group", int(option[1:])
        return cls(
            weight=QuantSpec(
                dtype=f"int{bits}",
                granularity=granularity,
                group_size=size if granularity == "per_group" else None,
                symmetric=is_symmetric,
                scale_dtype=scale_dtype,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is `from_dict`."""
        return {"weight": None if self.weight is None else self.weight.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Scheme":
        """Rebuilds a scheme from `to_dict`."""
        return cls(weight=None if fields["weight"] is None else QuantSpec(**fields["weight"]))
