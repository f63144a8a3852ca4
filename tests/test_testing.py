"""`check_pass` passes honest passes, and catches each way of being dishonest."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qcompiler.errors import InputError, PipelineError, VerificationError
from qcompiler.ir.graph import Graph, Site
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Skip,
    Wave,
)
from qcompiler.testing import check_pass
from tests.models import build
from tests.tiny_graphs import language_model, residual_mlp

INPUTS = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
ROWS = [(torch.randint(32, (3, 6), generator=torch.Generator().manual_seed(1)),)]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def test_the_pass_that_rounds() -> None:
    checked = check_pass([Assign("w4a16", group_size=8), RTN()], MLP(), INPUTS)
    assert [site.site for site in checked.report.sites] == ["up", "down"]
    assert 1e-4 < checked.error < 0.1
    finer = check_pass(RTN(bits=8), MLP(), INPUTS)
    assert finer.error < checked.error / 50
    assert finer.graph.weights.info("up.weight_codes").dtype == "int8"


def test_a_model_in_bfloat16() -> None:
    inputs = [(x.bfloat16(),) for (x,) in INPUTS]
    assert check_pass(GPTQ(bits=4, group_size=8), MLP().bfloat16(), inputs).error > 0


def test_a_calibrated_pass_and_a_language_model() -> None:
    nearest, moved = (check_pass(item(bits=3, group_size=8), language_model, ROWS) for item in (RTN, GPTQ))
    assert 0 < moved.error < nearest.error
    assert check_pass(RTN(bits=4), build("llama", layers=1), ROWS).error > 0


# --- a pass that is exact, and ones that say what is not so ----------------------------------------------------------


def scale_weight(site: Site, context: PassContext, factor: Tensor | float) -> None:
    context.graph.weights.set(site.weight, context.weight(site) * factor)


@dataclass(frozen=True)
class Balance(Pass):
    """Multiplies ``up`` and divides ``down`` in ``down(relu(gate(x)) * up(x))``: the product passes a factor on."""

    factor: float = 4.0
    inverse: float = 0.25

    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        if len(wave) < 3:  # they lie in two segments
            return PassResult(modified=False)
        _, up, down = wave
        scale_weight(up, context, self.factor)
        scale_weight(down, context, self.inverse)
        return PassResult(modified=True)


def test_an_exact_pass() -> None:
    assert check_pass(Balance(), residual_mlp, INPUTS).error == 0
    assert 0 < check_pass(Balance(3.1, 1 / 3.1), residual_mlp, INPUTS).error < 1e-10
    with pytest.raises(VerificationError, match="exact"):
        check_pass(Balance(4.0, 0.2499), residual_mlp, INPUTS)


@dataclass(frozen=True)
class ExactOnItsSegment(Pass):
    """A whole-graph pass that says it is exact and is not: no segment is there to compare."""

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        scale_weight(graph.sites()[0], context, 1.001)
        return PassResult(modified=True)


def test_an_exact_pass_on_the_whole_graph_is_compared_on_the_whole_model() -> None:
    with pytest.raises(VerificationError, match="exact") as caught:
        check_pass(ExactOnItsSegment(), MLP(), INPUTS)
    assert caught.value.where == "exact-on-its-segment"


@dataclass(frozen=True)
class Lying(RTN):
    """Rounds to nearest, and reports it wrongly."""

    lie: str = ""

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        result = super().rewrite(wave, statistics, context)
        first = result.sites[0]
        if self.lie == "modified":
            return replace(result, modified=False)
        if self.lie == "silent":
            return replace(result, sites=result.sites[1:])
        if self.lie == "twice":
            return replace(result, sites=(*result.sites, first))
        if self.lie == "nowhere":
            return replace(result, sites=(*result.sites, replace(first, site="nowhere")))
        if self.lie == "skipped":
            return replace(result, skips=(Skip(first.site, self.name, "too hard"),))
        if self.lie == "random":
            return replace(result, sites=(replace(first, details={"x": torch.rand(()).item()}), *result.sites[1:]))
        return result


@pytest.mark.parametrize(
    ("lie", "got"),
    [
        ("modified", "modified=False"),
        ("silent", "up was quantized, and no pass reports it"),
        ("twice", "lying reports up 2 times"),
        ("nowhere", "lying reports nowhere, which is no site"),
        ("skipped", "lying reports up, and says that it left it alone"),
        ("random", "another graph or report"),
    ],
)
def test_lies(lie: str, got: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check_pass([Assign("w4a16", group_size=8), Lying(lie=lie)], MLP(), INPUTS)
    assert got in str(caught.value.got)


def test_the_truth_about_lying() -> None:
    check_pass([Assign("w4a16", group_size=8), Lying()], MLP(), INPUTS)


@dataclass(frozen=True)
class Tweak(Pass):
    """Approximate, and quantizes nothing."""

    how: str

    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        site = wave[0]
        noise = torch.rand(()) if self.how == "random" else torch.rand((), generator=context.generator(site))
        if self.how == "huge":
            noise = torch.tensor(1e38)
        scale_weight(site, context, 1 + noise)
        return PassResult(modified=True, sites=(SiteReport(site.name, self.name, "tweaked", 1.0),))


def test_randomness_comes_from_the_seed() -> None:
    first, second = (check_pass(Tweak("seeded"), MLP(), INPUTS, seed=seed).error for seed in (0, 1))
    assert first > 0
    assert first != second
    with pytest.raises(VerificationError, match="second time") as caught:
        check_pass(Tweak("random"), MLP(), INPUTS)
    assert str(caught.value.got).startswith("up.weight")


def test_outputs_stay_finite() -> None:
    with pytest.raises(VerificationError, match="not finite"):
        check_pass(Tweak("huge"), MLP(), [(1e6 * x,) for (x,) in INPUTS])


def test_what_cannot_be_checked() -> None:
    with pytest.raises(InputError, match="checked on inputs"):
        check_pass(RTN(bits=4), MLP(), [])
    with pytest.raises(PipelineError):
        check_pass(RTN(), MLP(), INPUTS)
