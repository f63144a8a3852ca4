"""Which layers are experts, and which choose among them."""

import pytest
import torch

from qcompiler.ir.experts import is_expert, routers
from qcompiler.numerics.scheme import Scheme
from tests.models import canonical_form, module


def moe(self, x):
    scores = torch.relu(x @ self.first.T) @ self.router.T
    weight, experts = scores.softmax(-1).max(-1)
    y = torch.bmm(self.w[experts], x.unsqueeze(-1)).squeeze(-1)
    return (y * weight.unsqueeze(-1)) @ self.last.T


def test_experts_and_routers():
    weights = {"first": torch.randn(5, 4), "router": torch.randn(3, 5), "w": torch.randn(3, 6, 4)}
    graph = canonical_form(module(moe, last=torch.randn(2, 6), **weights), torch.randn(9, 4))
    assert {site.name: is_expert(site) for site in graph.sites()} == {
        "first": False,
        "router": False,
        "w.0": True,
        "w.1": True,
        "w.2": True,
        "last": False,
    }
    assert routers(graph) == {"router"}


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "mxfp4"])
def test_experts_whose_inputs_are_rounded(scheme):
    weights = {"first": torch.randn(5, 4), "router": torch.randn(3, 5), "w": torch.randn(3, 6, 4)}
    graph = canonical_form(module(moe, last=torch.randn(2, 6), **weights), torch.randn(9, 4))
    for site in graph.sites():
        spec = Scheme.parse(scheme).activation
        assert spec is not None
        graph.quantize_input(site.inputs[0], site.nodes, spec, None, None)
    assert [site.name for site in graph.sites() if is_expert(site)] == ["w.0", "w.1", "w.2"]


def test_no_experts():
    graph = canonical_form(module(lambda self, x: x @ self.w, w=torch.randn(4, 4)), torch.randn(3, 4))
    assert routers(graph) == set()
