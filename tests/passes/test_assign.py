from typing import Any

import pytest
import torch

from qcompiler.errors import RecipeError
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes import Assign
from qcompiler.protocol.pass_base import PassContext, PassResult, Skip
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
