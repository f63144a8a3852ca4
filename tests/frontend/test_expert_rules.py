"""Products with matrices chosen row by row, or with a stored stack, become one linear layer per expert."""

import pytest
import torch
from torch import nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.ir.graph import is_op
from tests.models import canonical_form, copy_graph, module, operators, reasons, run

canonical = torch.ops.qcompiler
EXPERTS = 3


class Experts(nn.Module):
    """``W[experts] @ x + b[experts]`` with rows sent by their first channel."""

    def __init__(self, *, turned: bool = False, biased: bool = True) -> None:
        super().__init__()
        self.turned, self.biased = turned, biased
        self.w = nn.Parameter(torch.randn(EXPERTS, 4, 6).transpose(1, 2) if turned else torch.randn(EXPERTS, 6, 4))
        self.w.data = self.w.data.transpose(1, 2).contiguous() if turned else self.w.data
        self.b = nn.Parameter(torch.randn(EXPERTS, 6))

    def forward(self, x):
        experts = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        chosen = self.w[experts]
        y = (
            torch.bmm(x.unsqueeze(1), chosen).squeeze(1)
            if self.turned
            else torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)
        )
        return y + self.b[experts] if self.biased else y


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_each_expert_is_a_site(turned, biased):
    graph = canonical_form(Experts(turned=turned, biased=biased), 2 * torch.randn(9, 4))
    sites = graph.sites()
    assert [site.name for site in sites] == ["w.0", "w.1", "w.2"]
    assert {(site.out_features, site.in_features) for site in sites} == {(6, 4)}
    assert [site.bias for site in sites] == ([f"b.{i}" for i in range(EXPERTS)] if biased else [None] * EXPERTS)
    assert operators(graph)["aten.bmm"] == 0
    assert (operators(graph)["qcompiler.take_expert"], operators(graph)["qcompiler.merge_experts"]) == (EXPERTS, 1)
    assert graph.unrecognized == []


def test_an_expert_sees_the_rows_sent_to_it_alone():
    graph = canonical_form(Experts(), torch.randn(9, 4))
    x = torch.tensor([[-1.0, 2, 3, 4], [5.0, 6, 7, 8], [-2.0, 0, 0, 1]])
    taken = {site.name: run_value(graph, site.inputs[0], x) for site in graph.sites()}
    assert torch.equal(taken["w.0"], x[[0, 2]])
    assert taken["w.1"].shape == (0, 4)
    assert torch.equal(taken["w.2"], x[[1]])


def run_value(graph, node, x):
    copy = copy_graph(graph)
    other = next(candidate for candidate in copy.fx.nodes if candidate.name == node.name)
    copy.fx.output_node().args = ((other,),)
    return run(copy, input_0=x)["output_0"]


def test_twice_is_once():
    graph = canonical_form(Experts(), torch.randn(9, 4))
    before = graph.to_dict()
    assert canonicalize(graph).to_dict() == before


def test_a_stack_used_in_two_products_is_taken_apart_once():
    def twice(self, x):
        experts = (x[:, 0] > 0).long()
        y = torch.bmm(self.w[experts], x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(self.w[experts], torch.relu(y).unsqueeze(-1)).squeeze(-1)

    graph = canonical_form(module(twice, w=torch.randn(2, 4, 4)), torch.randn(9, 4))
    assert [(site.name, len(site.nodes)) for site in graph.sites()] == [("w.0", 2), ("w.1", 2)]

    def both_ways(self, x):
        experts = (x[:, 0] > 0).long()
        y = torch.bmm(self.w[experts], x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(torch.relu(y).unsqueeze(1), self.w[experts]).squeeze(1)

    graph = canonical_form(module(both_ways, w=torch.randn(2, 4, 4)), torch.randn(9, 4))
    assert [site.name for site in graph.sites()] == ["w.0", "w.1", "w.0.transposed", "w.1.transposed"]


def test_a_product_with_a_stored_stack():
    model = module(lambda self, x: torch.bmm(x.expand(EXPERTS, *x.shape), self.w), w=torch.randn(EXPERTS, 4, 6))
    graph = canonical_form(model, torch.randn(5, 4))
    assert [site.name for site in graph.sites()] == ["w.0", "w.1", "w.2"]
    assert operators(graph)["aten.bmm"] == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: torch.bmm(self.w[x[:, 0].long()], x.reshape(-1, 4, 1).expand(-1, 4, 2)), "more than one row"),
        (lambda self, x: torch.bmm(self.w[x[:, 0].long()], x.unsqueeze(-1)), "axis of size one"),
    ],
)
def test_what_is_no_product_of_an_expert(function, reason):
    graph = canonical_form(module(function, w=torch.randn(EXPERTS, 6, 4)), torch.rand(9, 4))
    found = dict(reasons(graph))
    assert reason in found["experts"]
    assert not any(is_op(node, canonical.linear.default) for node in graph.fx.nodes)
