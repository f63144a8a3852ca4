"""`SqueezeLLM`: a table of values per output channel, where the loss wants them, and a few weights kept apart."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.ir import Codebook, Csr, Site
from qcompiler.numerics import QuantSpec
from qcompiler.passes.assign import Assign
from qcompiler.passes.fisher import Fisher
from qcompiler.passes.rtn import RTN
from qcompiler.passes.solvers.codebook_descent import damped, improve, shifted
from qcompiler.passes.solvers.kmeans import cluster, nearest
from qcompiler.protocol import (
    CANONICAL,
    FISHER,
    SCHEMES,
    CrossGram,
    Gram,
    Pass,
    SharedInput,
    Solution,
    WeightQuantizer,
    Within,
    even_steps,
)

__all__ = ["Moments", "Sensitivity", "SqueezeLLM", "squeeze"]

Sensitivity = Literal["fisher", "gram"]

_FAINTEST = 1e-6  # of the mean: a weight that nothing minds has a value near it in the table all the same
_SENSITIVE_SHARE = 1 / 9  # of the weights kept apart: 0.05 of 0.45 per cent in the paper


@dataclass(frozen=True)
class SqueezeLLM(WeightQuantizer):
    """Gives every output channel a table of ``2^bits`` values, and keeps a small part of the weights apart.

    ``linear(x, W)`` becomes ``linear(x, sparse_add(codebook_dequantize(codes, table), values, columns, row_offsets))``.
    The values of a row's table are the centers of a k-means clustering of its weights in which an error counts by the
    weight's sensitivity ``h``: they make ``sum h (w - q)^2`` small (`qcompiler.passes.solvers.kmeans`). From
    there, codes and tables are improved in turn by the error of the layer's output on the calibration inputs
    (`qcompiler.passes.solvers.codebook_descent`).

    | sensitivity | ``h`` of a weight | calibrated by |
    |---|---|---|
    | ``fisher`` | its diagonal entry of the Fisher information of the loss | `Fisher`, which is implied |
    | ``gram`` | ``sum x^2`` of the input it multiplies, the same for every row | the sweep |

    On a Llama of 7 M parameters, three bits, ``gram`` came out ahead by 2 to 4 % of the KL divergence, and it needs no
    backward sweep; without turns ``fisher`` was ahead on one text and behind on another.

    Sites are taken in true sequence where they are calibrated, as by `GPTQ`. Those whose scheme is a grid of even steps
    are rounded to nearest with the least squared error (``RTN(search="mse")``).

    Attributes:
        bits: shorthand for an `Assign` of ``w<bits>a16-lut`` ahead of this pass; None: schemes are assigned already.
        sparse_fraction: the part of all weights that is kept apart, in [0, 0.1]: most of them those farthest out in
            their row, the others those an error of which costs most. They do not count in the clustering, and what the
            table misses of them is stored in compressed rows, in the dtype of the table.
        sensitivity: see above.
        rounds: turns of codes and tables by the error of the output; 0: none, the method of the paper.
        damping: added to the Gram diagonal in these turns, as a fraction of its mean.
        correction: how far they also make good what quantizing the layers before changed in the input, from 0 to 1.
            Above 0 the calibration batches also run through the original weights, which doubles the time of the sweep.

    Error: without turns, that of each weight is at most half the gap between the table's values around it, or the
    distance beyond the outermost; of those kept apart a rounding of that in the table's dtype.

    Raises:
        RecipeError: for options out of range.

    Source: arXiv 2306.07629, sections 4.1 and 4.2. Differs: the turns; cuts between clusters by dynamic programming
    instead of random starts; the sparse matrix holds the difference from the table instead of the weight, so that
    nothing need be subtracted; outliers are found per output channel.
    """

    bits: int | None = None
    sparse_fraction: Annotated[float, Within(0, 0.1)] = 0.0045
    sensitivity: Sensitivity = "gram"
    rounds: Annotated[int, Within(0)] = 4
    damping: Annotated[float, Within(0, 1, above=True)] = 0.05
    correction: Annotated[float, Within(0, 1)] = 0.5

    makes_codebooks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in (2, 3, 4):
            raise RecipeError(
                "a codebook has two to four bits", where="SqueezeLLM", got=self.bits, expected="2, 3 or 4"
            )

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """The Fisher information where errors are weighed by it."""
        return frozenset({CANONICAL, SCHEMES}) | ({FISHER} if self.sensitivity == "fisher" else frozenset())

    @property
    def is_calibrated(self) -> bool:
        """Whether the sweep gathers second moments; the Fisher information is `Fisher`'s affair."""
        return self.sensitivity == "gram" or self.rounds > 0

    def kinds(self, spec: QuantSpec) -> tuple[type[Gram] | type[CrossGram], ...]:
        """Second moments of the inputs of layers that get a codebook, as far as they are needed."""
        if not self.is_calibrated or not spec.codebook:
            return ()
        return (Gram, CrossGram) if self.rounds and self.correction else (Gram,)

    def implied_passes(self) -> tuple[Pass, ...]:
        """An `Assign` where ``bits`` is given, and `Fisher` where it is needed."""
        assign = () if self.bits is None else (Assign(f"w{self.bits}a16-lut"),)
        return (*assign, Fisher()) if self.sensitivity == "fisher" else assign

    def quantize_together(self, layers: SharedInput) -> list[Solution]:
        """Tables for schemes that want them; the others are rounded to nearest."""
        if layers.spec.codebook:
            return [
                self._squeeze(site, weight, layers) for site, weight in zip(layers.sites, layers.weights, strict=True)
            ]
        nearest = RTN(search="mse")
        rounded = [nearest.quantize(weight, None, layers.spec, layers.scale_dtype) for weight in layers.weights]
        return [Solution(quantized, {"codebook": False}) for quantized in rounded]

    def quantize_unreached(self, layers: SharedInput) -> list[Solution]:
        """Tables without anything known of the input."""
        return self.quantize_together(layers)

    def _squeeze(self, site: Site, weight: Tensor, layers: SharedInput) -> Solution:
        details: dict[str, Any] = {"sensitivity": self.sensitivity}
        if self.sensitivity == "fisher":
            sensitivity = layers.context.graph.fisher.read(site.name).to(weight.device)
        else:
            sensitivity = weight.new_zeros(1, site.in_features)
            if layers.gram is not None:
                sensitivity = layers.gram.diagonal()[None]
        if not bool(sensitivity.any()):
            details["fallback"] = "all weights count alike: the loss minds none of them"
        moments = None
        if layers.gram is not None and self.rounds:
            moments = Moments(layers.gram, layers.cross, self.damping, self.correction)
        quantized = squeeze(
            weight,
            sensitivity,
            layers.spec,
            layers.scale_dtype,
            self.sparse_fraction,
            moments,
            self.rounds,
            where=site.name,
        )
        nearest = even_steps(weight, layers.spec, layers.scale_dtype)
        details |= {
            "weighted_error": _ratio(weight - quantized.dequantize(), weight, sensitivity),
            "rtn_weighted_error": _ratio(weight - nearest, weight, sensitivity),
            "sparse_values": 0 if quantized.sparse is None else len(quantized.sparse.values),
        }
        return Solution(quantized, details)


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's input.

    Attributes:
        gram: float32 ``[in, in]``, second moments.
        cross: of the input in the original model with this one; None where nothing is to be made good.
        damping, correction: as in `SqueezeLLM`.
    """

    gram: Tensor
    cross: Tensor | None = None
    damping: float = 0.05
    correction: float = 0.0


def squeeze(
    weight: Tensor,
    sensitivity: Tensor,
    spec: QuantSpec,
    table_dtype: torch.dtype,
    sparse_fraction: float = 0.0,
    moments: Moments | None = None,
    rounds: int = 0,
    *,
    where: str = "",
) -> Codebook:
    """A weight as tables of values and a sparse matrix.

    Args:
        weight: float32 ``[out, in]``.
        sensitivity: float ``[out or 1, in]``, not negative: what a squared error of each weight costs.
        spec: a format with a codebook.
        table_dtype: the dtype of tables and sparse values. Tables are rounded to it before codes are made.
        sparse_fraction: the part of all weights that is kept apart.
        moments: of the input, where codes and tables are to be improved by the error of the output.
        rounds: turns of that.
        where: the site, for messages.

    Raises:
        CalibrationError: if statistics do not fit the weight, are negative, or not finite.
    """
    rows, columns = weight.shape
    _check(sensitivity, [(rows, columns), (1, columns)], where)
    if bool((sensitivity < 0).any()):
        raise CalibrationError("a sensitivity is negative", where=where, got=float(sensitivity.min()))
    apart = _kept_apart(weight, sensitivity, round(sparse_fraction * weight.numel()))
    mean = sensitivity.mean(-1, keepdim=True)
    counted = torch.where(mean > 0, sensitivity.clamp(min=_FAINTEST * mean), 1.0).expand(rows, columns)
    if apart is not None:
        counted = counted.masked_fill(apart, 0)
    limit = torch.finfo(table_dtype).max
    table = cluster(weight, counted, 1 << spec.bits).clamp_(-limit, limit).to(table_dtype)
    target = weight
    codes = nearest(weight, table.float())
    if moments is not None and rounds and bool(moments.gram.any()):
        for part in (moments.gram, moments.cross):
            if part is not None:
                _check(part, [(columns, columns)], where)
        hessian = damped(moments.gram, moments.damping)
        if moments.cross is not None and moments.correction:
            target = shifted(weight, moments.cross, moments.gram, hessian, moments.correction)
        codes, table = improve(target, codes, table, hessian, apart, rounds)
    if apart is None:
        return Codebook(codes, table, None, spec)
    codes = torch.where(apart, nearest(target, table.float()), codes)
    dense = Codebook(codes, table, None, spec)
    missed = (target - dense.dequantize())[apart].to(table_dtype)  # row by row, columns ascending
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
    offsets[1:] = apart.sum(-1).cumsum(0)
    return replace(dense, sparse=Csr(missed, apart.nonzero()[:, 1].to(torch.int32), offsets))


def _check(statistics: Tensor, shapes: list[tuple[int, int]], where: str) -> None:
    if tuple(statistics.shape) not in shapes:
        raise CalibrationError(
            "calibration statistics do not fit the weight", where=where, got=tuple(statistics.shape), expected=shapes[0]
        )
    if not bool(statistics.isfinite().all()):
        raise CalibrationError(
            "calibration statistics are not finite",
            where=where,
            got="NaN or infinity",
            remedy="look for NaN, infinity or overflow in the activations of the layers before",
        )


def _kept_apart(weight: Tensor, sensitivity: Tensor, count: int) -> Tensor | None:
    """Which weights are kept apart, boolean ``[out, in]``; None where none are."""
    if count == 0:
        return None
    sensitive = round(count * _SENSITIVE_SHARE)
    center = weight.mean(-1, keepdim=True)
    spread = (weight - center).square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    distance = ((weight - center) / spread).abs().flatten()
    apart = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    apart[distance.topk(count - sensitive).indices] = True
    cost = (sensitivity * weight * weight).flatten().masked_fill(apart, -1.0)
    apart[cost.topk(sensitive).indices] = True
    return apart.reshape(weight.shape)


def _ratio(error: Tensor, weight: Tensor, sensitivity: Tensor) -> float:
    """``sum h e^2 / sum h w^2``, all counting alike where nothing counts."""
    counted = sensitivity if bool(sensitivity.any()) else torch.ones_like(sensitivity)
    energy = float((counted * weight * weight).sum(dtype=torch.float64)) or 1.0
    return float((counted * error * error).sum(dtype=torch.float64)) / energy
