"""Decomposed patterns become one node each; where one does not fit, the graph says why and computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.ir.graph import is_op
from tests.models import (
    FAMILIES,
    WINDOW,
    canonical_form,
    canonical_graph,
    copy_graph,
    model_of,
    module,
    operators,
    reasons,
)

canonical = torch.ops.qcompiler
aten = torch.ops.aten

EXPECTED = {
    "llama": {"linear": 15, "rms_norm": 5, "rotary": 4, "kv_append": 4, "attention": 2},
    "mistral": {"linear": 15, "rms_norm": 5, "rotary": 4, "kv_append": 4, "attention": 2},
    "gpt2": {"linear": 9, "layer_norm": 5, "kv_append": 4, "attention": 2},
    "bert": {"linear": 14, "layer_norm": 6, "attention": 2},
}
ELSEWHERE = {  # what may stay beside the canonical operators: embeddings, rotary tables, shapes, activations, residuals
    "llama": {
        "embedding",
        "to",
        "unsqueeze",
        "mul",
        "cat",
        "cos",
        "sin",
        "transpose",
        "reshape",
        "add",
        "silu",
        "sym_size",
    },
    "gpt2": {"embedding", "to", "unsqueeze", "mul", "transpose", "reshape", "add", "pow", "tanh", "split", "sym_size"},
    "bert": {"embedding", "to", "unsqueeze", "transpose", "reshape", "add", "gelu", "slice", "sym_size"},
}
ELSEWHERE["mistral"] = ELSEWHERE["llama"]


def calls(graph, target):
    return [node for node in graph.fx.nodes if is_op(node, target)]


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_of_a_family(family):
    found = operators(canonical_graph(family))
    ours = {name.removeprefix("qcompiler."): count for name, count in found.items() if name.startswith("qcompiler.")}
    assert ours == EXPECTED[family]
    assert {name.removeprefix("aten.") for name in found if name.startswith("aten.")} == ELSEWHERE[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_unrecognized(family):
    assert canonical_graph(family).unrecognized == []


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_its_mask(family):
    graph = canonical_graph(family)
    nodes = calls(graph, canonical.attention.default)
    masks = {node.args[3] for node in nodes}
    assert len(masks) == 1
    (mask,) = masks
    total = "sequence" if family == "bert" else "past_sequence + sequence"
    assert (mask.meta["dtype"], mask.meta["shape"]) == (torch.bool, ("batch", 1, 1, total))
    window = WINDOW if family == "mistral" else None
    assert {node.args[4:] for node in nodes} == {(8**-0.5, family != "bert", window, None)}
    if family != "bert":
        assert all(is_op(key, canonical.kv_append.default) for node in nodes for key in node.args[1:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_twice_is_once(family):
    graph = copy_graph(canonical_graph(family))
    before = graph.to_dict()
    assert canonicalize(graph).to_dict() == before
    assert graph.unrecognized == []


def test_layers_share_what_they_compute_alike():
    (cos,) = calls(canonical_graph("llama"), aten.cos.default)
    (rows,) = cos.users
    assert len(rows.users) == EXPECTED["llama"]["rotary"]


def test_transposed_weights_keep_their_names():
    graph, model = canonical_graph("gpt2"), model_of("gpt2")
    sites = {site.name: site for site in graph.sites()}
    site = sites["transformer.h.1.attn.c_attn"]
    assert (site.out_features, site.in_features, site.bias) == (96, 32, "transformer.h.1.attn.c_attn.bias")
    info = graph.weights.info(site.weight)
    assert (info.shape, info.dtype) == ((96, 32), "float32")
    original = model.transformer.h[1].attn.c_attn.weight
    torch.testing.assert_close(graph.weights.read(site.weight), original.detach().T, rtol=0, atol=0)
    assert all(is_op(reader, canonical.attention.default, aten.reshape.default) is False for reader in site.inputs)
    assert operators(graph)["aten.reshape"] == 2 * 4  # heads apart for q, k, v, and together again


def test_tied_weights_go_by_the_name_of_their_module():
    names = canonical_graph("gpt2").weight_names()
    assert {"transformer.wte.weight", "lm_head.weight"} <= set(names)
    assert canonical_graph("gpt2").weights.tied("lm_head.weight") == ("transformer.wte.weight",)


# --- norms ------------------------------------------------------------------------------------------------------------


def rms_norm(self, x, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.w


def squared_by_mul(self, x):
    return self.w * (torch.rsqrt(1e-5 + (x * x).mean(2, keepdim=True)) * x)


def one_plus_weight(self, x):
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + self.w)


@pytest.mark.parametrize("function", [rms_norm, squared_by_mul, one_plus_weight])
def test_rms_norm(function):
    graph = canonical_form(module(function, w=torch.randn(6)), torch.randn(2, 3, 6))
    assert operators(graph) == {"qcompiler.rms_norm": 1}
    assert calls(graph, canonical.rms_norm.default)[0].args[2] == 1e-5
    assert graph.unrecognized == []


@pytest.mark.parametrize(("eps", "expected"), [(1e-3, 1e-3), (None, torch.finfo(torch.float32).eps)])
def test_torch_s_own_rms_norm(eps, expected):
    graph = canonical_form(nn.RMSNorm(6, eps=eps), torch.randn(2, 6))
    assert operators(graph) == {"qcompiler.rms_norm": 1}
    assert calls(graph, canonical.rms_norm.default)[0].args[2] == expected


def another_axis(self, x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * self.w


def another_power(self, x):
    return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5) * self.w


def another_value(self, x):
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.w


def second_reader(self, x):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * inverse * self.w + inverse


def no_weight(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (x + 2)


def alone(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def read_twice(self, x):
    y = alone(self, x)
    return y * self.w + y


@pytest.mark.parametrize("function", [no_weight, alone, read_twice, lambda self, x: F.rms_norm(x, (6,), eps=1e-5)])
def test_a_norm_without_a_weight_has_one_of_ones(function):
    graph = canonical_form(module(function, w=torch.randn(6)), torch.randn(2, 3, 6))
    (node,) = calls(graph, canonical.rms_norm.default)
    assert torch.equal(graph.weights.read(str(node.args[1].target)), torch.ones(6))
    assert node.args[2] == 1e-5
    assert graph.unrecognized == []


def stored_eps(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.w.abs()) * self.w


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (another_axis, "not over the last axis"),
        (another_power, "not of a square"),
        (another_value, "another value"),
        (second_reader, "2 readers"),
        (stored_eps, "eps is not a number"),
    ],
)
def test_what_is_no_rms_norm(function, reason):
    graph = canonical_form(module(function, w=torch.randn(6)), torch.randn(2, 3, 6))
    ((pattern, found),) = reasons(graph)
    assert pattern == "rms-norm"
    assert reason in found
    assert operators(graph)["qcompiler.rms_norm"] == 0


def centred(self, x):
    x = x - x.mean(-1, keepdim=True)
    return self.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4))


def test_a_layer_norm_written_out():
    graph = canonical_form(module(centred, w=torch.randn(6)), torch.randn(2, 3, 6))
    assert operators(graph) == {"qcompiler.layer_norm": 1}
    (node,) = calls(graph, canonical.layer_norm.default)
    assert node.args[2:] == (None, 1e-4)

    def shifted(self, x):
        x = x - x.mean(1, keepdim=True)
        return self.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-4))

    graph = canonical_form(module(shifted, w=torch.randn(6)), torch.randn(2, 3, 6))
    assert operators(graph)["qcompiler.layer_norm"] == 0


def test_layer_norm():
    graph = canonical_form(nn.LayerNorm(6, eps=1e-3), torch.randn(2, 6))
    assert operators(graph) == {"qcompiler.layer_norm": 1}
    assert calls(graph, canonical.layer_norm.default)[0].args[3] == 1e-3
    graph = canonical_form(nn.LayerNorm(6, elementwise_affine=False), torch.randn(2, 6))
    assert calls(graph, canonical.layer_norm.default)[0].args[1:] == (None, None, 1e-5)
    graph = canonical_form(nn.LayerNorm((3, 6)), torch.randn(2, 3, 6))
    assert reasons(graph) == [("layer-norm", "normalizes over more than the last axis")]


# --- linears ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x @ self.w,
        lambda self, x: torch.addmm(self.b, x, self.w),
        lambda self, x: (x.reshape(-1, 4) @ self.w).reshape(x.shape[0], 6),
    ],
)
def test_products_with_a_stored_matrix(function):
    graph = canonical_form(module(function, w=torch.randn(4, 6), b=torch.randn(6)), torch.randn(3, 4))
    assert operators(graph) == {"qcompiler.linear": 1}
    (site,) = graph.sites()
    assert (site.name, site.out_features, site.in_features) == ("w", 6, 4)
    assert graph.unrecognized == []


@pytest.mark.parametrize(
    "turn", [lambda w: w.T, lambda w: w.t(), lambda w: w.transpose(0, 1), lambda w: w.permute(1, 0)]
)
def test_a_product_with_a_transpose_is_a_linear_of_the_matrix_itself(turn):
    graph = canonical_form(module(lambda self, x: x @ turn(self.w), w=torch.randn(4, 4)), torch.randn(3, 4))
    assert operators(graph) == {"qcompiler.linear": 1}
    (site,) = graph.sites()
    assert site.name == "w"
    assert graph.weights.names() == ["w"]


def test_a_matrix_with_two_products_is_one_site():
    model = module(lambda self, x: (x @ self.w).relu() @ self.w, w=torch.randn(4, 4))
    graph = canonical_form(model, torch.randn(3, 4))
    (site,) = graph.sites()
    assert (site.name, len(site.nodes)) == ("w", 2)


def test_a_matrix_with_another_reader_is_transposed_under_another_name():
    model = module(lambda self, x: x @ self.w + F.embedding(torch.tensor([1]), self.w), w=torch.randn(4, 4))
    graph = canonical_form(model, torch.randn(3, 4))
    (site,) = graph.sites()
    assert site.name == "w.transposed"
    torch.testing.assert_close(graph.weights.read("w"), model.w.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("function", "pattern", "reason"),
    [
        (lambda self, x: torch.addmm(self.b, x, self.w, beta=2), "product-with-weight", "scaled"),
        (lambda self, x: torch.addmm(self.c, x, self.w), "product-with-weight", "bias is not a stored vector"),
        (lambda self, x: self.w.unsqueeze(0) @ x.unsqueeze(-1), "product-with-weight", "right factor"),
        (lambda self, x: F.linear(x, self.w * x.sum()), "linear", "computed at run time"),
        (lambda self, x: F.linear(x, self.w, x[0]), "linear", "bias is computed"),
        (lambda self, x: F.conv1d(x.unsqueeze(1), self.w[:1].unsqueeze(1)), "aten.conv1d.default", "convolutions"),
    ],
)
def test_what_is_no_linear(function, pattern, reason):
    model = module(function, w=torch.randn(4, 4), b=torch.randn(4), c=torch.randn(1, 4))
    graph = canonical_form(model, torch.randn(3, 4))
    assert operators(graph)["qcompiler.linear"] == 0
    ((found, why),) = reasons(graph)
    assert found == pattern
    assert reason in why
