"""Rotary embeddings, cache appends and attention become one node each; what is not quite one stays, with its reason."""

import pytest
import torch
import torch.nn.functional as F

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.ir.graph import is_op
from tests.models import canonical_form, module, operators, raw_graph, reasons

canonical = torch.ops.qcompiler
aten = torch.ops.aten


def calls(graph, target):
    return [node for node in graph.fx.nodes if is_op(node, target)]


# --- rotary -----------------------------------------------------------------------------------------------------------


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def angles(x):
    table = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3, 0.1, 0.03]))
    table = torch.cat((table, table), dim=-1)
    return table.cos(), table.sin()


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * angles(x)[0] + rotate_half(x) * angles(x)[1],
        lambda self, x: angles(x)[1] * rotate_half(x) + angles(x)[0] * x,
        lambda self, x: torch.cat((x[..., :8] * angles(x)[0] + rotate_half(x[..., :8]) * angles(x)[1], x[..., 8:]), -1),
    ],
)
def test_rotary(function):
    graph = canonical_form(module(function), torch.randn(2, 3, 5, 8))
    assert len(calls(graph, canonical.rotary.default)) == 1
    assert calls(graph, aten.neg.default) == []


def rotate_pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def pair_angles():
    table = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat_interleave(2, -1)
    return table.cos(), table.sin()


def test_rotary_of_pairs_side_by_side():
    model = module(lambda self, x: x * pair_angles()[0] + rotate_pairs(x) * pair_angles()[1])
    graph = canonical_form(model, torch.randn(2, 3, 5, 8))
    (node,) = calls(graph, canonical.rotary.default)
    assert node.args[3] is True
    assert calls(graph, aten.stack.default) == []


def turned(first, second):
    cos, sin = (t[..., :4] for t in angles(first))
    return torch.cat((first * cos - second * sin, second * cos + sin * first), dim=-1)


@pytest.mark.parametrize(
    ("function", "joined"),
    [
        (lambda self, x: turned(*x.chunk(2, -1)), 0),
        (lambda self, x: turned(*x.split(4, -1)), 0),
        (lambda self, x: turned(x[..., ::2], x[..., 1::2]), 1),  # pairs side by side in, halves out
    ],
)
def test_rotary_by_halves(function, joined):
    graph = canonical_form(module(function), torch.randn(2, 3, 5, 8))
    (node,) = calls(graph, canonical.rotary.default)
    assert node.args[3] is False
    assert is_op(node.args[0], aten.cat.default) is bool(joined)
    assert operators(graph)["aten.sub"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.cat((x[..., :4] * 2 - x[..., 4:] * 3, x[..., 4:] * 3 + x[..., :4] * 2), -1),
        lambda self, x: x * pair_angles()[0] + rotate_pairs(x.flip(-1)) * pair_angles()[1],
        lambda self, x: (
            x * pair_angles()[0] + torch.stack((x[..., 1::2], -x[..., ::2]), dim=-1).flatten(-2) * pair_angles()[1]
        ),
    ],
)
def test_what_only_looks_like_rotary(function):
    graph = canonical_form(module(function), torch.randn(2, 3, 5, 8))
    assert operators(graph)["qcompiler.rotary"] == 0


def test_what_is_no_rotary():
    other = module(lambda self, x: (x + 1) * angles(x)[0] + rotate_half(x) * angles(x)[1])
    graph = canonical_form(other, torch.randn(2, 3, 5, 8))
    assert reasons(graph) == [("rotary", "the rotated value is not the one multiplied by the cosine")]

    def turned_the_other_way(self, x):
        return x * angles(x)[0] + torch.cat((x[..., 4:], -x[..., :4]), dim=-1) * angles(x)[1]

    graph = canonical_form(module(turned_the_other_way), torch.randn(2, 3, 5, 8))
    assert operators(graph)["qcompiler.rotary"] == 0


# --- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_appended_to():
    graph = raw_graph("llama")
    past = graph.inputs[3]
    cat = next(user for user in past.users if is_op(user, aten.cat.default))
    cat.args = (list(reversed(cat.args[0])), *cat.args[1:])
    canonicalize(graph)
    assert operators(graph)["qcompiler.kv_append"] == 3
    assert reasons(graph) == [("kv-append", "the cache past_key_values.0.key is not appended to")]


def test_a_cache_appended_along_another_axis():
    graph = raw_graph("llama")
    cat = next(user for user in graph.inputs[3].users if is_op(user, aten.cat.default))
    cat.args = (cat.args[0], 3)
    canonicalize(graph)
    assert ("kv-append", "a cache is appended along another axis than the sequence") in reasons(graph)


# --- attention --------------------------------------------------------------------------------------------------------


def qkv(x):
    return x, x.flip(-1), x.roll(1, -1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (None, 0.5, False, None, None)),
        ({"is_causal": True}, (None, 0.5, True, None, None)),
        ({"scale": 0.125}, (None, 0.125, False, None, None)),
    ],
)
def test_attention(options, expected):
    model = module(lambda self, x: F.scaled_dot_product_attention(*qkv(x), **options))
    graph = canonical_form(model, torch.randn(2, 3, 5, 4))
    (node,) = calls(graph, canonical.attention.default)
    assert node.args[3:] == expected
    assert graph.unrecognized == []


@pytest.mark.parametrize("grouped", [True, False])
def test_repeated_heads_go_where_attention_groups(grouped):
    def attend(self, x):
        batch, heads, length, width = x.shape
        q = torch.cat((x, -x), dim=1)
        k = x[:, :, None].expand(batch, heads, 2, length, width)
        k = k.reshape(batch, 2 * heads, length, width) if grouped else torch.cat((x, x), dim=1)
        return F.scaled_dot_product_attention(q, k, k)

    graph = canonical_form(module(attend), torch.randn(2, 3, 5, 4))
    (node,) = calls(graph, canonical.attention.default)
    assert node.args[1].meta["shape"][1] == (3 if grouped else 6)


def test_what_is_no_attention():
    dropout = module(lambda self, x: F.scaled_dot_product_attention(*qkv(x), dropout_p=0.5).mul(0))
    assert reasons(canonical_form(dropout, torch.randn(2, 3, 5, 4))) == [("attention", "attention with dropout")]
    flat = module(lambda self, x: F.scaled_dot_product_attention(*qkv(x)))
    ((_, reason),) = reasons(canonical_form(flat, torch.randn(2, 5, 4)))
    assert "without a batch and a head axis" in reason

    def top_left(self, x):
        return F.scaled_dot_product_attention(x[:, :, 2:], x, x, is_causal=True)

    graph = canonical_form(module(top_left), torch.randn(2, 3, 5, 4))
    ((_, reason),) = reasons(graph)
    assert "counts from the first key" in reason
    other_axis = module(lambda self, x: torch.softmax(x @ x.transpose(-1, -2), -2) @ x)
    ((_, reason),) = reasons(canonical_form(other_axis, torch.randn(2, 3, 5, 4)))
    assert "another axis than the keys" in reason
