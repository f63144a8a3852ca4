"""AWQ: scores are true output errors, the least one wins, outliers are saved, and statistics are gathered once."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qcompiler as qc
from benchmarks.plant import plant
from qcompiler import numerics
from qcompiler.errors import RecipeError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.feeding import feed
from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import AWQ, GPTQ, RTN, Assign
from qcompiler.passes.solvers.scale_regions import InputStatistics
from qcompiler.proofs.regions import find_regions
from qcompiler.protocol.pass_base import (
    Pass,
    PassContext,
    PassResult,
    Tap,
    Wave,
)
from qcompiler.protocol.statistics import Gram
from qcompiler.sweep.streaming import sweep
from qcompiler.testing import check_pass
from tests.families import VOCABULARY
from tests.models import build, canonical_form, canonical_graph, copy_graph, language_inputs, module, run, tolerance
from tests.tiny_graphs import interpret

CPU = torch.device("cpu")


def tokens(rows: int = 6, length: int = 20, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def compiled(graph: Graph, *passes: Pass) -> qc.CompileResult:
    return qc.compile(graph, list(passes), qc.Calibration.from_tokens(tokens()))


def batches_of(graph: Graph) -> list[Any]:
    return [feed(graph, part) for part in tokens().split(2)]


def logits(graph: Graph) -> Tensor:
    ids = tokens(4, 16, seed=8)
    return run(graph, **language_inputs(graph, ids, torch.ones_like(ids)))["logits"]


# --- the score --------------------------------------------------------------------------------------------------------


def pair(scheme: str) -> tuple[Graph, Tensor]:
    """``b(norm(x)) + c(norm(x))``, and rows of ``norm(x)`` with a few large channels."""
    random = torch.Generator().manual_seed(3)
    shapes = {"n": (16,), "b": (12, 16), "c": (12, 16)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}

    def body(m: Any, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (16,), m.n, 1e-6)
        return F.linear(normed, m.b) + F.linear(normed, m.c)

    graph = canonical_form(module(body, **tensors), torch.randn(3, 16, generator=random))
    graph.schemes = {name: Scheme.parse(scheme) for name in ("b", "c")}
    rows = torch.randn(200, 16, generator=random) @ torch.randn(16, 16, generator=random)  # correlated
    rows[:, [2, 9]] *= 25
    return graph, rows


def output_error(graph: Graph, rows: Tensor, scale: Tensor) -> float:
    """``|X W' - X Q'|²`` over both layers, on explicit rows, in float64."""
    total = 0.0
    for site in graph.sites():
        spec = graph.schemes[site.name].weight
        assert spec is not None
        weight = graph.weights.read(site.weight)
        scaled = weight * scale
        rounded = numerics.fake_quantize(scaled, *numerics.min_max_qparams(scaled, spec, torch.float32), spec)
        total += float((rows.double() @ (rounded.double() / scale - weight).T).square().sum())
    return total


def chosen(scheme: str, item: AWQ, dead: int | None = None) -> tuple[Graph, Tensor, Any]:
    graph, rows = pair(scheme)
    if dead is not None:
        for name in ("b", "c"):
            graph.weights.set(name, graph.weights.read(name).index_fill(1, torch.tensor([dead]), 0))
    gram = Gram()
    gram.update(rows)
    (region,) = find_regions(graph).found
    observed = {site.name: InputStatistics(len(rows), gram.result(), None, None) for site in graph.sites()}
    return graph, rows, item.choose(region, list(region.consumers), observed, PassContext(graph, CPU, 0))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w3a16-g16", "w4a16-g8-asym", "w8a16"])
def test_the_score_is_the_error_of_the_output(scheme):
    graph, rows, choice = chosen(scheme, AWQ())
    plain, found = (output_error(graph, rows, scale) for scale in (torch.ones(16), choice.scale))
    assert choice.details["error_ratio"] == pytest.approx(found / plain, rel=1e-3)
    assert choice.details["error_ratio"] < 1


@pytest.mark.parametrize("grid", [2, 7])
@pytest.mark.parametrize("dead", [None, 5], ids=["all alive", "one column of zeros"])
def test_the_best_of_all_candidates_is_taken(grid, dead):
    graph, rows, choice = chosen("w4a16-g8-asym", AWQ(grid=grid), dead)  # symmetric ones round ties at their ends
    activation = rows.square().mean(0).sqrt()
    sizes = torch.stack([graph.weights.read(name).abs().mean(0) for name in ("b", "c")]).amax(0)
    errors = {}
    for step in range(1, grid + 1):
        for weight_exponent in (0.0, 1 - step / grid):
            candidate = activation ** (step / grid) / sizes**weight_exponent
            alive = candidate.isfinite()
            candidate = candidate / (candidate[alive].min() * candidate[alive].max()).sqrt()
            errors[step / grid, weight_exponent] = output_error(graph, rows, torch.where(alive, candidate, 1.0))
    best = min(errors, key=lambda key: errors[key])
    assert choice.details["exponents"] == pytest.approx(best)
    assert output_error(graph, rows, choice.scale) == pytest.approx(errors[best], rel=1e-2)


@pytest.mark.parametrize("grid", [1, 0, -3])
def test_a_grid_that_is_too_small(grid):
    with pytest.raises(RecipeError, match=r"AWQ\.grid"):
        AWQ(grid=grid)


@pytest.mark.parametrize("family", ["phi3", "opt"])
def test_never_worse_than_no_scale(family):
    graph = copy_graph(canonical_graph(family))
    result = compiled(graph, Assign("w4a16-g8"), AWQ(grid=5), RTN())
    ratios = [entry["details"]["error_ratio"] for entry in result.report.regions if "error_ratio" in entry["details"]]
    assert len(ratios) >= 8
    assert max(ratios) <= 1
    assert min(ratios) < 1


# --- whole models -----------------------------------------------------------------------------------------------------


def test_outliers_are_saved():
    graph = copy_graph(canonical_graph("llama"))
    assert len(plant(graph, factor=64.0, channels=2)) == 5
    expected = logits(graph)
    torch.testing.assert_close(expected, logits(canonical_graph("llama")), rtol=0, atol=0)  # powers of two
    errors = {}
    for name, passes in {"rtn": (), "awq": (AWQ(),)}.items():
        copy = copy_graph(graph)
        result = compiled(copy, Assign("w4a16-g16"), *passes, RTN())
        errors[name] = float((logits(result.graph) - expected).square().sum() / expected.square().sum())
    assert errors["awq"] < 0.5 * errors["rtn"]
    folded = {entry["kind"] for entry in result.report.regions if entry["status"] == "folded"}
    assert folded == {"norm", "linear"}
    of_norms = [
        entry for entry in result.report.regions if entry["kind"] == "norm" and entry["consumers"] != ["lm_head"]
    ]
    assert [entry["status"] for entry in of_norms] == ["folded"] * 4


def test_a_region_without_quantized_layers_is_left_alone():
    graph = copy_graph(canonical_graph("llama"))
    names = [f"model.layers.0.self_attn.{name}.weight" for name in ("v_proj", "o_proj")]
    result = compiled(graph, Assign("w4a16-g8", overrides={"*.0.self_attn.*": None}), AWQ(), RTN())
    entries = {entry["name"]: entry for entry in result.report.regions}
    left = entries["model.layers.0.self_attn.v_proj -> model.layers.0.self_attn.o_proj"]
    assert left["status"] == "found"
    assert left["reason"] == "none of its layers is quantized in a way that a scale would help"
    for name in (*names, "model.layers.0.input_layernorm.weight"):
        assert torch.equal(result.graph.weights.read(name), canonical_graph("llama").weights.read(name))
    assert entries["model.layers.0.mlp.up_proj -> model.layers.0.mlp.down_proj"]["status"] == "folded"


def test_scales_keep_the_dtype_of_the_source():
    graph = canonicalize(capture_module(build("llama").bfloat16()))
    result = compiled(graph, Assign("w4a16-g8"), AWQ(grid=3), RTN())
    assert sum(entry["status"] == "folded" for entry in result.report.regions) >= 4
    scales = [name for name in result.graph.weight_names() if name.endswith("_scale")]
    assert len(scales) == 14
    assert {result.graph.weights.info(name).dtype for name in scales} == {"bfloat16"}


@pytest.mark.parametrize("quantizer", [RTN(), GPTQ(correction=0)])
def test_the_contract(quantizer):
    checked = check_pass(
        [Assign("w4a16-g8"), AWQ(grid=4), quantizer], lambda: copy_graph(canonical_graph("llama")), [(tokens(3, 12),)]
    )
    assert any(entry["status"] == "folded" for entry in checked.report.regions)


def test_alone_it_is_exact(tmp_path):
    graph = copy_graph(canonical_graph("phi3"))
    for site in graph.sites():
        graph.schemes[site.name] = Scheme.parse("w4a16-g8")
    report = sweep(graph, [AWQ(grid=4)], [feed(graph, tokens())], PassContext(graph, CPU, 0), work_dir=tmp_path)
    folded = [entry for entry in report.regions if entry["status"] == "folded"]
    assert len(folded) >= 5
    expected, found = logits(canonical_graph("phi3")), logits(graph)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(expected))
    assert not torch.equal(found, expected)


# --- statistics -------------------------------------------------------------------------------------------------------


Given = list[tuple[str, list[str], dict[str, Any]]]


@dataclass(frozen=True)
class SeenAWQ(AWQ):
    """Notes the statistics it is given, by the name of the value."""

    given: Given = field(default_factory=list)

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        self.given.append((self.name, [site.name for site in wave], {t.value.name: s for t, s in statistics.items()}))
        return super().rewrite(wave, statistics, context)


@dataclass(frozen=True)
class SeenGPTQ(GPTQ):
    """The same; matrices as they are at that moment, too."""

    given: Given = field(default_factory=list)

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        found = {t.value.name: (s, s.result()) for t, s in statistics.items()}
        self.given.append((self.name, [site.name for site in wave], found))
        return super().rewrite(wave, statistics, context)


def test_gptq_gets_the_moments_that_awq_gathered(tmp_path, monkeypatch):
    updates: Counter[int] = Counter()
    update = Gram.update

    def counted(self: Gram, batch: Tensor, reference: Tensor | None = None) -> None:
        updates[id(self)] += 1
        update(self, batch, reference)

    monkeypatch.setattr(Gram, "update", counted)
    graph = copy_graph(canonical_graph("llama"))
    plant(graph, channels=2)
    for site in graph.sites():
        graph.schemes[site.name] = Scheme.parse("w4a16-g16")
    given: Given = []
    batches = batches_of(graph)
    passes = [SeenAWQ(given=given), SeenGPTQ(correction=0, given=given)]
    sweep(graph, passes, batches, PassContext(graph, CPU, 0), work_dir=tmp_path)

    (_, _, of_awq), (_, first_sites, of_gptq), (_, second_sites, later) = given[1:4] if not given[0][1] else given[:3]
    assert [name.rsplit(".", 1)[1] for name in first_sites] == ["q_proj", "k_proj", "v_proj"]
    assert [name.rsplit(".", 1)[1] for name in second_sites] == ["o_proj"]
    ((value, (statistic, moment)),) = of_gptq.items()
    assert statistic is of_awq[value]
    assert updates[id(statistic)] == len(batches)
    ((behind, (regathered, _)),) = later.items()
    assert regathered is not of_awq[behind]  # q, k and v are quantized by then

    folded = copy_graph(canonical_graph("llama"))
    plant(folded, channels=2)
    for site in folded.sites():
        folded.schemes[site.name] = Scheme.parse("w4a16-g16")
    sweep(folded, [AWQ()], batches_of(folded), PassContext(folded, CPU, 0), work_dir=tmp_path)
    rows = torch.cat([interpret(folded, batch)[value].flatten(0, -2) for batch in batches_of(folded)]).double()
    expected = rows.T @ rows
    torch.testing.assert_close(moment.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
