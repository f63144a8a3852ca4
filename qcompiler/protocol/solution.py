"""What a `WeightQuantizer` is given for layers to be solved together, and what it gives back: checked, and measured
against round to nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import VerificationError
from qcompiler.ir import Affine, Codebook, QuantizedTensor, Site
from qcompiler.numerics import QuantSpec
from qcompiler.protocol.pass_base import PassContext

__all__ = [
    "LayerPart",
    "SharedInput",
    "Solution",
    "check_solutions",
    "even_steps",
    "in_parts",
    "output_errors",
    "round_to_nearest",
]


@dataclass(frozen=True)
class SharedInput:
    """Layers that read one input and are to have one number format: what `WeightQuantizer.quantize_together` is given.

    Attributes:
        sites: the layers.
        weights: float32 ``[out_i, in]`` each. Of tied layers (`Target.ties`) whose format scales a whole tensor by one
            number, one for all: their rows one behind the other.
        gram: float32 ``[in, in]``, ``X'X`` over the calibration rows of the input; None where it was not asked for, or
            where no row was sent to an expert.
        cross: float32 ``[in, in]``, ``Y'X`` where ``Y`` is the input in the original model; None as above.
        spec: the number format.
        scale_dtype: what scales, or tables, are stored in.
        context: what a pass is given.
    """

    sites: tuple[Site, ...]
    weights: tuple[Tensor, ...]
    gram: Tensor | None
    cross: Tensor | None
    spec: QuantSpec
    scale_dtype: torch.dtype
    context: PassContext

    @property
    def are_tied(self) -> bool:
        """Whether there is one weight for several layers."""
        return len(self.weights) < len(self.sites)

    @property
    def names(self) -> list[str]:
        """Of the layers that each weight is of."""
        names = [site.name for site in self.sites]
        return [", ".join(names)] if self.are_tied else names


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and what there is to tell about it.

    Attributes:
        quantized: the weight.
        details: for the report, plain JSON values.
        loss: ``tr(E G E')`` where ``E`` is the distance from a target other than the weight; None: from the weight.
        rtn_loss: the same of round to nearest.
    """

    quantized: QuantizedTensor
    details: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    rtn_loss: float | None = None


def check_solutions(found: Sequence[QuantizedTensor | Solution], layers: SharedInput, quantizer: str) -> list[Solution]:
    """What a quantizer returned, held against what was asked for.

    Raises:
        VerificationError: naming quantizer and layer, if codes, scales or tables are not those of the format.
    """
    solutions = [item if isinstance(item, Solution) else Solution(item) for item in found]
    problems = {layers.names[0]: [f"{len(solutions)} weights for {len(layers.weights)} layers"]}
    if len(solutions) == len(layers.weights):
        parts = zip(layers.names, layers.weights, solutions, strict=True)
        problems = {name: _problems(solution.quantized, weight, layers) for name, weight, solution in parts}
    for where, wrong in problems.items():
        if wrong:
            raise VerificationError(
                f"{quantizer} gave something else than the scheme of this layer says",
                where=where,
                got="; ".join(wrong),
                expected=f"{'a Codebook' if layers.spec.codebook else 'an Affine'} for {layers.spec}",
                remedy="make it of the weight, spec and scale_dtype that quantize is given",
            )
    return solutions


def _problems(found: object, weight: Tensor, layers: SharedInput) -> list[str]:
    """What is wrong with a quantized weight, against what was asked for."""
    spec = layers.spec
    if not isinstance(found, Codebook if spec.codebook else Affine):
        return [f"a value of type {type(found).__name__}"]
    assert isinstance(found, (Affine, Codebook))
    shape, problems = (len(weight), weight.shape[1]), []
    if found.spec != spec:
        problems.append(f"spec is {found.spec}")
    if (found.codes.dtype, tuple(found.codes.shape)) != (spec.code_dtype, shape):
        problems.append(_differs("codes", found.codes, spec.code_dtype, shape))
    elif not spec.is_float:
        low, high = (0, (1 << spec.bits) - 1) if spec.codebook else (spec.quant_min, spec.quant_max)
        least, largest = (int(value) for value in found.codes.aminmax())
        if least < low or largest > high:
            problems.append(f"codes from {least} to {largest}, not {low} to {high}")
    if isinstance(found, Codebook):
        table = (shape[0], 1 << spec.bits)
        if (found.table.dtype, tuple(found.table.shape)) != (layers.scale_dtype, table):
            problems.append(_differs("table", found.table, layers.scale_dtype, table))
        return problems
    groups = (1 if spec.granularity == "per_tensor" else shape[0], -(-shape[1] // spec.group_of(shape[1])))
    if found.scale_dtype != layers.scale_dtype:
        problems.append(f"scale_dtype is {found.scale_dtype}, not {layers.scale_dtype}")
    if (found.scale.dtype, tuple(found.scale.shape)) != (torch.float32, groups):
        problems.append(_differs("scale", found.scale, torch.float32, groups))
    if (found.zero_point is None) is not spec.symmetric:
        problems.append("a zero point where the scheme is symmetric, or none where it is not")
    elif found.zero_point is not None and (found.zero_point.dtype, found.zero_point.shape) != (torch.uint8, groups):
        problems.append(_differs("zero_point", found.zero_point, torch.uint8, groups))
    if (found.factor is not None) is not spec.has_factor:
        problems.append("no factor where scales are relative to one, or one where they are not")
    return problems


def _differs(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}"


@dataclass(frozen=True)
class LayerPart:
    """What of a solution is one layer's.

    Attributes:
        site: the layer.
        weight: float32 ``[out, in]``, as it was.
        quantized: the same, quantized.
        details: for the report.
        output_errors: squared error of the output and that of round to nearest, relative to the output's square; None
            without calibration. Of tied layers, that of all of them together.
    """

    site: Site
    weight: Tensor
    quantized: QuantizedTensor
    details: Mapping[str, Any]
    output_errors: tuple[float | None, float | None]


def in_parts(layers: SharedInput, solutions: Sequence[Solution]) -> list[LayerPart]:
    """What each layer gets of solutions that were checked: tied layers get the rows that are their own."""
    pairs = list(zip(layers.weights, solutions, strict=True))
    errors = [output_errors(weight, solution, layers) for weight, solution in pairs]
    if not layers.are_tied:
        return [
            LayerPart(site, weight, solution.quantized, solution.details, error)
            for site, (weight, solution), error in zip(layers.sites, pairs, errors, strict=True)
        ]
    ((weight, solution),), rows = pairs, [site.out_features for site in layers.sites]
    assert isinstance(solution.quantized, Affine)  # a codebook has tables for each row
    parts = zip(layers.sites, weight.split(rows), solution.quantized.split(rows), strict=True)
    details = {**solution.details, "one_scale_with": [site.name for site in layers.sites]}
    return [LayerPart(site, rows_of, quantized, details, errors[0]) for site, rows_of, quantized in parts]


def output_errors(weight: Tensor, solution: Solution, layers: SharedInput) -> tuple[float | None, float | None]:
    """Squared error of the output and that of round to nearest, relative to the output's square."""
    if layers.gram is None:
        return None, None
    loss, rtn_loss = solution.loss, solution.rtn_loss
    if loss is None:
        loss = numerics.gram_error(weight - solution.quantized.dequantize(), layers.gram)
    if rtn_loss is None:
        rtn_loss = numerics.gram_error(weight - even_steps(weight, layers.spec, layers.scale_dtype), layers.gram)
    energy = numerics.gram_error(weight, layers.gram) or 1.0
    return loss / energy, rtn_loss / energy


# --- round to nearest, which every quantizer is measured against ------------------------------------------------------


def _grid(spec: QuantSpec) -> QuantSpec:
    """The format itself; for a codebook, even steps over the range of each row."""
    return QuantSpec(spec.dtype, "per_channel", None, symmetric=False) if spec.codebook else spec


def even_steps(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Tensor:
    """A weight rounded to nearest, with scales that cover the range: float32 ``[out, in]``.

    Args:
        weight: float32 ``[out, in]``.
        spec: the number format; for a codebook, a grid of as many even steps per row is taken.
        scale_dtype: what scales are rounded to.
    """
    grid = _grid(spec)
    return numerics.fake_quantize(weight, *numerics.min_max_qparams(weight, grid, scale_dtype), grid)


def round_to_nearest(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> QuantizedTensor:
    """The same as codes and scales, or as tables of even steps that are rounded to ``scale_dtype`` as well."""
    grid = _grid(spec)
    rounded = Affine.of(weight, *numerics.min_max_qparams(weight, grid, scale_dtype), grid, scale_dtype)
    if not spec.codebook:
        return rounded
    assert rounded.zero_point is not None
    steps = torch.arange(1 << spec.bits, device=weight.device) - rounded.zero_point.float()
    return Codebook(rounded.codes, (steps * rounded.scale).to(scale_dtype), None, spec)
