"""A rounding of your own in one function: `GreedyRounding`. docs/writing-a-pass.md explains what there is to fill in.

``qcompiler compile MODEL --recipe examples/custom_rounding.py:RECIPE --to onnx -o OUT``
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.extend import Affine, QuantSpec, WeightQuantizer, numerics
from qcompiler.passes import Assign


@dataclass(frozen=True)
class GreedyRounding(WeightQuantizer):
    """Rounds to nearest, then goes over the input channels and moves each to its best code, all others being fixed.

    With ``E = W - Q`` and the Gram matrix ``G = X'X`` of the layer's input, ``tr(E G E')`` is the squared error of its
    output. It is a parabola in each code, and least ``(E G)[:, i] / G[i, i]`` away. No step can make it larger, so the
    result is never worse than round to nearest. Scales stay as they are; layers with float codes are left alone.

    Attributes:
        sweeps: how often to go over the channels.
    """

    sweeps: int = 1

    def refuses(self, spec: QuantSpec) -> str | None:
        """Float codes."""
        return "float codes are not evenly spaced" if spec.is_float else None

    def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
        """Rounds one weight."""
        scale, zero_point = numerics.min_max_qparams(weight, spec, scale_dtype)
        codes = numerics.quantize(weight, scale, zero_point, spec)
        error = weight - numerics.dequantize(codes, scale, zero_point, spec)
        steps = numerics.expand_groups(scale, weight.shape[1], spec.group_of(weight.shape[1]))
        for i in [*range(weight.shape[1])] * self.sweeps:
            if gram[i, i] > 0:
                wanted = codes[:, i] + error @ gram[:, i] / gram[i, i] / steps[:, i]
                best = wanted.round().clamp(spec.quant_min, spec.quant_max)
                error[:, i] -= (best - codes[:, i]) * steps[:, i]
                codes[:, i] = best.to(codes.dtype)
        return Affine(codes, scale, zero_point, spec, scale_dtype)


RECIPE = (Assign("w4a16"), GreedyRounding())
