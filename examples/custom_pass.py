"""A pass of your own in one file: `GreedyRounding`. docs/writing-a-pass.md builds another one, line by line.

``qcompiler compile MODEL --recipe examples/custom_pass.py:RECIPE --to onnx -o OUT``
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler.extend import (
    CANONICAL,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    Affine,
    Effect,
    Gram,
    Graph,
    Pass,
    PassContext,
    PassResult,
    Segment,
    SiteReport,
    Skip,
    Tap,
    Wave,
    numerics,
)
from qcompiler.passes import Assign


@dataclass(frozen=True)
class GreedyRounding(Pass):
    """Rounds to nearest, then goes over the input channels and moves each to its best code, all others being fixed.

    With ``E = W - Q`` and the Gram matrix ``G = X'X`` of the layer's input, ``tr(E G E')`` is the squared error of its
    output. It is a parabola in each code, and least ``(E G)[:, i] / G[i, i]`` away. No step can make it larger, so the
    result is never worse than round to nearest. Scales stay as they are; layers with float codes are left alone.

    Attributes:
        sweeps: how often to go over the channels.
    """

    sweeps: int = 1

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, SCHEMES})
    establishes: ClassVar[frozenset[str]] = frozenset({WEIGHTS_QUANTIZED})

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """In true sequence: ``o`` is calibrated with ``q``, ``k`` and ``v`` rounded already."""
        return list(segment.waves())

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """The Gram matrix of every input of every layer; the same tap asked for twice is gathered once."""
        return [Tap(value, Gram) for site in wave for value in site.inputs]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Rounds the layers of a wave one by one."""
        reports, skips = [], []
        for site in wave:
            spec = context.graph.schemes[site.name].weight
            if spec is None:
                continue
            if spec.is_float:
                skips.append(Skip(site.name, self.name, "float codes are not evenly spaced"))
                continue
            gram = sum(statistics[Tap(value, Gram)].result() for value in site.inputs)
            weight, scale_dtype = context.weight(site), context.scale_dtype(site)
            scale, zero_point = numerics.min_max_qparams(weight, spec, scale_dtype)
            codes = numerics.quantize(weight, scale, zero_point, spec)
            error = weight - numerics.dequantize(codes, scale, zero_point, spec)
            energy, nearest = _loss(weight, gram) or 1.0, _loss(error, gram)
            steps = numerics.expand_groups(scale, site.in_features, spec.group_of(site.in_features))
            for i in [*range(site.in_features)] * self.sweeps:
                if gram[i, i] > 0:
                    wanted = codes[:, i] + error @ gram[:, i] / gram[i, i] / steps[:, i]
                    best = wanted.round().clamp(spec.quant_min, spec.quant_max)
                    error[:, i] -= (best - codes[:, i]) * steps[:, i]
                    codes[:, i] = best.to(codes.dtype)
            quantized = Affine(codes, scale, zero_point, spec, scale_dtype)
            sqnr = numerics.sqnr_db(weight, quantized.dequantize())
            losses = _loss(error, gram) / energy, nearest / energy
            reports.append(SiteReport(site.name, self.name, str(spec), sqnr, *losses))
            context.graph.set_weight(site, quantized)
        return PassResult(modified=bool(reports), sites=tuple(reports), skips=tuple(skips))


def _loss(error: Tensor, gram: Tensor) -> float:
    return ((error @ gram) * error).sum(dtype=torch.float64).item()


RECIPE = (Assign("w4a16"), GreedyRounding())
