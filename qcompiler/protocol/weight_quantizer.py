"""`WeightQuantizer`: a pass that quantizes weights, of which only the rounding is left to write."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from qcompiler import numerics
from qcompiler.errors import PipelineError, RecipeError, VerificationError, ZeroCoverageError
from qcompiler.ir import Graph, QuantizedTensor, Segment, Site, has_codes_of_table, is_expert, quantized_value
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol.pass_base import (
    CANONICAL,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Skip,
    Tap,
    Wave,
)
from qcompiler.protocol.solution import SharedInput, Solution, check_solutions, in_parts, round_to_nearest
from qcompiler.protocol.statistics import CrossGram, Gram

__all__ = ["WeightQuantizer", "refuse_codebooks"]


@dataclass(frozen=True)
class WeightQuantizer(Pass):
    """Base of the passes that quantize weights: `quantize` is all that a rounding of one's own must implement.

    Every layer with a scheme for its weight is quantized, in true sequence: the inputs of ``o`` are gathered with
    ``q``, ``k`` and ``v`` quantized already, those of ``down`` with ``gate`` and ``up``. What `quantize` returns is
    checked, put into the graph and reported, with its error and that of round to nearest. An expert that no calibration
    row was sent to is rounded to nearest, and the report says so; any other layer without rows is an error.

    Layers that a target ties together (`Target.ties`) are given as one matrix where their format scales a whole tensor
    by one number: they share that, and each keeps its own codes.

    `quantize_together` may be implemented instead, to solve layers that read one input together, or to see more than
    the weight: sites, the cross moment, the context. ``is_calibrated`` is to be False where no Gram matrix is wanted:
    then all layers of a segment are taken at once.

    Class attributes:
        makes_codebooks: it takes schemes that end in ``-lut``, and returns a `Codebook` for these.
    """

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})
    makes_codebooks: ClassVar[bool] = False

    def quantize(
        self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype
    ) -> QuantizedTensor | Solution:
        """Quantizes one weight.

        Args:
            weight: float32 ``[out, in]``; not to be changed.
            gram: float32 ``[in, in]``, ``X'X`` over the calibration rows of the layer's input; not to be changed. A
                quantizer that is not calibrated is given None.
            spec: the number format.
            scale_dtype: what scales are stored in: they are rounded to it before codes are computed.

        Returns:
            Codes and scales, or tables; a `Solution` where the report is to tell more.
        """
        raise PipelineError(
            "this quantizer implements neither quantize nor quantize_together", where=type(self).__name__
        )

    def quantize_together(self, layers: SharedInput) -> Sequence[QuantizedTensor | Solution]:
        """Quantizes layers that read one input and have one format; in the order of ``layers.weights``.

        Where this is not overridden, ``layers`` holds one layer, and `quantize` is called.
        """
        gram = cast(Tensor, layers.gram)  # None for a quantizer that is not calibrated, which says so itself
        return [self.quantize(weight, gram, layers.spec, layers.scale_dtype) for weight in layers.weights]

    def quantize_unreached(self, layers: SharedInput) -> Sequence[QuantizedTensor | Solution]:
        """Quantizes experts that no calibration row was sent to: rounds them to nearest."""
        return [round_to_nearest(weight, layers.spec, layers.scale_dtype) for weight in layers.weights]

    def refuses(self, spec: QuantSpec) -> str | None:
        """Why layers of a format are to be left in float; None where they are not."""
        return None

    def kinds(self, spec: QuantSpec) -> tuple[type[Gram] | type[CrossGram], ...]:
        """What is gathered at the input of a layer of a format: nothing, a `Gram`, or a `CrossGram` besides."""
        return (Gram,) if self.is_calibrated else ()

    @property
    def works_in_sweep(self) -> bool:
        """Whether it implements `quantize` or `quantize_together`."""
        return self._solves_together or type(self).quantize is not WeightQuantizer.quantize

    @property
    def _solves_together(self) -> bool:
        return type(self).quantize_together is not WeightQuantizer.quantize_together

    def check(self, graph: Graph) -> None:
        """Refuses schemes with a codebook, unless it makes these."""
        if not self.makes_codebooks:
            refuse_codebooks(graph, self)

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """Layers with a scheme; in true sequence where they are calibrated."""
        waves = segment.waves() if self.is_calibrated else [segment.sites]
        waves = [tuple(site for site in wave if _format_of(graph, site) is not None) for wave in waves]
        return [wave for wave in waves if wave]

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """What `kinds` asks for, at every input of every layer that is not refused."""
        formats = [(site, _format_of(graph, site)) for site in wave]
        wanted = [(site, spec) for site, spec in formats if spec is not None and self.refuses(spec) is None]
        return [Tap(value, kind) for site, spec in wanted for value in site.inputs for kind in self.kinds(spec)]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Quantizes the layers of a wave."""
        reports: list[SiteReport] = []
        skips: list[Skip] = []
        moments = _Moments(statistics)
        for sites, spec in self._groups(wave, context):
            reason = self.refuses(spec)
            if reason is None:
                reports += self._quantize(sites, spec, moments, context)
            else:
                skips += [_leave(site, self.name, reason, context.graph) for site in sites]
        return PassResult(modified=bool(reports), sites=tuple(reports), skips=tuple(skips))

    def _groups(self, wave: Wave, context: PassContext) -> Iterator[tuple[tuple[Site, ...], QuantSpec]]:
        """Layers to be solved together: one by one, unless they are tied or `quantize_together` is overridden."""
        together: dict[object, tuple[QuantSpec, list[Site]]] = {}
        for site in wave:
            spec = _format_of(context.graph, site)
            if spec is not None:
                tie = _tie_of(site, spec, context)
                key: object = site.name
                if self._solves_together or tie is not None:
                    key = (site.inputs, spec, context.scale_dtype(site), tie)
                together.setdefault(key, (spec, []))[1].append(site)
        for spec, sites in together.values():
            yield tuple(sites), spec

    def _quantize(
        self, sites: tuple[Site, ...], spec: QuantSpec, moments: "_Moments", context: PassContext
    ) -> list[SiteReport]:
        start = time.perf_counter()
        kinds = self.kinds(spec)
        rows, gram, cross = moments.at(sites[0].inputs, kinds)
        scale_dtype = context.scale_dtype(sites[0])
        weights = tuple(context.weight(site) for site in sites)
        if _tie_of(sites[0], spec, context) is not None and len(sites) > 1:
            weights = (torch.cat(weights),)
        layers = SharedInput(sites, weights, gram, cross, spec, scale_dtype, context)
        before = _versions(layers)
        if kinds and not rows:
            told = _unreached(sites)
            found = self.quantize_unreached(layers)
        else:
            told = {"calibration_rows": rows} if kinds else {}
            found = self.quantize_together(layers)
        if _versions(layers) != before:
            raise VerificationError(
                f"{self.name} changed a weight or a moment that it was given",
                where=sites[0].name,
                expected="both as they were: they are read once more for the report, and by other layers",
                remedy="work on a clone",
            )
        solutions = check_solutions(found, layers, self.name)
        seconds = (time.perf_counter() - start) / len(sites)
        reports = []
        for part in in_parts(layers, solutions):
            reports.append(
                SiteReport(
                    part.site.name,
                    self.name,
                    str(spec),
                    numerics.sqnr_db(part.weight, part.quantized.dequantize()),
                    *part.output_errors,
                    seconds=seconds,
                    details={**part.details, **told},
                )
            )
            context.graph.set_weight(part.site, part.quantized)
        return reports


def _tie_of(site: Site, spec: QuantSpec, context: PassContext) -> int | None:
    """The number of the tie that a layer shares what scales a whole tensor with; None where it shares nothing."""
    numbers = (number for number, tie in enumerate(context.ties) if site.name in tie)
    return next(numbers, None) if spec.scales_the_tensor else None


class _Moments:
    """Statistics over all inputs of a layer; those asked for last are kept, for the next layer that reads the same."""

    def __init__(self, statistics: Mapping[Tap, Any]) -> None:
        self._statistics = statistics
        self._key: object = None
        self._last: tuple[int, Tensor | None, Tensor | None] = (0, None, None)

    def at(
        self, inputs: Sequence[fx.Node], kinds: Sequence[type[Gram] | type[CrossGram]]
    ) -> tuple[int, Tensor | None, Tensor | None]:
        """Calibration rows, Gram matrix and cross moment; 0 and None where there were no rows."""
        if self._key != (inputs, kinds):
            gram, cross = Gram(), CrossGram()
            for value in inputs if kinds else ():
                gram.merge(self._statistics[Tap(value, Gram)])
                if CrossGram in kinds:
                    cross.merge(self._statistics[Tap(value, CrossGram)])
            self._key = (inputs, kinds)
            self._last = (
                gram.rows,
                gram.result() if gram.rows else None,
                cross.result() if gram.rows and CrossGram in kinds else None,
            )
        return self._last


def _versions(layers: SharedInput) -> list[int]:
    """What changes where a tensor is changed in place."""
    given = [tensor for tensor in (*layers.weights, layers.gram, layers.cross) if tensor is not None]
    return [0 if tensor.is_inference() else tensor._version for tensor in given]


def _leave(site: Site, by: str, reason: str, graph: Graph) -> Skip:
    """Leaves a layer in float; an input that is rounded already stays so."""
    is_rounded = all(quantized_value(value) is not None for value in site.inputs)
    graph.schemes[site.name] = Scheme(activation=graph.schemes[site.name].activation if is_rounded else None)
    return Skip(site.name, by, reason)


def _unreached(sites: Sequence[Site]) -> dict[str, Any]:
    """What a report says of experts that no calibration row was sent to.

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


def _format_of(graph: Graph, site: Site) -> QuantSpec | None:
    """What the weight of a layer is to become; None for float, and for codes that it has of an embedding table."""
    spec = graph.schemes[site.name].weight
    return None if spec is None or has_codes_of_table(graph, site) else spec


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
