"""Caches of a fixed capacity, as the operators take them, with what must not be read in the rows behind their end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.kernels.cache import append as cache_append  # noqa: F401  (defines the operators)

FORMATS = {
    "int8": CacheFormat("int8"),
    "int8-asymmetric": CacheFormat("int8", symmetric=False),
    "int8-g16": CacheFormat("int8", group_size=16),
    "int4": CacheFormat("int4"),
    "int4-g16-asymmetric": CacheFormat("int4", group_size=16, symmetric=False),
    "int4-asymmetric": CacheFormat("int4", symmetric=False),
    "fp8": CacheFormat("float8_e4m3fn"),
    "fp8-g16": CacheFormat("float8_e4m3fn", group_size=16),
    "int8-static": CacheFormat("int8", "static"),
    "int8-static-asymmetric": CacheFormat("int8", "static", symmetric=False),
    "int4-static": CacheFormat("int4", "static"),
    "int4-static-asymmetric": CacheFormat("int4", "static", symmetric=False),
    "fp8-static": CacheFormat("float8_e4m3fn", "static"),
}
KERNELS = torch.ops.qcompiler_kernels


@dataclass
class Cache:
    """One side of a cache; in float where there is no format."""

    spec: CacheFormat | None
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    block: int

    @property
    def dtype(self) -> str:
        return str(self.codes.dtype).removeprefix("torch.") if self.spec is None else self.spec.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.codes, self.scale, self.zero

    def copy(self) -> "Cache":
        scale, zero = (None if t is None else t.clone() for t in (self.scale, self.zero))
        return Cache(self.spec, self.codes.clone(), scale, zero, self.block)

    def to(self, device: str) -> "Cache":
        scale, zero = (None if t is None else t.to(device) for t in (self.scale, self.zero))
        return Cache(self.spec, self.codes.to(device), scale, zero, self.block)

    def append(self, new: Tensor, start: Tensor) -> None:
        """By the operator for the device the cache lies on."""
        if self.spec is None or self.spec.scales == "static":
            KERNELS.append_static(new, *self.tensors, start, self.dtype)
        else:
            KERNELS.append_quantized(new, *self.tensors, start, self.dtype, self.block, self.spec.symmetric)


def empty_cache(
    spec: CacheFormat | None, batch: int, heads: int, capacity: int, width: int, dtype: torch.dtype = torch.float16
) -> Cache:
    """A cache of garbage: random codes, scales that are not a number; stored scales are good."""
    generator = torch.Generator().manual_seed(1)
    rows = (batch, heads, capacity)
    if spec is None:
        return Cache(None, torch.full((*rows, width), torch.nan, dtype=dtype), None, None, 0)
    stored = width // 2 if spec.is_packed else width
    codes = torch.randint(0, 256, (*rows, stored), dtype=torch.uint8, generator=generator)
    codes = codes.view(getattr(torch, spec.port_dtype))
    if spec.scales == "static":
        shape: tuple[int, ...] = () if spec.is_float else (1, heads, 1, width)
        scale = (torch.rand(shape, generator=generator) + 0.5) * (4.0 / (448 if spec.is_float else 2**spec.bits))
        middle = 2 ** (spec.bits - 1)
        zero = torch.randint(middle - 3, middle + 4, shape, dtype=torch.uint8, generator=generator)
        return Cache(spec, codes, scale, None if spec.symmetric else zero, 0)
    block = spec.block(width)
    scale = torch.full((*rows, width // block), torch.nan, dtype=torch.float16)
    zero = torch.randint(0, 256, scale.shape, dtype=torch.uint8, generator=generator)
    return Cache(spec, codes, scale, None if spec.symmetric else zero, block)


def filled_cache(
    spec: CacheFormat | None,
    batch: int,
    heads: int,
    capacity: int,
    width: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype = torch.float16,
) -> Cache:
    """Tokens that differ in size from token to token and channel to channel, then garbage."""
    cache = empty_cache(spec, batch, heads, capacity, width, dtype)
    most = max(lengths)
    size = 2.0 ** torch.randint(-2, 2, (batch, heads, most, 1))
    values = torch.randn(batch, heads, most, width) * size * torch.linspace(0.5, 1.5, width) + 0.3
    whole = empty_cache(spec, batch, heads, max(most, 1), width, dtype)
    if most:
        whole.append(values, torch.zeros(1, dtype=torch.int32))
    for i, length in enumerate(lengths if len(lengths) > 1 else lengths * batch):
        for target, source in zip(cache.tensors, whole.tensors, strict=True):
            if target is not None and source is not None and target.dim() == 4 and target.shape[2] == capacity:
                flat = target.view(torch.uint8) if target.dtype == torch.float8_e4m3fn else target
                other = source.view(torch.uint8) if source.dtype == torch.float8_e4m3fn else source
                flat[i, :, :length] = other[i, :, :length]
    return cache


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
