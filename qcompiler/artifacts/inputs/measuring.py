"""How far a model's outputs are from those of its original, by a measure that users choose."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompiler.artifacts.inputs.given import GivenInputs
from qcompiler.artifacts.inputs.running import outputs_of
from qcompiler.artifacts.result import CompileResult, load
from qcompiler.errors import ArtifactError, InputError, did_you_mean
from qcompiler.ir import Graph

__all__ = ["InputEvaluation", "Metric", "evaluate_inputs"]

Model = Graph | CompileResult | str | Path
Metric = str | Callable[[Tensor, Tensor], float]
"""A name, or a function of what an output is and what it should be, both float32 or whole numbers, of one batch."""


@dataclass(frozen=True)
class InputEvaluation:
    """What was measured.

    Attributes:
        metric: ``cosine``, ``max``, ``top1``, or the function's name.
        outputs: the metric of each output by name: the mean of batches, each by its samples; of ``max``, the largest.
        batches: that were run.
        bytes: of the model's weights as stored.
        bits_per_weight: stored bits per original parameter.
        seconds: wall-clock time, the original's part included.
    """

    metric: str
    outputs: dict[str, float]
    batches: int
    bytes: int
    bits_per_weight: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields."""
        return asdict(self)


def evaluate_inputs(
    model: Model, against: Model, inputs: str | Path | Iterable[Any], metric: Metric = "cosine"
) -> InputEvaluation:
    """Runs two forms of a model on the same inputs, by the reference arithmetic.

    Args:
        model: what is measured: a graph, what `compile` returned, or the path of a native artifact or an ONNX file.
        against: the original, as one of these.
        inputs: for both, as `qcompiler.artifacts.Calibration.from_inputs` takes them.
        metric: ``cosine``, the similarity of samples in the mean; ``max``, the largest difference, relative to the
            largest value of the original's output; ``top1``, the share of places at which the last axis has its
            largest value at the same index; or a function.

    Raises:
        InputError: for an unknown metric, or an original with other ports.
        CalibrationError: if the inputs do not fit.
        ArtifactError: for outputs that are not finite.
    """
    start = time.perf_counter()
    measure = _measure_of(metric)
    graph, original, given = _graph_of(model), _graph_of(against), GivenInputs.of(inputs)
    names = [port.name for port in graph.signature.outputs]
    theirs = [port.name for port in original.signature.outputs]
    if len(names) != len(theirs):
        raise InputError("the original has other outputs", got=", ".join(theirs), expected=", ".join(names))
    batches = list(given.batches(graph.signature))
    if not batches:
        raise InputError("there are no inputs to evaluate with", expected="at least one batch")
    list(GivenInputs([tuple(batch) for batch in batches]).batches(original.signature))
    values: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for batch, found, expected in zip(batches, outputs_of(graph, batches), outputs_of(original, batches), strict=True):
        for name, output, reference in zip(names, found, expected, strict=True):
            if output.shape != reference.shape:
                raise InputError(
                    "the original gives an output of another shape",
                    where=name,
                    got=list(reference.shape),
                    expected=list(output.shape),
                )
            if not output.isfinite().all():
                raise ArtifactError("an output is not finite", where=name, got="NaN or infinity")
            values[name].append((float(measure(output, reference)), len(batch[0]) if batch[0].dim() else 1))
    return InputEvaluation(
        metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
        {name: max(v for v, _ in found) if metric == "max" else _mean(found) for name, found in values.items()},
        len(batches),
        stored := graph.weights.stored_bytes(graph.weight_names()),
        8 * stored / int(graph.provenance["parameters"]),
        time.perf_counter() - start,
    )


def _graph_of(model: Model) -> Graph:
    if isinstance(model, (str, Path)):
        model = load(model)
    return model.graph if isinstance(model, CompileResult) else model


def _mean(values: Sequence[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _measure_of(metric: Metric) -> Callable[[Tensor, Tensor], float]:
    if not isinstance(metric, str):
        return metric
    known = {"cosine": _cosine, "max": largest_difference, "top1": _top1}
    if metric not in known:
        raise InputError(
            "unknown metric",
            got=metric,
            expected=f"{', '.join(known)}, or a function",
            remedy=did_you_mean(metric, tuple(known)),
        )
    return known[metric]


def _cosine(found: Tensor, expected: Tensor) -> float:
    """In the mean of samples, which the leading axis counts; 1 where both are zero."""
    rows = len(expected) if expected.dim() else 1
    one, other = found.double().reshape(rows, -1), expected.double().reshape(rows, -1)
    both_zero = (one == 0).all(-1) & (other == 0).all(-1)
    return float(torch.where(both_zero, 1.0, torch.cosine_similarity(one, other, dim=-1)).mean())


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest expected value; of whole numbers, the share that differs."""
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return float((found != expected).double().mean())
    largest = float(expected.double().abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / largest


def _top1(found: Tensor, expected: Tensor) -> float:
    return float((found.argmax(-1) == expected.argmax(-1)).double().mean())
