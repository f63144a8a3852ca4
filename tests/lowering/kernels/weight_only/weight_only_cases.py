"""Random low-bit weights for the tests of weight-only layers."""

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir.qtensor import Affine
from qcompiler.numerics.spec import QuantSpec


def spec_of(bits: int, group: int | None, symmetric: bool = True) -> QuantSpec:
    """A format; ``group`` None is per channel."""
    return QuantSpec(f"int{bits}", "per_channel" if group is None else "per_group", group, symmetric)


def random_weight(
    out: int, width: int, spec: QuantSpec, scale_dtype: torch.dtype = torch.float32, seed: int = 0
) -> Affine:
    """Every code, scales between 0.5 and 1.5 times 2^-bits of either neighbouring magnitude, every zero point."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.quant_min, spec.quant_max + 1, (out, width), generator=generator).to(spec.code_dtype)
    groups = -(-width // spec.group_of(width))
    shape = (1 if spec.granularity == "per_tensor" else out, groups)
    scale = (0.5 + torch.rand(shape, generator=generator)) * 2.0 ** (1 - spec.bits)
    zero = None
    if not spec.symmetric:
        zero = torch.randint(0, spec.quant_max + 1, shape, generator=generator).to(torch.uint8)
    return Affine(codes, numerics.round_scale(scale, scale_dtype), zero, spec, scale_dtype)


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
