"""Caches of random keys or values, in every format."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompiler.ir import CacheFormat

__all__ = ["FORMATS", "RandomCache", "cache_format", "random_cache"]

FORMATS = {
    "float16": None,
    "int8": CacheFormat("int8"),
    "fp8": CacheFormat("float8_e4m3fn"),
    "int4": CacheFormat("int4"),
}
"""The formats that are timed, one scale per token and head."""


def cache_format(name: str) -> CacheFormat | None:
    """The format with options behind its name: ``int4 asym g32``, ``int8 static``."""
    first, *options = name.split()
    if first in ("float16", "bfloat16", "float32"):
        return None
    dtype: Any = "float8_e4m3fn" if first == "fp8" else first
    group = next((int(option[1:]) for option in options if option[0] == "g"), None)
    scales: Any = "static" if "static" in options else "per_token"
    return CacheFormat(dtype, scales, group, "asym" not in options)


@dataclass(frozen=True)
class RandomCache:
    """One side of a cache, as the operators take it.

    Attributes:
        dtype: its name.
        codes, scale, zero: see ``lowering/kernels/cache_append.py``.
    """

    dtype: str
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @property
    def nbytes(self) -> int:
        """Of all that is stored."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero) if t is not None)

    def clone(self) -> "RandomCache":
        """The same in other memory."""
        scale, zero = (None if t is None else t.clone() for t in (self.scale, self.zero))
        return RandomCache(self.dtype, self.codes.clone(), scale, zero)


def random_cache(
    spec: CacheFormat | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> RandomCache:
    """Random codes and scales; values are about as large as a normal distribution's.

    Args:
        spec: its format; None for one in float.
        shape: ``[B, H, capacity, D]``.
        dtype: of a cache in float.
        generator: on the device it is to lie on.
    """
    device = generator.device
    if spec is None:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return RandomCache(str(dtype).removeprefix("torch."), values, None, None)
    batch, heads, capacity, width = shape
    if spec.is_float:
        codes = torch.randn(shape, generator=generator, device=device, dtype=torch.float16).mul_(100)
        codes, size = codes.clamp_(-448, 448).to(torch.float8_e4m3fn), 100.0
    else:
        low = -128 if spec.bits == 8 and spec.symmetric else 0
        kind = torch.int8 if low else torch.uint8
        stored = (*shape[:3], width // 2 if spec.is_packed else width)
        codes = torch.randint(low, low + 256, stored, generator=generator, device=device, dtype=kind)
        size = (1 << spec.bits) / 12**0.5
    if spec.scales == "static":
        places: tuple[int, ...] = () if spec.is_float else (1, heads, 1, width)
        kept = torch.float32
    else:
        places = (batch, heads, capacity, width // spec.block(width))
        kept = torch.float16
    scale = torch.rand(places, generator=generator, device=device).add_(0.5).div_(size).to(kept)
    zero = None
    if not spec.symmetric:
        middle = 1 << (spec.bits - 1)
        spread = middle // 4
        zero = torch.randint(
            middle - spread, middle + spread, places, generator=generator, device=device, dtype=torch.uint8
        )
    return RandomCache(spec.dtype, codes, scale, zero)
