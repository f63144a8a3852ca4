"""SmoothQuant: the paper's formula, the search against a plain one, and which layers have a say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qcompiler as qc
from benchmarks.plant import plant
from qcompiler import numerics
from qcompiler.errors import RecipeError
from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN, Assign, InsertQDQ, SmoothQuant
from qcompiler.passes.solvers.scale_regions import Choice, InputStatistics
from qcompiler.proofs.regions import find_regions
from qcompiler.protocol.pass_base import Pass, PassContext
from qcompiler.protocol.statistics import AbsMax, RowSample
from qcompiler.testing import check_pass
from tests.families import VOCABULARY
from tests.models import canonical_form, canonical_graph, copy_graph, language_inputs, module, run

CPU = torch.device("cpu")
WIDTH = 16


def pair(scheme: str) -> Graph:
    random = torch.Generator().manual_seed(3)
    shapes = {"n": (WIDTH,), "b": (12, WIDTH), "c": (12, WIDTH)}
    tensors = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}

    def body(m: Any, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (WIDTH,), m.n, 1e-6)
        return F.linear(normed, m.b) + F.linear(normed, m.c)

    graph = canonical_form(module(body, **tensors), torch.randn(3, WIDTH, generator=random))
    graph.schemes = {name: Scheme.parse(scheme) for name in ("b", "c")}
    return graph


def some_rows() -> Tensor:
    rows = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(4))
    rows[:, [2, 9]] *= torch.tensor([40.0, 11.0])
    return rows


def choose(graph: Graph, rows: Tensor, item: SmoothQuant) -> Choice:
    (region,) = find_regions(graph).found
    observed = {
        site.name: InputStatistics(len(rows), None, rows.abs().amax(0), None if item.alpha is not None else rows)
        for site in graph.sites()
    }
    return item.choose(region, list(region.consumers), observed, PassContext(graph, CPU, 0))


def formula(graph: Graph, rows: Tensor, alpha: float) -> Tensor:
    """``max|x|^a / max|W|^(1-a)``, over all layers that read ``x``, divided by the geometric mean of its extremes."""
    largest = torch.stack([graph.weights.read(name).abs().amax(0) for name in ("b", "c")]).amax(0)
    scale = rows.abs().amax(0) ** alpha / largest ** (1 - alpha)
    return scale / (scale.min() * scale.max()).sqrt()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula_of_the_paper(scheme, alpha):
    graph, rows = pair(scheme), some_rows()
    choice = choose(graph, rows, SmoothQuant(alpha=alpha))
    torch.testing.assert_close(choice.scale, formula(graph, rows, alpha))
    assert choice.details == {"alpha": alpha}
    if alpha == 1:  # activations end with one range, as far as the layers share it
        smooth = rows.abs().amax(0) / choice.scale
        torch.testing.assert_close(smooth, smooth[0].expand(WIDTH))


def relative_error(graph: Graph, rows: Tensor, scale: Tensor, per_token: bool) -> float:
    """Both layers with weight and input rounded to 8 bits, each row relative to its own output and the mean one."""
    total = 0.0
    for site in graph.sites():
        scheme = graph.schemes[site.name]
        assert scheme.weight is not None
        weight = graph.weights.read(site.weight)
        scaled = weight * scale
        scaled = numerics.fake_quantize(
            scaled, *numerics.min_max_qparams(scaled, scheme.weight, torch.float32), scheme.weight
        )
        x, exact = rows / scale, rows @ weight.T
        tried = []
        for reach in (1.0,) if per_token else (1.0, 0.85, 0.7, 0.55, 0.4):
            limit = x.abs().amax(1, keepdim=True) if per_token else reach * x.abs().max()
            step = limit / 127.5
            tried.append(((x / step).round() * step).clamp(-limit, limit))
        rounded = min(tried, key=lambda r: float((r - x).square().sum()))
        energy = exact.square().sum(1)
        total += float(((rounded @ scaled.T - exact).square().sum(1) / (energy + energy.mean())).sum())
    return total


@pytest.mark.parametrize(("scheme", "per_token"), [("w8a8", False), ("w8a8-dynamic", True)])
def test_the_exponent_with_the_least_error(scheme, per_token):
    graph, rows = pair(scheme), some_rows()
    choice = choose(graph, rows, SmoothQuant())
    grid = [step / 20 for step in range(21)]
    errors = {alpha: relative_error(graph, rows, formula(graph, rows, alpha), per_token) for alpha in grid}
    plain = relative_error(graph, rows, torch.ones(WIDTH), per_token)
    best = min(errors, key=lambda alpha: errors[alpha])
    assert errors[choice.details["alpha"]] == pytest.approx(errors[best], rel=0.02)  # ties are rounded either way
    assert choice.details["expected_error_ratio"] == pytest.approx(errors[best] / plain, rel=0.02)
    assert choice.details["expected_error_ratio"] < 0.5
    torch.testing.assert_close(choice.scale, formula(graph, rows, choice.details["alpha"]))


def test_no_scale_where_none_helps():
    graph = pair("w8a8")
    for name in ("b", "c"):
        graph.weights.set(name, torch.ones(12, WIDTH))
    rows = torch.ones(8, WIDTH)
    choice = choose(graph, rows, SmoothQuant())
    assert choice.scale is None
    assert choice.reason == "no migration lowers the expected error"


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_no_migration_strength(alpha):
    with pytest.raises(RecipeError, match=r"SmoothQuant\.alpha"):
        SmoothQuant(alpha=alpha)


def test_rows_are_gathered_only_to_be_tried_on():
    assert SmoothQuant().kinds == (AbsMax, RowSample)
    assert SmoothQuant(alpha=0.5).kinds == (AbsMax,)


# --- whole models -----------------------------------------------------------------------------------------------------


def tokens(rows: int = 6, length: int = 20, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(graph: Graph) -> Tensor:
    ids = tokens(4, 16, seed=8)
    return run(graph, **language_inputs(graph, ids, torch.ones_like(ids)))["logits"]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_outliers_move_into_the_weights(scheme, alpha):
    graph = copy_graph(canonical_graph("llama"))
    plant(graph, channels=2)
    expected = logits(graph)
    observer = InsertQDQ(observer=None) if scheme == "w8a8-dynamic" else InsertQDQ()
    errors = {}
    for name, passes in {"plain": (), "smooth": (SmoothQuant(alpha=alpha),)}.items():
        copy = copy_graph(graph)
        recipe: list[Pass] = [Assign(scheme), *passes, RTN(), observer]
        copy = qc.compile(copy, recipe, qc.Calibration.from_tokens(tokens())).graph
        errors[name] = float((logits(copy) - expected).square().sum() / expected.square().sum())
    assert errors["smooth"] < 0.5 * errors["plain"]


@pytest.mark.parametrize("scheme", ["fp8", "w8a16"])
def test_layers_whose_input_is_not_rounded_to_integers_do_not_count(scheme):
    graph = copy_graph(canonical_graph("llama"))
    rounding = [InsertQDQ()] if scheme == "fp8" else []
    recipe: list[Pass] = [Assign(scheme), SmoothQuant(alpha=0.5), *rounding, RTN()]
    result = qc.compile(graph, recipe, qc.Calibration.from_tokens(tokens(2, 8)))
    found = [entry for entry in result.report.regions if entry["consumers"]]
    assert len(found) == 9
    assert {(entry["status"], entry["reason"]) for entry in found} == {
        ("found", "none of its layers is quantized in a way that a scale would help")
    }


def test_the_contract():
    checked = check_pass(
        [Assign("w8a8"), SmoothQuant(), InsertQDQ(), RTN()],
        lambda: copy_graph(canonical_graph("opt")),
        [(tokens(3, 12),)],
    )
    assert sum(entry["status"] == "folded" for entry in checked.report.regions) >= 4
