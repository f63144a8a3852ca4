"""`RTN`: round to nearest, the baseline every other method is measured against."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.errors import RecipeError, ZeroCoverageError
from qcompiler.ir import Affine, Graph, Site, is_expert
from qcompiler.numerics import QuantSpec
from qcompiler.passes.assign import Assign
from qcompiler.protocol import (
    CANONICAL,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    Effect,
    Gram,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Tap,
    Wave,
)

__all__ = ["RTN", "ScaleSearch", "gathered_gram", "implied_assign", "refuse_codebooks", "round_to_nearest", "unreached"]

ScaleSearch = Literal["minmax", "mse", "gram"]


@dataclass(frozen=True)
class RTN(Pass):
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

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    search: ScaleSearch = "minmax"

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.implied_passes()  # a shorthand that means nothing is refused here

    @property
    def is_calibrated(self) -> bool:
        """Whether scales are chosen by the error in the output."""
        return self.search == "gram"

    def check(self, graph: Graph) -> None:
        """Refuses schemes with a codebook."""
        refuse_codebooks(graph, self)

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """The Gram matrix of every input, where the search wants it."""
        if not self.is_calibrated:
            return []
        quantized = [site for site in wave if graph.schemes[site.name].weight is not None]
        return [Tap(value, Gram) for site in quantized for value in site.inputs]

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
            gram: Tensor | None = None
            details: dict[str, Any] = {}
            if self.is_calibrated:
                gathered = gathered_gram(site.inputs, statistics)
                gram = gathered.result() if gathered.rows else None
                details = {"calibration_rows": gathered.rows} if gathered.rows else unreached([site])
            search: ScaleSearch = "minmax" if self.search == "gram" and gram is None else self.search
            quantized = round_to_nearest(weight, spec, context, site, search=search, gram=gram)
            seconds = time.perf_counter() - start
            reports.append(replace(self._report(site, weight, quantized, gram), seconds=seconds, details=details))
            context.graph.set_weight(site, quantized)
        return PassResult(modified=bool(reports), sites=tuple(reports))

    def _report(self, site: Site, weight: Tensor, quantized: Affine, gram: Tensor | None) -> SiteReport:
        rounded = quantized.dequantize()
        sqnr, scheme = numerics.sqnr_db(weight, rounded), str(quantized.spec)
        if gram is None:
            return SiteReport(site.name, self.name, scheme, sqnr)
        nearest = numerics.min_max_qparams(weight, quantized.spec, quantized.scale_dtype)
        energy = _error(weight, gram) or 1.0
        return SiteReport(
            site.name,
            self.name,
            scheme,
            sqnr,
            output_error=_error(weight - rounded, gram) / energy,
            rtn_output_error=_error(weight - numerics.fake_quantize(weight, *nearest, quantized.spec), gram) / energy,
        )


def gathered_gram(inputs: Sequence[fx.Node], statistics: Mapping[Any, Any]) -> Gram:
    """The Gram matrix over several values; it has no rows where calibration reached none of them."""
    total = Gram()
    for value in inputs:
        total.merge(statistics[Tap(value, Gram)])
    return total


def unreached(sites: Sequence[Site]) -> dict[str, Any]:
    """What a report says of layers that no calibration row reached, and that are rounded to nearest therefore.

    Raises:
        ZeroCoverageError: if they are no experts: then the calibration is at fault, not the routing.
    """
    if not all(is_expert(site) for site in sites):
        raise ZeroCoverageError(
            "calibration never reached this layer",
            where=sites[0].name,
            expected="at least one input row",
            remedy="use more or other calibration text, or leave the layer out with an override",
        )
    return {"calibration_rows": 0, "fallback": "rounded to nearest: no calibration row was sent to this expert"}


def _error(difference: Tensor, gram: Tensor) -> float:
    """``tr(D G Dᵀ)``."""
    return float((torch.mm(difference, gram) * difference).sum(dtype=torch.float64))


def refuse_codebooks(graph: Graph, quantizer: Pass) -> None:
    """Refuses a graph some of whose weights are to have codebooks, for a pass that rounds to even steps.

    Raises:
        RecipeError: if so.
    """
    for site, scheme in graph.schemes.items():
        if scheme.weight is not None and scheme.weight.codebook:
            raise RecipeError(
                f"{quantizer.name} rounds to a grid of even steps, and this layer is to have a codebook",
                where=site,
                got=scheme.weight,
                expected="a scheme without -lut",
                remedy="use SqueezeLLM(), or another scheme",
            )


def implied_assign(bits: int | None, group_size: int | None, symmetric: bool | None) -> tuple[Pass, ...]:
    """The `Assign` that a quantizer's ``bits`` is shorthand for.

    Raises:
        RecipeError: for bits or groups that no scheme has, or groups without bits.
    """
    if bits is None:
        if group_size is not None or symmetric is not None:
            raise RecipeError(
                "group_size and symmetric are shorthand for an Assign, as bits is",
                got=f"group_size={group_size}, symmetric={symmetric} without bits",
                expected="bits besides, or an Assign ahead that says it",
            )
        return ()
    return (Assign(f"w{bits}a16", group_size=group_size, symmetric=symmetric),)


def round_to_nearest(
    weight: Tensor,
    spec: QuantSpec,
    context: PassContext,
    site: Site,
    *,
    search: ScaleSearch = "minmax",
    gram: Tensor | None = None,
) -> Affine:
    """The weight of a site, rounded to nearest; ``gram`` goes with the search of that name."""
    scale_dtype = context.scale_dtype(site)
    if search == "gram":
        assert gram is not None
        scale, zero_point = numerics.gram_qparams(weight, spec, scale_dtype, gram)
    else:
        choose = numerics.mse_qparams if search == "mse" else numerics.min_max_qparams
        scale, zero_point = choose(weight, spec, scale_dtype)
    codes, factor = numerics.quantize(weight, scale, zero_point, spec), numerics.scale_factor(weight, spec)
    return Affine(codes, scale, zero_point, spec, scale_dtype, factor)
