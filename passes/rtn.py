"""`RTN`: round to nearest, the baseline every other method is measured against."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qcompiler import numerics
from qcompiler.graph import Site
from qcompiler.pass_base import (
    CANONICAL,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Wave,
)
from qcompiler.passes.assign import Assign
from qcompiler.qtensor import Affine
from qcompiler.spec import QuantSpec

__all__ = ["RTN", "round_to_nearest"]


@dataclass(frozen=True)
class RTN(Pass):
    """Rounds every weight to the nearest code. Needs no calibration.

    ``linear(x, W)`` becomes ``linear(x, dequantize(codes, scale))``. The scale covers the range of its group
    (`numerics.min_max_qparams`) or, with ``search``, minimizes the squared rounding error (`numerics.mse_qparams`).

    Attributes:
        bits: with ``group_size`` and ``symmetric``, shorthand for an `Assign` ahead of this pass; None: schemes are
            assigned already.
        group_size: elements per scale; -1: per output channel.
        symmetric: no zero point.
        search: choose each scale by its squared error instead of by the range.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    search: bool = False

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})

    def implied_passes(self) -> tuple[Pass, ...]:
        """An `Assign` where ``bits`` is given."""
        return implied_assign(self.bits, self.group_size, self.symmetric)

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        """Rounds the weights of a wave."""
        reports = []
        for site in wave:
            spec = context.graph.schemes[site.name].weight
            if spec is None:
                continue
            start = time.perf_counter()
            weight = context.weight(site)
            quantized = round_to_nearest(weight, spec, context, site, search=self.search)
            sqnr = numerics.sqnr_db(weight, quantized.dequantize())
            context.graph.set_weight(site, quantized)
            reports.append(SiteReport(site.name, self.name, str(spec), sqnr, seconds=time.perf_counter() - start))
        return PassResult(modified=bool(reports), sites=tuple(reports))


def implied_assign(bits: int | None, group_size: int | None, symmetric: bool | None) -> tuple[Pass, ...]:
    """The `Assign` that a quantizer's ``bits`` is shorthand for."""
    if bits is None:
        return ()
    return (Assign(f"w{bits}a16", group_size=group_size, symmetric=symmetric),)


def round_to_nearest(
    weight: Tensor, spec: QuantSpec, context: PassContext, site: Site, *, search: bool = False
) -> Affine:
    """The weight of a site, rounded to nearest."""
    scale_dtype = context.scale_dtype(site)
    choose = numerics.mse_qparams if search else numerics.min_max_qparams
    scale, zero_point = choose(weight, spec, scale_dtype)
    return Affine(numerics.quantize(weight, scale, zero_point, spec), scale, zero_point, spec, scale_dtype)
