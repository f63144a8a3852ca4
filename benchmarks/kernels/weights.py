"""Random quantized weights, made where they are used: nothing is calibrated, nothing rounded."""

import torch
from torch import Tensor

from qcompiler.ir import Affine, Codebook, Csr
from qcompiler.numerics import QuantSpec

__all__ = ["SPARSE_SHARE", "affine", "codebook", "dense"]

SPARSE_SHARE = 0.0045
"""Of the weights that SqueezeLLM keeps apart: 0.45 percent (arXiv 2306.07629, section 4.2)."""


def dense(out_features: int, in_features: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``[out, in]``, so small that outputs are about as large as inputs."""
    weight = torch.randn(out_features, in_features, generator=generator, device=generator.device, dtype=dtype)
    return weight.mul_(in_features**-0.5)


def affine(
    out_features: int, in_features: int, spec: QuantSpec, scale_dtype: torch.dtype, generator: torch.Generator
) -> Affine:
    """Random codes, every one of them possible, under random scales."""
    device = generator.device
    shape = (out_features, in_features)
    if spec.is_float:
        codes = torch.randn(shape, generator=generator, device=device).mul_(100).clamp_(-448, 448).to(spec.code_dtype)
        size = 100.0
    else:
        codes = torch.randint(
            spec.quant_min, spec.quant_max + 1, shape, dtype=spec.code_dtype, generator=generator, device=device
        )
        size = (spec.quant_max - spec.quant_min + 1) / 12**0.5
    rows = 1 if spec.granularity == "per_tensor" else out_features
    places = (rows, -(-in_features // spec.group_of(in_features)))
    scale = torch.rand(places, generator=generator, device=device).add_(0.5).mul_(in_features**-0.5 / size)
    zero_point = None
    if not spec.symmetric:
        middle = (spec.quant_max + 1) // 2
        spread = max(1, middle // 2)
        zero_point = torch.randint(
            middle - spread, middle + spread, places, dtype=torch.uint8, generator=generator, device=device
        )
    return Affine(codes, scale.to(scale_dtype).float(), zero_point, spec, scale_dtype)


def codebook(
    out_features: int,
    in_features: int,
    bits: int,
    generator: torch.Generator,
    *,
    sparse_share: float = 0.0,
    dtype: torch.dtype = torch.float16,
) -> Codebook:
    """Random codes into random tables, and a share of the weights in a sparse matrix beside them."""
    device = generator.device
    codes = torch.randint(1 << bits, (out_features, in_features), dtype=torch.uint8, generator=generator, device=device)
    table = torch.randn(out_features, 1 << bits, generator=generator, device=device).mul_(in_features**-0.5)
    spec = QuantSpec(f"int{bits}", "per_channel", None, codebook=True)
    sparse = _csr(out_features, in_features, sparse_share, dtype, generator) if sparse_share else None
    return Codebook(codes, table.sort(dim=1).values.to(dtype), sparse, spec)


def _csr(out_features: int, in_features: int, share: float, dtype: torch.dtype, generator: torch.Generator) -> Csr:
    chosen = torch.rand(out_features, in_features, generator=generator, device=generator.device) < share
    rows, columns = chosen.nonzero(as_tuple=True)
    values = torch.randn(rows.shape[0], generator=generator, device=rows.device).mul_(3 * in_features**-0.5)
    counts = torch.bincount(rows, minlength=out_features)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Csr(values.to(dtype), columns.to(torch.int32), offsets.to(torch.int32))
