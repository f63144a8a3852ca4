"""The formats that keys and values are cached in."""

from dataclasses import dataclass
from typing import Literal

import torch

from qcompiler.errors import RecipeError

__all__ = ["FLOAT_CACHES", "CacheFormat"]

FLOAT_CACHES = ("float32", "float16", "bfloat16")
"""Dtypes of caches that are not quantized."""
_BITS = {"int8": 8, "int4": 4, "float8_e4m3fn": 8}
_TOKEN_SCALE_BYTES, _ZERO_POINT_BYTES = 2, 1


@dataclass(frozen=True)
class CacheFormat:
    """The number format of cached keys, or of cached values.

    Attributes:
        dtype: of the codes: ``int8``, ``int4`` or ``float8_e4m3fn``.
        scales: ``per_token``: one scale, float16, for every token and head, or for every group of channels of those,
            computed when the token comes; ``static``: calibrated, one per channel of every head for integers, one per
            tensor or head for floats.
        group_size: channels that share a scale per token; None: all of a head.
        symmetric: without a zero point.
        per_head: of static floats: a scale for every head, instead of one for the tensor.

    Raises:
        RecipeError: for a combination that means nothing.
    """

    dtype: Literal["int8", "int4", "float8_e4m3fn"]
    scales: Literal["per_token", "static"] = "per_token"
    group_size: int | None = None
    symmetric: bool = True
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise RecipeError("unknown format of a cache", got=self.dtype, expected=", ".join(_BITS))
        if self.scales not in ("per_token", "static"):
            raise RecipeError("unknown scales of a cache", got=self.scales, expected="per_token or static")
        if self.group_size is not None and (self.scales == "static" or self.group_size < 1):
            raise RecipeError(
                "groups of a cache are for scales per token",
                got=f"group_size={self.group_size}, scales={self.scales!r}",
                expected="a positive group size with scales='per_token'",
            )
        if self.is_float and not self.symmetric:
            raise RecipeError("float codes have no zero point", got=f"{self.dtype}, asymmetric", expected="symmetric")

        if self.per_head and not (self.is_float and self.scales == "static"):
            raise RecipeError(
                "scales per head are for static ranges of floats: other formats have finer ones",
                got=f"per_head=True, {self.dtype}, scales={self.scales!r}",
                expected="float8_e4m3fn with scales='static'",
            )

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point numbers."""
        return self.dtype == "float8_e4m3fn"

    @property
    def bits(self) -> int:
        """Of one code."""
        return _BITS[self.dtype]

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits == 4

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype of unpacked codes."""
        if self.is_float:
            return torch.float8_e4m3fn
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def port_dtype(self) -> str:
        """The dtype of the cache itself."""
        return "uint8" if self.is_packed else str(self.code_dtype).removeprefix("torch.")

    def block(self, width: int) -> int:
        """Channels of a head of ``width`` that share a scale per token."""
        return width if self.group_size is None else self.group_size

    def place(self, width: int) -> tuple[int, int]:
        """Axis and block, as ``quantize`` takes them."""
        if self.scales == "per_token":
            return -1, self.block(width)
        if self.per_head:
            return -1, width
        return (0, 0) if self.is_float else (-1, 1)

    def check_width(self, width: int, where: str) -> None:
        """Refuses heads that the format does not fit.

        Raises:
            RecipeError: for an odd width with packed codes, or one that groups do not divide.
        """
        if self.is_packed and width % 2:
            raise RecipeError("two codes of 4 bits share a byte", where=where, got=f"heads of {width} channels")
        if width % self.block(width):
            raise RecipeError(
                "groups of a cache have to divide a head",
                where=where,
                got=f"groups of {self.group_size}, heads of {width} channels",
                remedy=f"choose a divisor of {width}, or -1 for one scale per head",
            )

    def bytes_per_token(self, heads: int, width: int) -> int:
        """What one token takes in a cache of this format, scales included."""
        codes = heads * width * self.bits // 8
        if self.scales == "static":
            return codes
        per_group = _TOKEN_SCALE_BYTES + (0 if self.symmetric else _ZERO_POINT_BYTES)
        return codes + heads * (width // self.block(width)) * per_group

    def __str__(self) -> str:
        sign = "" if self.is_float else " symmetric" if self.symmetric else " asymmetric"
        if self.scales == "static":
            share = "per head" if self.per_head else "per tensor" if self.is_float else "per channel"
            return f"{self.dtype} static {share}{sign}"
        return f"{self.dtype} per token{f' g{self.group_size}' if self.group_size else ''}{sign}"
