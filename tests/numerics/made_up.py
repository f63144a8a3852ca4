"""What the tests of the arithmetic are made of."""

import hypothesis.strategies as st
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.numerics.spec import Granularity, QuantSpec

GROUPS: dict[Granularity, int | None] = {"per_group": 16, "per_channel": None, "per_tensor": None}
SPECS = [
    QuantSpec(f"int{bits}", granularity, group, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity, group in GROUPS.items()
    for symmetric in (True, False)
]
SCALE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Normal values with outliers, shifted, of any magnitude; some groups are all zero."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, width, generator=generator) ** draw(st.sampled_from([1, 3]))
    x = (x + draw(st.sampled_from([0.0, 2.0, -5.0]))) * 10.0 ** draw(st.integers(-3, 2))
    x[:, draw(st.integers(0, width)) :] = 0
    return x


def naive_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    codes = torch.empty(x.shape, dtype=spec.code_dtype)
    group = spec.group_size or x.shape[1]
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            at = (min(i, len(scale) - 1), j // group)
            quotient = (x[i, j] / scale[at]).item()
            code = round(quotient) + (0 if zero is None else int(zero[at]))  # Python rounds half to even
            codes[i, j] = min(max(code, spec.quant_min), spec.quant_max)
    return codes


def squared_error(x: Tensor, qparams: tuple[Tensor, Tensor | None], spec: QuantSpec, importance: Tensor) -> Tensor:
    """float64 ``[rows or 1, groups]``."""
    error = (numerics.fake_quantize(x, *qparams, spec).double() - x.double()).square() * importance.double()
    if spec.granularity == "per_tensor":
        return error.sum().reshape(1, 1)
    return torch.stack([part.sum(-1) for part in error.split(spec.group_of(x.shape[1]), dim=-1)], dim=-1)
