"""Beside the plan: makes the module of one site, of the operator that computes it best; and that of ``hadamard``.

The operators and what they can do are in the folders beside this one (``weight_only``, ``scaled_linear``,
``codebook_linear``). `make_site_module` asks them, and tells why it was not a better one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.ir import Affine, Codebook
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.module.forms import Rounding
from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear
from qcompiler.lowering.kernels.scaled_linear.operator import choose as choose_scaled
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.lowering.kernels.weight_only.operator import choose as choose_weight_only
from qcompiler.numerics import factors_of, hadamard_matrix

__all__ = ["Hadamard", "SiteModule", "make_site_module"]


@dataclass(frozen=True)
class SiteModule:
    """How a site is computed.

    Attributes:
        module: takes activations, or their codes; None: the weight is dequantized once.
        choice: the implementation, and why not a better one.
        takes_codes: whether ``module`` is given codes and scales of activations.
    """

    module: nn.Module | None
    choice: Choice
    takes_codes: bool = False


def make_site_module(
    weight: Affine | Codebook | None,
    bias: Tensor | None,
    rounding: Rounding | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> SiteModule:
    """Chooses an operator for a site and makes the module that calls it.

    Codes of activations go into the product where there is an operator for both. Where there is none, activations are
    rounded as the graph says and the weight alone is kept in codes; where that has no operator either, in float.

    Args:
        weight: None for one that has no form an operator knows.
        bias: ``[out]``.
        rounding: of the input.
        device: it will run on.
        dtype: of activations.
    """
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if isinstance(weight, Codebook):
        looked_up = CodebookLinear.from_weight(weight, bias, **place)
        return SiteModule(looked_up, looked_up.choice)
    if weight is None:
        return SiteModule(None, Choice("reference", "no kernel for weights of this form: dequantized once"))
    shape = (*weight.codes.shape, Device.of(device), dtype)
    alone = choose_weight_only(weight.spec, *shape)
    if rounding is None:
        return SiteModule(WeightOnlyLinear.from_weight(weight, bias, **place) if alone.is_fused else None, alone)
    both = choose_scaled(weight.spec, rounding.spec, *shape)
    if both.is_fused or _is_exact_in_float(weight, rounding, device):
        scaled = ScaledLinear.from_weight(weight, bias, activation=rounding.spec, **place)
        return SiteModule(scaled, scaled.choice, takes_codes=True)
    if not alone.is_fused:
        return SiteModule(None, both)
    reason = f"rounded activations in {str(dtype).removeprefix('torch.')}: {both.reason}"
    return SiteModule(WeightOnlyLinear.from_weight(weight, bias, **place), Choice(alone.implementation, reason))


def _is_exact_in_float(weight: Affine, rounding: Rounding, device: torch.device) -> bool:
    """Whether the codes themselves can be multiplied as floats: 8-bit floats on a CPU, exact in bfloat16 already."""
    return device.type == "cpu" and weight.spec.is_float and not weight.spec.is_fp4 and rounding.spec.is_float


class Hadamard(nn.Module):
    """The operator ``hadamard``, its matrices kept: every ``block`` elements times an orthogonal matrix, in float32.

    Args:
        block: an order of which there is a matrix.
        device: where it will run.
    """

    def __init__(self, block: int, device: torch.device) -> None:
        super().__init__()
        factors = factors_of(block)
        assert factors is not None
        self.block, self.factors = block, tuple(factors)
        for factor in dict.fromkeys(self.factors):
            self.register_buffer(f"matrix_{factor}", (hadamard_matrix(factor) / factor**0.5).to(device))

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[..., n]`` to the same, n a multiple of the block."""
        result = x
        for factor in self.factors:  # as `qcompiler.numerics.multiply` has it
            blocks = (*x.shape[:-1], x.shape[-1] // self.block, factor, self.block // factor)
            result = result.reshape(blocks).transpose(-1, -2) @ self.get_buffer(f"matrix_{factor}")
        return result.reshape(x.shape)
