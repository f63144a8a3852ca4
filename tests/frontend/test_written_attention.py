"""Attention that a model writes out, in the forms found in the wild; what only looks like it stays, with its reason."""

import math

import pytest
import torch

from qcompiler.ir.graph import is_op
from tests.models import canonical_form, module, operators, reasons

canonical = torch.ops.qcompiler
LOWEST = torch.finfo(torch.float32).min


def scores(x):
    return x @ x.transpose(-1, -2)


def slopes(x):
    distance = torch.arange(5.0) - torch.arange(5.0)[:, None]
    return distance * torch.tensor([1.0, 0.5, 0.25]).reshape(3, 1, 1)


def later():
    return torch.arange(5) > torch.arange(5)[:, None]


def weighed(logits, x):
    return torch.softmax(logits, dim=-1) @ x


def capped(x, cap):
    return cap * torch.tanh(scores(x) / 2 / cap)


FORMS = {
    "plain": (lambda self, x: weighed(scores(x), x), 1.0, None),
    "divided": (lambda self, x: weighed(scores(x) / math.sqrt(16), x), 0.25, None),
    "multiplied twice": (lambda self, x: weighed(2 * (scores(x) * 0.25), x), 0.5, None),
    "by a stored number": (lambda self, x: weighed(scores(x) / self.w, x), 0.5, None),
    "in float32": (lambda self, x: torch.softmax(scores(x), -1, dtype=torch.float32).to(x.dtype) @ x, 1.0, None),
    "capped": (lambda self, x: weighed(capped(x, 3.0), x), 0.5, 3.0),
    "permuted keys": (lambda self, x: weighed(x @ x.permute(0, 1, 3, 2), x), 1.0, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_scales_and_caps(form):
    function, scale, cap = FORMS[form]
    graph = canonical_form(module(function, w=torch.tensor(2.0)), torch.randn(2, 3, 5, 4))
    assert operators(graph) == {"qcompiler.attention": 1}
    (node,) = (node for node in graph.fx.nodes if is_op(node, canonical.attention.default))
    assert node.args[3] is None
    assert node.args[4] == pytest.approx(scale)
    assert node.args[5:] == (False, None, cap)


MASKED = {
    "added": lambda self, x: weighed(scores(x) + torch.where(later(), LOWEST, 0.0), x),
    "filled": lambda self, x: weighed(scores(x).masked_fill(later(), LOWEST), x),
    "chosen": lambda self, x: weighed(torch.where(~later(), scores(x), torch.full((), LOWEST)), x),
    "behind a cap": lambda self, x: weighed(capped(x, 3.0).masked_fill(later(), float("-inf")), x),
    "scaled with the logits": lambda self, x: weighed((scores(x) + torch.where(later(), LOWEST, 0.0)) / 2, x),
    "filled and added": lambda self, x: weighed(
        scores(x).masked_fill(later(), LOWEST) + torch.where(later(), LOWEST, 0.0), x
    ),
    "filled twice": lambda self, x: weighed(
        scores(x).masked_fill(later(), LOWEST).masked_fill(torch.arange(5) > 3, LOWEST), x
    ),
    "slopes and filled": lambda self, x: weighed((scores(x) + slopes(x)).masked_fill(later(), LOWEST), x),
    "slopes and chosen": lambda self, x: weighed(
        torch.where(~later(), scores(x) + slopes(x), torch.full((), LOWEST)), x
    ),
    "slopes, half of them": lambda self, x: weighed((scores(x) + slopes(x)) * 0.5 + torch.where(later(), LOWEST, 0), x),
    "flat heads": lambda self, x: flat_heads(x),
}


def flat_heads(x):
    batch, heads, length, width = x.shape
    flat = x.reshape(batch * heads, length, width)
    bias = slopes(x).expand(batch, heads, 5, 5).reshape(batch * heads, 5, 5)
    logits = torch.baddbmm(bias, flat, flat.transpose(1, 2), beta=1.0, alpha=0.5).view(batch, heads, 5, 5)
    weights = torch.softmax(logits + torch.where(later(), LOWEST, 0.0), dim=-1)
    return torch.bmm(weights.view(batch * heads, 5, 5), flat).view(batch, heads, length, width)


@pytest.mark.parametrize("form", MASKED)
def test_masks(form):
    graph = canonical_form(module(MASKED[form]), torch.randn(2, 3, 5, 4))
    found = operators(graph)
    assert found["qcompiler.attention"] == 1
    assert {found[f"aten.{name}"] for name in ("softmax", "matmul", "bmm", "baddbmm")} == {0}


def test_layers_share_a_combined_mask():
    def two_layers(self, x):
        bias = slopes(x)
        x = weighed((scores(x) + bias).masked_fill(later(), LOWEST), x)
        return weighed((scores(x) + bias).masked_fill(later(), LOWEST), x)

    graph = canonical_form(module(two_layers), torch.randn(2, 3, 5, 4))
    masks = {node.args[3] for node in graph.fx.nodes if is_op(node, canonical.attention.default)}
    assert len(masks) == 1
    assert operators(graph)["aten.where"] == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: weighed(scores(x) + scores(x.flip(-1)), x), "a sum of products"),
        (lambda self, x: weighed(scores(x).exp(), x), "other logits"),
        (lambda self, x: weighed(x @ x.flip(-1).reshape(-1, 3, 4, 5), x), "no transpose of the keys"),
        (lambda self, x: weighed(scores(x).masked_fill(later(), -1.0), x), "a large negative number"),
        (lambda self, x: torch.softmax(scores(x), -1)[..., :4] @ x[..., :4, :], "belong to no key"),
        (lambda self, x: weighed(scores(x), x) + torch.softmax(scores(x), -1).sum(-1, keepdim=True), "read elsewhere"),
    ],
)
def test_what_only_looks_like_attention(function, reason):
    graph = canonical_form(module(function), torch.randn(2, 3, 5, 4))
    found = reasons(graph)
    assert [pattern for pattern, _ in found].count("attention") == 1
    assert any(reason in text for _, text in found)
    assert operators(graph)["qcompiler.attention"] == 0


def test_a_softmax_of_something_else_is_not_mentioned():
    graph = canonical_form(module(lambda self, x: torch.softmax(x, -1) * x), torch.randn(2, 3, 5, 4))
    assert graph.unrecognized == []
