from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from qcompiler.errors import RecipeError
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes import Assign
from qcompiler.protocol.pass_base import PassContext, PassResult, Skip
from qcompiler.protocol.target import Lowered, Support, Target
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import Maker, chain, language_model, other

LOGITS = Port("logits", "logits", "float32", ("batch", 8))


def assign(graph: Graph, *arguments: Any, **options: Any) -> PassResult:
    return Assign(*arguments, **options).run(graph, PassContext(graph, torch.device("cpu"), 0))


def test_every_site_but_the_output_projection():
    graph = language_model()
    result = assign(graph, "w4a16-g8")
    assert not result.modified
    assert result.skips == (
        Skip("head", "assign", "output projection, left in float; name it in an override to quantize it", asked=True),
    )
    sites = [site.name for site in graph.sites()]
    assert list(graph.schemes) == sites
    assert {graph.schemes[name] for name in sites[:-1]} == {Scheme.parse("w4a16-g8")}
    assert graph.schemes["head"] == Scheme()


def test_options_reach_the_spec():
    graph = language_model()
    assign(graph, "w3a16", group_size=4, symmetric=False, scale_dtype="float16")
    assert graph.schemes["0.q"].weight == QuantSpec("int3", "per_group", 4, False, "float16")


def test_the_last_match_wins():
    graph = language_model()
    result = assign(
        graph, "w4a16", overrides={"1.*": "w8a16", "*.down": "w3a16", "1.d*": "w2a16", "0.[qk]": None, "0.q": "w8a16"}
    )
    found = {name: None if s.weight is None else s.weight.dtype for name, s in graph.schemes.items()}
    assert found == {
        "0.q": "int8",
        "0.k": None,
        **dict.fromkeys(("0.v", "0.o", "0.gate", "0.up"), "int4"),
        "0.down": "int3",
        **dict.fromkeys(("1.q", "1.k", "1.v", "1.o", "1.gate", "1.up"), "int8"),
        "1.down": "int2",
        "head": None,
    }
    assert Skip("0.k", "assign", "left in float by override '0.[qk]'", asked=True) in result.skips
    assert len(result.skips) == 2


def test_the_output_projection_by_name():
    graph = language_model()
    result = assign(graph, "w4a16", overrides={"head": "w8a16"})
    assert graph.schemes["head"] == Scheme.parse("w8a16")
    assert result.skips == ()


def test_everything_in_float():
    graph = language_model()
    result = assign(graph, None, overrides={"0.q": "w8a16"})
    assert [name for name, scheme in graph.schemes.items() if scheme.weight] == ["0.q"]
    assert Skip("0.k", "assign", "no scheme is assigned", asked=True) in result.skips


def test_unmatched_overrides_are_all_named():
    graph = language_model()
    with pytest.raises(RecipeError, match="matches no site") as caught:
        assign(graph, overrides={"0.Q": None, "*.q": None, "2.*": "w8a16"})
    assert caught.value.got == "0.Q, 2.*"
    assert "0.q, 0.k, 0.v" in str(caught.value)


def test_an_override_that_another_one_hides_is_matched():
    graph = language_model()
    assign(graph, overrides={"0.q": None, "*": "w8a16"})
    assert graph.schemes["0.q"] == Scheme.parse("w8a16")


@pytest.mark.parametrize("options", [{"scheme": "w5a16"}, {"overrides": {"*": "w4"}}, {"group_size": 0}])
def test_wrong_schemes_are_refused_at_once(options):
    with pytest.raises(RecipeError):
        Assign(**options)


def test_overrides_are_the_pass_s_own():
    given = {"head": "w8a16"}
    item = Assign(overrides=given)
    given["head"] = "w2a16"
    assert item.overrides == {"head": "w8a16"}


def test_a_model_without_logits_has_no_output_projection():
    graph = chain()
    assert assign(graph, "w4a16").skips == ()


def test_two_output_projections_and_a_side_branch():
    make = Maker()
    x = make.fx.placeholder("x")
    body = make.linear(x, "body", 8, 8)
    side = make.linear(body, "side", 8, 8)
    add = make.call(torch.ops.aten.add.Tensor, make.linear(body, "a", 8, 8), make.linear(body, "b", 8, 8))
    graph = make.graph([other("x", "batch", 8)], {LOGITS: add, other("hidden", "batch", 8): side})
    assign(graph, "w4a16")
    assert [name for name, scheme in graph.schemes.items() if scheme.weight is None] == ["a", "b"]


def test_a_single_layer_is_quantized():
    make = Maker()
    x = make.fx.placeholder("x")
    graph = make.graph([other("x", "batch", 8)], {LOGITS: make.linear(x, "only", 8, 8)})
    assert assign(graph, "w4a16").skips == ()


def test_agreement():
    assert Assign("w4a16", overrides={"head": None}).agrees_with(Assign("w4a16-g128-sym"))
    assert not Assign("w4a16").agrees_with(Assign("w4a16", symmetric=False))
    assert not Assign("w4a16").agrees_with(Assign(None))


def test_what_chooses_among_experts_stays_in_float():
    graph = copy_graph(canonical_graph("mixtral"))
    result = assign(graph, "w4a16-g8")
    choosing = {f"model.layers.{layer}.mlp.gate" for layer in range(2)}
    assert {skip.site for skip in result.skips} == {*choosing, "lm_head"}
    assert all("chooses among experts" in skip.reason for skip in result.skips if skip.site in choosing)
    assign(graph, "w4a16-g8", overrides={"*.gate": "w8a16"})
    assert {graph.schemes[name] for name in choosing} == {Scheme.parse("w8a16", group_size=None)}


@dataclass(frozen=True)
class Divided(Target):
    """Takes groups that divide a layer's input channels, and no codebooks."""

    one: bool = False

    name: ClassVar[str] = "divided"

    @property
    def has_one_group(self) -> bool:
        return self.one

    def supports(self, scheme: Scheme, width: int) -> Support:
        weight = scheme.weight
        is_whole = weight is None or (not weight.codebook and width % (weight.group_size or 1) == 0)
        return Support("runs") if is_whole else Support("refused", "groups divide widths")

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        raise NotImplementedError


def sizes_for(target: Target | None, *arguments: Any, **options: Any) -> tuple[dict[str, int | None], PassResult]:
    """Group sizes by part of the first block, and what was told."""
    graph = language_model(width=96)
    for site in graph.sites():
        for node in site.nodes if site.name == "0.down" else ():
            node.meta["weight_shape"] = (96, 256)
    targets = () if target is None else (target,)
    result = Assign(*arguments, **options).run(graph, PassContext(graph, torch.device("cpu"), 0, targets=targets))
    schemes = {name: graph.schemes[name].weight for name in ("0.q", "0.down")}
    return {name: None if spec is None else spec.group_size for name, spec in schemes.items()}, result


@pytest.mark.parametrize("scheme", ["w4a16", "w3a16-asym", "w4a8-dynamic", "w4a4"])
def test_a_default_group_gives_way_to_what_targets_can_hold(scheme: str):
    found, result = sizes_for(Divided(), scheme)
    assert found == {"0.q": 32, "0.down": 128}
    narrow, wide = result.notes
    assert narrow.startswith("groups of 32 instead of 128, the default, in 12 layers (0.q, 0.k, 0.v, ...): ")
    assert wide.startswith("groups of 64 instead of 128, the default, in 1 layer (1.down): the most that divided can")


def test_a_target_with_one_size_of_groups_gets_one():
    found, result = sizes_for(Divided(one=True), "w4a16")
    assert found == {"0.q": 32, "0.down": 32}
    assert "in 14 layers" in result.notes[0]


@pytest.mark.parametrize(
    ("scheme", "options", "size"),
    [
        ("w4a16-g64", {}, 64),
        ("w4a16", {"group_size": 64}, 64),
        ("w8a16", {"group_size": 64}, 64),
        ("w4a16-lut", {}, None),
        ("mxfp4a16", {}, 32),
        ("fp8-block", {}, 128),
    ],
)
def test_a_group_that_was_asked_for_stays(scheme: str, options: dict[str, Any], size: int | None):
    found, result = sizes_for(Divided(), scheme, **options)
    assert (found["0.q"], result.notes) == (size, ())


def test_without_a_target_that_minds_the_default_stays():
    for target in (None, Custom()):
        found, result = sizes_for(target, "w4a16")
        assert (found, result.notes) == ({"0.q": 128, "0.down": 128}, ())


def test_a_width_that_no_group_divides_is_left_to_the_target():
    graph = language_model(width=12)
    context = PassContext(graph, torch.device("cpu"), 0, targets=(Divided(),))
    assert Assign("w4a16").run(graph, context).notes == ()
    assert graph.schemes["0.q"] == Scheme.parse("w4a16")


@dataclass(frozen=True)
class Custom(Divided):
    """Takes everything."""

    def supports(self, scheme: Scheme, width: int) -> Support:
        return Support("runs")
