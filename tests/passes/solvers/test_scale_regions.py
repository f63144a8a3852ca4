"""What AWQ and SmoothQuant share: which regions they take, what they say of the others, and bad statistics."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qcompiler as qc
from qcompiler.errors import CalibrationError, PipelineError
from qcompiler.ir.graph import Graph
from qcompiler.ir.segments import segment_graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import AWQ, GPTQ, RTN, Assign, InsertQDQ, SmoothQuant
from qcompiler.passes.solvers.scale_regions import ScaleRegions, clamped
from qcompiler.protocol.pass_base import Pass, PassContext, Tap
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.statistics import AbsMax, Gram, RowSample
from tests.families import VOCABULARY
from tests.models import canonical_form, canonical_graph, copy_graph, module

CPU = torch.device("cpu")
BOTH: dict[str, tuple[ScaleRegions, str]] = {
    "awq": (AWQ(), "w4a16-g8"),
    "smooth-quant": (SmoothQuant(), "w8a8"),
    "smooth-quant with alpha": (SmoothQuant(alpha=0.5), "w8a8"),
}
both = pytest.mark.parametrize("kind", BOTH)


def small(**changes: Tensor) -> Graph:
    """``d(h + b(norm(h)) + c(norm(h)))`` with ``h = a(x)``; the first and the last layer change nothing."""
    random = torch.Generator().manual_seed(3)
    shapes = {"n": (8,), "b": (8, 8), "c": (8, 8)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tensors |= {"a": torch.eye(8), "d": torch.eye(8)}

    def body(m: Any, x: Tensor) -> Tensor:
        h = F.linear(x, m.a)
        normed = F.rms_norm(h, (8,), m.n, 1e-6)
        return F.linear(h + F.linear(normed, m.b) + F.linear(normed, m.c), m.d)

    return canonical_form(module(body, **{**tensors, **changes}), torch.randn(3, 8, generator=random))


def passes_of(kind: str, overrides: Mapping[str, str | None] = MappingProxyType({})) -> list[Pass]:
    item, scheme = BOTH[kind]
    rounding: list[Pass] = [] if kind == "awq" else [InsertQDQ()]
    return [Assign(scheme, overrides=overrides), item, *rounding, RTN()]


def compiled(graph: Graph, passes: Sequence[Pass], *batches: Tensor) -> qc.CompileResult:
    return qc.compile(graph, list(passes), [(batch,) for batch in batches])


def regions_of(result: qc.CompileResult) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in result.report.regions}


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scales_are_centred_and_bounded():
    scale = clamped(torch.tensor([1.0, 4.0, 16.0]))
    torch.testing.assert_close(scale, torch.tensor([0.25, 1.0, 4.0]))
    wide = clamped(torch.tensor([1e-20, 1.0, 1e20]))
    torch.testing.assert_close(wide, torch.tensor([2.0**-10, 1.0, 2.0**10]))
    for value in (3e-30, 3e30):  # whose square is no float32
        torch.testing.assert_close(clamped(torch.tensor([value, 4 * value])), torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_channels_without_a_scale_get_one(value):
    torch.testing.assert_close(clamped(torch.tensor([2.0, value, 8.0])), torch.tensor([0.5, 1, 2]))
    assert clamped(torch.full((3,), value)).tolist() == [1, 1, 1]


# --- what is taken, and what is said of the rest ----------------------------------------------------------------------


@both
def test_layers_left_in_float_take_the_fold_along(kind):
    graph = small()
    before = {name: graph.weights.read(name) for name in ("n", "b", "c")}
    x = torch.randn(64, 8) * torch.tensor([1, 1, 30, 1, 1, 1, 1, 1.0])
    result = compiled(graph, passes_of(kind, {"c": None}), x)
    entry = regions_of(result)["n -> b, c"]
    assert entry["status"] == "folded"
    assert entry["consumers"] == ["b", "c"]
    assert entry["channels"] == 8
    factor = before["n"] / result.graph.weights.read("n")
    assert not torch.equal(factor, torch.ones(8))
    torch.testing.assert_close(result.graph.weights.read("c"), before["c"] * factor)


@both
def test_a_region_of_layers_left_in_float_is_left_alone(kind):
    graph = copy_graph(canonical_graph("llama"))
    tokens = torch.randint(1, VOCABULARY, (2, 12))
    result = qc.compile(graph, passes_of(kind), qc.Calibration.from_tokens(tokens))
    entry = regions_of(result)["model.norm -> lm_head"]  # the last layer is left in float unless it is asked for
    assert entry["status"] == "found"
    assert entry["reason"] == "none of its layers is quantized in a way that a scale would help"
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(result.graph.weights.read(name), graph.weights.read(name))


@both
def test_every_producer_that_is_refused_is_named_with_its_reason(kind):
    """Also in a piece of the graph where nothing may be scaled."""
    graph = small()
    graph.schemes = {}
    entries = regions_of(compiled(graph, passes_of(kind), torch.randn(16, 8)))
    added = "it is added to a value that does not take the scale"
    assert {name: entry["reason"].split(" at ")[0] for name, entry in entries.items() if not entry["consumers"]} == {
        "a": "it is read beyond the cut between two segments",
        "b": added,
        "c": added,
        "d": "the graph returns it",
    }
    assert {entry["status"] for entry in entries.values() if not entry["consumers"]} == {"refused"}


@pytest.mark.parametrize("item", [AWQ(), SmoothQuant()])
@pytest.mark.parametrize(
    ("before", "fact"),
    [(RTN(), "float weights"), (GPTQ(), "float weights"), (InsertQDQ(), "float activations")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_behind_a_quantizer_it_is_refused(item, before, fact):
    with pytest.raises(PipelineError) as caught:
        Pipeline([Assign("w8a8"), before, item])
    name, culprit = type(item).__name__, type(before).__name__
    assert f"{name} (position 2) needs '{fact}': {culprit} (position 1)" in str(caught.value)
    assert str(caught.value).count(" needs ") == 1
    Pipeline([Assign("w8a8"), item, before])


def test_without_schemes_it_is_refused():
    with pytest.raises(PipelineError, match=r"AWQ .position 0. needs 'schemes': no pass here establishes it"):
        Pipeline([AWQ()])


# --- bad statistics ---------------------------------------------------------------------------------------------------


@both
def test_activations_that_are_not_finite(kind):
    graph = small()
    graph.weights.set("a", 3e38 * torch.eye(8))
    with pytest.raises(CalibrationError, match=r"an activation is not finite\n  where: b\n"):
        compiled(graph, passes_of(kind), 2 * torch.ones(4, 8))


@both
def test_activations_that_are_zero(kind):
    graph = small(n=torch.zeros(8))
    before = {name: graph.weights.read(name) for name in ("n", "b", "c")}
    result = compiled(graph, passes_of(kind, {"c": None}), torch.randn(16, 8))
    assert "n -> b, c" in regions_of(result)
    for name in ("n", "c"):  # nothing that would be worth a scale
        assert torch.equal(result.graph.weights.read(name), before[name])


@both
def test_channels_that_are_always_zero_leave_the_others_alone(kind):
    """A column of zeros asks for an infinite scale; the others must get theirs all the same."""
    norm = torch.tensor([1, 0, 40, 1, 1, 1, 2, 0.5])  # the second activation is always zero
    weights = [torch.randn(8, 8), torch.randn(8, 8)]
    for weight in weights:
        weight[:, 5] = 0
    graph = small(n=norm, b=weights[0], c=weights[1])
    result = compiled(graph, passes_of(kind), torch.randn(64, 8))
    assert regions_of(result)["n -> b, c"]["status"] == "folded"
    factor = norm / result.graph.weights.read("n")
    others = factor[[0, 2, 3, 4, 6, 7]]
    assert float(others.max() / others.min()) > (1.1 if kind == "awq" else 2)
    assert float(result.graph.weights.read("n")[1]) == 0
    if kind != "awq":  # one of AWQ's candidates does not look at the weight
        assert float(factor[5]) == 1


def statistics_of(graph: Graph, item: ScaleRegions, rows: Tensor) -> tuple[Any, Any]:
    (segment, *_) = (s for s in segment_graph(graph).segments if any(site.name == "b" for site in s.sites))
    (wave,) = item.waves(segment, graph)
    statistics = {}
    for tap in item.statistics(wave, graph):
        statistics[tap] = tap.kind()
        statistics[tap].update(rows)
    return (wave, statistics), PassContext(graph, CPU, 0, segment)


@both
def test_layers_that_calibration_never_reached(kind):
    item, scheme = BOTH[kind]
    graph = small()
    graph.schemes = {name: Scheme.parse(scheme) for name in ("b", "c")}
    before = graph.weights.version("n")
    given, context = statistics_of(graph, item, torch.empty(0, 8))
    result = item.rewrite(*given, context)
    (entry, *_) = result.regions
    assert not result.modified
    assert (entry["status"], entry["reason"]) == ("found", "calibration never reached its layers")
    assert graph.weights.version("n") is before


@both
def test_what_became_of_the_statistics(kind):
    """Rescaled as they say, they are what would be gathered from the folded model."""
    item, scheme = BOTH[kind]
    graph = small()
    graph.schemes = {name: Scheme.parse(scheme) for name in ("b", "c")}
    rows = torch.randn(40, 8) * torch.tensor([1, 1, 30, 1, 1, 1, 1, 1.0])
    norm = graph.weights.read("n")
    (wave, statistics), context = statistics_of(graph, item, rows)
    changes: Any = item.rewrite(wave, statistics, context).statistics
    (value,) = wave[0].inputs
    assert set(changes) == {Tap(value, kind) for kind in (Gram, AbsMax, RowSample)}
    for tap, change in changes.items():
        statistic: Any = tap.kind()
        statistic.update(rows)
        statistic.rescale(change.factor)
        expected: Any = tap.kind()
        expected.update(rows / norm * graph.weights.read("n"))
        torch.testing.assert_close(statistic.result(), expected.result(), rtol=1e-4, atol=1e-4)
