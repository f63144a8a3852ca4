"""`check_pass`: runs passes on a small model and holds them to what they declare; for tests of passes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.artifacts import Calibration
from qcompiler.errors import InputError, VerificationError
from qcompiler.frontend import canonicalize, capture_module
from qcompiler.ir import Graph, Stretch, feed, feed_tensors, is_quantized_weight
from qcompiler.protocol import WEIGHTS_QUANTIZED, Effect, Pass, Pipeline, check_exact
from qcompiler.reporting import CompileReport
from qcompiler.sweep import compile_graph

__all__ = ["CheckedPass", "check_pass"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class CheckedPass:
    """What `check_pass` found.

    Attributes:
        graph: as the passes left it.
        report: of the compilation.
        error: squared error of the first output over all inputs, relative to its square; 0 if nothing changed.
    """

    graph: Graph
    report: CompileReport
    error: float


def check_pass(
    passes: Pass | Sequence[Pass],
    model: nn.Module | Callable[[], Graph],
    inputs: Sequence[tuple[Tensor, ...]],
    *,
    seed: int = 0,
) -> CheckedPass:
    """Compiles a small model twice and checks the contract of the passes.

    What every compilation checks anyway: the passes stand in an order that works, ``modified`` is true where something
    changed and false where nothing did, an analysis changes nothing, an exact pass keeps what each segment computes,
    and every quantized weight is what its scheme says. And besides:

    * where all passes are exact (or analyses), every output of the whole model is kept;
    * the weight quantizers report the sites they quantized, and no others; a pass reports a site once, and not one that
      it says it left alone;
    * outputs are finite;
    * running them again gives the same graph, the same weights, bit for bit, and the same reports.

    Args:
        passes: one pass, or a whole recipe where it needs others before it (``[Assign("w4a16"), Mine()]``).
        model: a module, or a function that makes a graph.
        inputs: one tuple per batch: what the module takes, or ``(ids,)`` for a language model.
        seed: of the passes.

    Raises:
        VerificationError: naming the pass and what it did not keep.
        QCompilerError: whatever the compilation raises.
    """
    if not inputs:
        raise InputError("a pass is checked on inputs", got="none", expected="a list of tuples of tensors")
    recipe = [passes] if isinstance(passes, Pass) else list(passes)
    pipeline = Pipeline(recipe)
    names = ", ".join(item.name for item in pipeline.passes)
    graph = _graph(model, inputs)
    before = _outputs(graph, inputs)
    report = _compile(graph, pipeline, inputs, seed)
    after = _outputs(graph, inputs)
    if not all(value.isfinite().all() for values in after for value in values):
        raise VerificationError("an output is not finite", where=names)
    if all(item.effect is not Effect.APPROXIMATE for item in pipeline.passes):
        width = max((site.in_features for site in graph.sites()), default=1)
        for expected, actual in zip(before, after, strict=True):
            check_exact(expected, actual, width * len(graph.sites()) ** 2 or 1, names)  # roundings of every layer
    _check_reports(graph, pipeline, report)
    again = _graph(model, inputs)
    _check_same(graph, report, again, _compile(again, pipeline, inputs, seed), names)
    return CheckedPass(graph, report, _relative_error(before, after))


def _graph(model: nn.Module | Callable[[], Graph], inputs: Sequence[tuple[Tensor, ...]]) -> Graph:
    if isinstance(model, nn.Module):
        needs_no_example = hasattr(model, "config") and hasattr(model, "can_generate")
        return canonicalize(capture_module(model, None if needs_no_example else inputs[0]))
    return model()


def _compile(graph: Graph, pipeline: Pipeline, inputs: Sequence[tuple[Tensor, ...]], seed: int) -> CompileReport:
    calibration: Any = list(inputs)
    if graph.signature.input("ids") is not None:
        calibration = Calibration.from_tokens([row for (ids,) in inputs for row in ids])
    report = CompileReport()
    compile_graph(graph, pipeline, calibration, report=report, device=_CPU, seed=seed)
    return report


def _outputs(graph: Graph, inputs: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """The values of all outputs, batch by batch."""
    stretch = Stretch(graph.fx.nodes, graph.outputs)
    loaded = stretch.load(graph.weights.read, _CPU)
    is_language_model = graph.signature.input("ids") is not None
    found = []
    for tensors in inputs:
        floats = [t.float() if t.is_floating_point() else t for t in tensors]  # what is stored is computed in float32
        values = feed(graph, tensors[0]) if is_language_model else feed_tensors(graph, floats)
        results = stretch.run(values, loaded, _CPU)
        found.append([results[node] for node in graph.outputs])
    return found


def _relative_error(before: list[list[Tensor]], after: list[list[Tensor]]) -> float:
    expected, actual = (torch.cat([values[0].double().flatten() for values in side]) for side in (before, after))
    return float((expected - actual).square().sum() / expected.square().sum().clamp_min(1e-300))


def _check_reports(graph: Graph, pipeline: Pipeline, report: CompileReport) -> None:
    sites = {site.name: site.nodes[0].args[1] for site in graph.sites()}
    quantizers = {item.name for item in pipeline.passes if WEIGHTS_QUANTIZED in item.establishes}
    reported = Counter((site.method, site.site) for site in report.sites)
    seen = {site for method, site in reported if method in quantizers}
    skipped = {(skip.method, skip.site) for skip in report.skipped}
    problems = [
        *(
            f"{name} was quantized, and no pass reports it"
            for name, weight in sites.items()
            if is_quantized_weight(weight) and name not in seen
        ),
        *(
            f"{name} was not quantized, and a pass reports it"
            for name, weight in sites.items()
            if not is_quantized_weight(weight) and name in seen
        ),
        *(f"{method} reports {name}, which is no site" for method, name in reported if name not in sites),
        *(f"{method} reports {name} {count} times" for (method, name), count in reported.items() if count > 1),
        *(f"{method} reports {name}, and says that it left it alone" for method, name in skipped & set(reported)),
    ]
    if problems:
        raise VerificationError("the reports of the sites are not true", got="; ".join(problems[:4]))


def _check_same(graph: Graph, report: CompileReport, again: Graph, other: CompileReport, names: str) -> None:
    def said(report: CompileReport) -> list[object]:
        fields = [{**vars(site), "seconds": 0} for site in report.sites]
        regions = [{**region, "details": {**region.get("details", {}), "seconds": 0}} for region in report.regions]
        return [str(fields), str(report.skipped), str(regions)]

    differs = [
        name
        for name in graph.weight_names()
        if name not in again.weights or not torch.equal(graph.weights.read(name), again.weights.read(name))
    ]
    if differs or graph.to_dict() != again.to_dict() or said(report) != said(other):
        raise VerificationError(
            "the same passes on the same model gave something else the second time",
            where=names,
            got=", ".join(differs[:4]) or "another graph or report",
            remedy="draw random numbers from context.generator(site) alone, and keep no state in a pass",
        )
