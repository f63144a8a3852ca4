"""`AWQ`: scales the input channels that activations make important, so that rounding hurts them less."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.ir import Graph, Site
from qcompiler.passes.solvers.scale_regions import (
    Choice,
    InputStatistics,
    ScaleRegions,
    clamped,
)
from qcompiler.proofs import Consumer, Region, consumer_scale, per_channel
from qcompiler.protocol import Gram, PassContext, Statistic, Within, refuse_codebooks

__all__ = ["AWQ"]


@dataclass(frozen=True)
class AWQ(ScaleRegions):
    """Folds a scale per input channel between the weights of a region, chosen by the output error it leads to.

    ``linear(norm(x, w), W)`` becomes ``linear(norm(x, w / s), W diag(s))``: the same function, with the columns that
    carry large activations enlarged ahead of rounding, so that the weight's step is finer there. Candidates are
    ``s = a^r / b^t`` with ``a`` the root mean square of the activation and ``b`` the mean magnitude of the weight, per
    channel, on a grid of exponents; each is scored for the format that will follow, with min-max scales, by

        ``L(s) = Σ tr((Q(W diag(s)) diag(s)^-1 - W) G (...)ᵀ)``

    summed over the region's layers, where ``G`` is the Gram matrix of their input. ``s = 1`` is among the candidates,
    so the score never gets worse.

    Regions are proved on the graph (`qcompiler.proofs`). Layers without a weight scheme take the fold along but do not
    count; a region without any other is left alone.

    Exact; the rounding that follows is the quantizer's. Clipping, the second half of the method, belongs to it, too:
    ``RTN(search="gram")``, or `GPTQ`, which searches its scales itself.

    Attributes:
        grid: how many exponents to try, at least 2.

    Source: arXiv 2306.00978, section 3.2. Differs: the error is computed from the Gram matrix instead of running the
    layers for every candidate; second moments instead of mean magnitudes; with and without the weight's own magnitude.
    """

    grid: Annotated[int, Within(2, 1000)] = 20

    @property
    def kinds(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix."""
        return (Gram,)

    def counts(self, graph: Graph, site: Site) -> bool:
        """Layers whose weight will be quantized."""
        scheme = graph.schemes.get(site.name)
        return scheme is not None and scheme.weight is not None

    def check(self, graph: Graph) -> None:
        """Refuses schemes with a codebook."""
        refuse_codebooks(graph, self)

    def choose(
        self, region: Region, readers: list[Consumer], statistics: Mapping[str, InputStatistics], context: PassContext
    ) -> Choice:
        """The candidate with the least error."""
        weights = [context.weight(reader.site) for reader in readers]
        grams = [_gram(statistics[reader.site.name]) for reader in readers]
        energy = [per_channel(region, r, gram.diagonal(), "mean") for r, gram in zip(readers, grams, strict=True)]
        sizes = [per_channel(region, r, w.abs().mean(0), "mean") for r, w in zip(readers, weights, strict=True)]
        activation = torch.stack(energy).amax(0).sqrt()
        size = torch.stack(sizes).amax(0)

        def error(scale: Tensor) -> float:
            total = 0.0
            for reader, weight, gram in zip(readers, weights, grams, strict=True):
                spec = context.graph.schemes[reader.site.name].weight
                assert spec is not None
                columns = consumer_scale(region, reader, scale).to(weight.device)
                scaled = weight * columns
                qparams = numerics.min_max_qparams(scaled, spec, context.scale_dtype(reader.site))
                wrong = numerics.fake_quantize(scaled, *qparams, spec).div_(columns).sub_(weight)
                total += numerics.gram_error(wrong, gram)
            return total

        plain = least = error(torch.ones(region.size))
        best: Tensor | None = None
        chosen: tuple[float, float] | None = None
        for step in range(1, self.grid + 1):
            exponent = step / self.grid
            for weight_exponent in (0.0, 1 - exponent):
                scale = clamped(activation**exponent / size**weight_exponent)
                found = error(scale)
                if found < least:
                    best, least, chosen = scale, found, (exponent, weight_exponent)
        details = {"exponents": chosen, "error_ratio": least / plain if plain else 1.0}
        return Choice(best, "no candidate lowers the error" if best is None else "", details)


def _gram(statistics: InputStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram
