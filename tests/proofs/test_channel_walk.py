"""What lets a scale pass, and what stops it, operator by operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.proofs.fold_scales import fold_scale
from qcompiler.proofs.regions import find_regions
from qcompiler.protocol.pass_base import PassContext
from tests.models import canonical_form, canonical_graph, copy_graph, module, run
from tests.proofs.test_regions import ATTENTION, LAYERS, RETURNED, ROWS, SQUARE, TABLE, check_alike, scale_of

# --- what commutes, and what does not ---------------------------------------------------------------------------------

WEIGHTS: dict[str, tuple[int, ...]] = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "n": (8,), "v": (8,)}
Body = Callable[[Any, Tensor], Tensor]


def captured(body: Body, *shape: int) -> Graph:
    """The canonical graph of a function of its weights and one input, whose first axis varies."""
    random = torch.Generator().manual_seed(11)
    parameters = {name: torch.randn(sizes, generator=random) for name, sizes in WEIGHTS.items()}
    return canonical_form(module(body, **parameters), torch.randn(shape, generator=random))


def check_kept(graph: Graph, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    expected = run(graph, input_0=x)
    for region in find_regions(graph).found:
        folded = copy_graph(graph)
        fold_scale(folded, region, scale_of(region))
        for name, value in run(folded, input_0=x).items():
            check_alike(value, expected[name], region.name)


def rms(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (8,), m.n, 1e-6)


def roll(y: Tensor) -> Tensor:
    return torch.cat([y[..., -4:], y[..., :-4]], -1)


def attend(q: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], q[:, None], v[:, None])[:, 0]


COMMUTING: dict[str, tuple[Body, tuple[int, ...], dict[str, int]]] = {
    "relu": (lambda m, x: F.linear(F.relu(F.linear(x, m.a)), m.b), ROWS, {"a -> b": 8}),
    "relu in place": (lambda m, x: F.linear(F.linear(x, m.a).relu_(), m.b), ROWS, {"a -> b": 8}),
    "neg and wider": (lambda m, x: F.linear((-F.linear(x, m.a)).double().float(), m.b), ROWS, {"a -> b": 8}),
    "biases": (lambda m, x: F.linear(F.linear(x, m.a, m.n), m.b, m.v), ROWS, {"a -> b": 8}),
    "gates": (
        lambda m, x: F.linear(F.relu(F.linear(x, m.a)) * F.linear(x, m.c), m.b),
        ROWS,
        {"a -> b": 8, "c -> b": 8},
    ),
    "mask": (lambda m, x: F.linear(F.linear(x, m.a) * (x > 0) / 3, m.b), ROWS, {"a -> b": 8}),
    "two producers": (lambda m, x: F.linear(F.linear(x, m.a) + F.linear(x, m.c), m.b), ROWS, {"a, c -> b": 8}),
    "norm and layer": (lambda m, x: F.linear(rms(m, x) + F.linear(x, m.c), m.b), ROWS, {"n, c -> b": 8}),
    "twice the same": (lambda m, x: F.linear((lambda y: y + y)(F.linear(x, m.a)), m.b), ROWS, {"a -> b": 8}),
    "one scale for all": (
        lambda m, x: F.linear(F.linear(x, m.a) + F.linear(x, m.c).transpose(1, 2), m.b),
        SQUARE,
        {"c, a -> b": 1},
    ),
    "one channel": (lambda m, x: F.linear(F.linear(x, m.a)[:, :1].expand(-1, 8), m.b), ROWS, {"a -> b": 1}),
    "rolled": (lambda m, x: F.linear(roll(F.linear(x, m.a)), m.b), ROWS, {"a -> b": 8}),
    "every other": (
        lambda m, x: F.linear(torch.cat([F.linear(x, m.a)[:, ::2]] * 2, -1), m.b),
        ROWS,
        {"a -> b": 4},
    ),
    "joined along rows": (
        lambda m, x: F.linear(torch.cat([F.linear(x, m.a), F.linear(x, m.a) * x], 1)[:, 2:6], m.b),
        TABLE,
        {"a -> b": 8},
    ),
    "the second of two tables": (
        lambda m, x: (lambda y: F.linear(torch.cat([y, roll(y)], 1)[:, 4:], m.b))(F.linear(x, m.a)),
        TABLE,
        {"a -> b": 8},
    ),
    "interleaved heads": (
        lambda m, x: F.linear(F.linear(x, m.a).reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8), m.b),
        ROWS,
        {"a -> b": 8},
    ),
    "flattened": (lambda m, x: F.linear(F.linear(x, m.a).reshape(-1, 8).reshape(-1, 4, 8), m.b), TABLE, {"a -> b": 8}),
    "merged and parted": (
        lambda m, x: F.linear(F.linear(x, m.a).reshape(-1, 32).reshape(-1, 4, 8), m.b),
        TABLE,
        {"a -> b": 8},
    ),
    "an axis that is not squeezed": (
        lambda m, x: F.linear(torch.ops.aten.squeeze.dim(F.linear(x, m.a), 1)[:, 2], m.b),
        TABLE,
        {"a -> b": 8},
    ),
    "a row": (lambda m, x: F.linear(F.linear(x, m.a)[:, 2], m.b), TABLE, {"a -> b": 8}),
    "half of two": (
        lambda m, x: (lambda p: F.linear(torch.cat([p[1] * p[0].sigmoid(), p[1]], -1), m.b))(
            F.linear(x, m.a).split(4, -1)
        ),
        ROWS,
        {"a -> b": 4},
    ),
    "values": (lambda m, x: F.linear(attend(x, F.linear(x, m.a)), m.b), TABLE, {"a -> b": 8}),
    "values times mask": (lambda m, x: F.linear(attend(x, F.linear(x, m.a) * x), m.b), TABLE, {"a -> b": 8}),
}


@pytest.mark.parametrize("case", COMMUTING)
def test_what_commutes(case: str) -> None:
    body, shape, expected = COMMUTING[case]
    graph = captured(body, *shape)
    assert {region.name: region.size for region in find_regions(graph).found} == expected
    check_kept(graph, shape)


STOPPING: dict[str, tuple[Body, tuple[int, ...], str, str]] = {
    "to integers": (
        lambda m, x: F.linear(F.linear(x, m.a).to(torch.int32).float(), m.b),
        ROWS,
        "a",
        "rounded to int32",
    ),
    "to truth": (lambda m, x: F.linear(F.linear(x, m.a).bool().float(), m.b), ROWS, "a", "rounded to bool"),
    "to half": (lambda m, x: F.linear(F.linear(x, m.a).half().float(), m.b), ROWS, "a", "rounded to float16"),
    "relu6": (lambda m, x: F.linear(F.relu6(F.linear(x, m.a)), m.b), ROWS, "a", "relu6 does not commute"),
    "clamp in place": (lambda m, x: F.linear(F.linear(x, m.a).clamp_(max=1), m.b), ROWS, "a", "clamp does not commute"),
    "alpha": (
        lambda m, x: F.linear(torch.add(F.linear(x, m.a), F.linear(x, m.c), alpha=2), m.b),
        ROWS,
        "a",
        "add.Tensor with alpha does not commute",
    ),
    "a number is added": (lambda m, x: F.linear(F.linear(x, m.a) + 1, m.b), ROWS, "a", "does not take the scale"),
    "the input is added": (lambda m, x: F.linear(rms(m, x) + x, m.b), ROWS, "n", "does not take the scale at input_0"),
    "divisor": (lambda m, x: F.linear(x / F.linear(x, m.a), m.b), ROWS, "a", "it is a divisor"),
    "squared": (lambda m, x: F.linear((lambda y: y * y)(F.linear(x, m.a)), m.b), ROWS, "a", "both factors"),
    "both factors": (lambda m, x: F.linear((lambda y: y * y.relu())(F.linear(x, m.a)), m.b), ROWS, "a", "both factors"),
    "joined with others": (
        lambda m, x: F.linear(torch.cat([F.linear(x, m.a)[:, :4], x[:, :4]], -1), m.b),
        ROWS,
        "a",
        "joined with other values",
    ),
    "joined along an axis that varies": (
        lambda m, x: (lambda y: F.linear(torch.cat([y, roll(y)])[1:2], m.b))(F.linear(x, m.a)),
        ROWS,
        "a",
        "joined with other values",
    ),
    "along rows": (lambda m, x: F.linear(rms(m, x).transpose(1, 2), m.b), SQUARE, "n", "b reads it along another axis"),
    "an outer product": (
        lambda m, x: F.linear(F.linear(x, m.a)[:, :, None] * x[:, None, :], m.b),
        ROWS,
        "a",
        "b reads it along another axis",
    ),
    "reshaped along an axis that varies": (
        lambda m, x: F.linear(torch.reshape(F.linear(x, m.a), (8, -1)).transpose(0, 1), m.b),
        ROWS,
        "a",
        "mixes channels with an axis that varies",
    ),
    "heads become rows": (
        lambda m, x: F.linear(F.linear(x, m.a).reshape(-1, 4).reshape(-1, 8), m.b),
        ROWS,
        "a",
        "mixes channels with an axis that varies",
    ),
    "channels become rows": (
        lambda m, x: F.linear(F.linear(x, m.a).reshape(-1, 8, 4).transpose(1, 2), m.b),
        TABLE,
        "a",
        "b reads it along another axis",
    ),
    "attention over channels": (
        lambda m, x: F.linear(attend(x, F.linear(x, m.a).transpose(1, 2)), m.b),
        SQUARE,
        "a",
        "attention sums over it",
    ),
    "values and keys": (
        lambda m, x: (lambda v: F.linear(F.scaled_dot_product_attention(x[:, None], v, v)[:, 0], m.b))(
            F.linear(x, m.a)[:, None]
        ),
        TABLE,
        "a",
        ATTENTION,
    ),
    "split along rows": (
        lambda m, x: (lambda p: F.linear(p[1] * p[0], m.b))(F.linear(x, m.a).split(2, 1)),
        TABLE,
        "a",
        "a split along an axis that varies",
    ),
    "used twice": (
        lambda m, x: F.linear(F.linear(F.linear(x, m.a), m.a), m.b),
        ROWS,
        "a",
        "a is shared with another use",
    ),
    "read by one used twice": (
        lambda m, x: F.linear(F.linear(rms(m, x), m.a), m.a),
        ROWS,
        "n",
        "the weight of a is shared with another use",
    ),
    "read elsewhere": (
        lambda m, x: F.linear(F.linear(x, m.a, m.v), m.b) * m.v,
        ROWS,
        "a",
        "v is shared with another use",
    ),
    "a bias of two": (
        lambda m, x: F.linear(F.linear(x, m.a, m.v), m.b) + F.linear(x, m.c, m.v),
        ROWS,
        "a",
        "v is shared with another use",
    ),
    "one bias for all": (
        lambda m, x: F.linear(F.linear(x, m.a, m.v[:1]), m.b),
        ROWS,
        "a",
        "v.slice does not have one element or row for each channel",
    ),
    "a norm without a weight": (
        lambda m, x: F.linear(F.layer_norm(x, (8,)), m.b),
        ROWS,
        "layer_norm_default",
        "the norm has no weight to fold a scale into",
    ),
    "nothing reads it": (lambda m, x: F.linear(x, m.a) + 0 * x, ROWS, "a", "does not take the scale"),
}


@pytest.mark.parametrize("case", STOPPING)
def test_what_stops_a_scale(case: str) -> None:
    body, shape, producer, reason = STOPPING[case]
    graph = captured(body, *shape)
    regions = find_regions(graph)
    names = {item.name for region in regions.found for item in region.producers}
    assert producer not in names
    assert reason in next(refusal.reason for refusal in regions.refused if refusal.producer == producer)
    check_kept(graph, shape)


class TwoResults(nn.Module):
    """A norm that a layer reads and that is returned beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x)
        return self.layer(normed), normed


def test_what_is_returned_keeps_its_scale() -> None:
    regions = find_regions(canonicalize(capture_module(TwoResults().eval(), (torch.randn(3, 8),))))
    assert not regions.found
    assert {refusal.producer: refusal.reason for refusal in regions.refused} == {"norm": RETURNED, "layer": RETURNED}


def test_tied_names_count_as_one_tensor() -> None:
    graph = captured(lambda m, x: F.linear(F.linear(x, m.a), m.b) * m.c[0], *ROWS)
    assert [region.name for region in find_regions(graph).found] == ["a -> b"]
    graph.weights.alias("b", "a")
    (first, *_) = find_regions(graph).refused
    assert first.reason == "a is shared with another use"


def test_a_bias_that_is_the_scaled_value() -> None:
    graph = captured(lambda m, x: F.linear(F.linear(x, m.a), m.b), *ROWS)
    first, second = (site.nodes[0] for site in graph.sites())
    with graph.fx.inserting_before(second):
        row = graph.fx.call_function(torch.ops.aten.select.int, (first, 0, 0))
    row.meta.update(dtype=torch.float32, shape=(8,))
    second.args = (first, second.args[1], row)
    (refusal, _) = find_regions(graph).refused
    assert refusal.reason == "b reads it as a weight or a bias"


# --- quantized layers, cuts, caches -----------------------------------------------------------------------------------


def without(graph: Graph, producer: str) -> str:
    """Checks that a producer is in no region any more, and tells why."""
    regions = find_regions(graph)
    assert not any(item.name == producer for region in regions.found for item in region.producers)
    return next(refusal.reason for refusal in regions.refused if refusal.producer == producer)


def test_layers_that_are_quantized_already() -> None:
    graph = copy_graph(canonical_graph("llama"))
    name = "model.layers.0.self_attn.v_proj"
    graph.schemes = {name: Scheme.parse("w8a16")}
    site = next(site for site in graph.sites() if site.name == name)
    RTN().rewrite([site], {}, PassContext(graph, torch.device("cpu"), 0))
    assert without(graph, name) == "its weight is quantized already, or computed"
    assert without(graph, "model.layers.0.input_layernorm") == f"{name} is quantized already"


def test_a_piece_of_a_graph() -> None:
    graph = canonical_graph("llama")
    whole = find_regions(graph)
    consumer = whole.found[0].consumers[-1].site.nodes[0]
    nodes = list(graph.fx.nodes)
    inside = nodes[: nodes.index(consumer)]
    piece = find_regions(graph, inside)
    assert not piece.found
    name = whole.found[0].producers[0].name
    reasons = {refusal.producer: refusal.reason for refusal in piece.refused}
    assert reasons[name] == "it is read beyond the cut between two segments"
    assert [region.name for region in find_regions(graph, [*inside, consumer]).found] == [whole.found[0].name]


def test_a_cache_that_another_layer_gets() -> None:
    graph = copy_graph(canonical_graph("llama"))
    returned = list(graph.outputs)
    names = [port.name for port in graph.signature.outputs]
    one, other = names.index("present.0.value"), names.index("present.1.value")
    returned[one], returned[other] = returned[other], returned[one]
    graph.fx.output_node().args = (tuple(returned),)
    for layer in LAYERS:
        assert (
            without(graph, f"model.layers.{layer}.self_attn.v_proj")
            == "a cache that does not come back as it was returned"
        )


def test_a_cache_that_is_returned_as_something_else_too() -> None:
    graph = copy_graph(canonical_graph("llama"))
    returned = list(graph.outputs)
    names = [port.name for port in graph.signature.outputs]
    returned[names.index("present.0.key")] = returned[names.index("present.0.value")]
    graph.fx.output_node().args = (tuple(returned),)
    assert "a cache that does not come back" in without(graph, "model.layers.0.self_attn.v_proj")


def test_a_cache_that_something_else_reads() -> None:
    graph = copy_graph(canonical_graph("llama"))
    names = [port.name for port in graph.signature.inputs]
    past = graph.inputs[names.index("past_key_values.0.value")]
    with graph.fx.inserting_before(graph.fx.output_node()):
        graph.fx.call_function(torch.ops.aten.neg.default, (past,))
    assert "a cache that does not come back" in without(graph, "model.layers.0.self_attn.v_proj")
