"""`RTN`: round to nearest, the baseline every other method is measured against."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Affine, Graph, Segment
from qcompiler.numerics import QuantSpec
from qcompiler.passes.assign import ShorthandQuantizer
from qcompiler.protocol import Pass, Wave

__all__ = ["RTN", "ScaleSearch"]

ScaleSearch = Literal["minmax", "mse", "gram"]


@dataclass(frozen=True)
class RTN(ShorthandQuantizer):
    """Rounds every weight to the nearest code.

    ``linear(x, W)`` becomes ``linear(x, dequantize(codes, scale))``. What the scale of a group is, ``search`` says:

    | search | scale | calibrated |
    |---|---|---|
    | ``minmax`` | covers the range of the group (`numerics.min_max_qparams`) | no |
    | ``mse`` | least squared rounding error (`numerics.mse_qparams`) | no |
    | ``gram`` | least error of the layer's output (`numerics.gram_qparams`) | yes |

    The last minimizes ``e G eᵀ`` per group, where ``e`` is the rounding error of the group and ``G`` its block of the
    Gram matrix of the input: AWQ's clip search (arXiv 2306.00978, reference implementation), computed from second
    moments instead of running rows of the input.

    Attributes:
        bits: with ``group_size`` and ``symmetric``, shorthand for an `Assign` ahead of this pass; None: schemes are
            assigned already.
        group_size: elements per scale; -1: per output channel.
        symmetric: no zero point.
        search: see above.

    Raises:
        RecipeError: for another search, or a shorthand that means nothing.
    """

    search: ScaleSearch = "minmax"

    @property
    def is_calibrated(self) -> bool:
        """Whether scales are chosen by the error in the output."""
        return self.search == "gram"

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """All layers of a segment at once: no input is looked at with layers before it rounded."""
        return Pass.waves(self, segment, graph)

    def quantize(self, weight: Tensor, gram: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
        """Chooses scales and rounds."""
        if self.search == "gram":
            assert gram is not None
            qparams = numerics.gram_qparams(weight, spec, scale_dtype, gram)
        else:
            choose = numerics.mse_qparams if self.search == "mse" else numerics.min_max_qparams
            qparams = choose(weight, spec, scale_dtype)
        return Affine.of(weight, *qparams, spec, scale_dtype)
