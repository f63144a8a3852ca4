"""Masks are recognized by what they compute, and only where that is all there is to them."""

import operator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.frontend.masks import MaskForm, closed_form
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Port,
    Signature,
)
from qcompiler.storage.weights import WeightStore
from tests.models import language_inputs, padding_mask, run

aten = torch.ops.aten
canonical = torch.ops.qcompiler


class Sizes:
    """What a mask function is given: the inputs, and index ranges ``[S, 1]`` and ``[T]``."""

    def __init__(self, ids, mask, positions, past):
        self.ids, self.mask, self.positions, self.past = ids, mask, positions, past
        length = aten.sym_size.int(ids, 1)
        total = operator.add(length, aten.sym_size.int(past, 2)) if past is not None else length
        self.key = aten.arange.default(total)
        self.query = aten.unsqueeze.default(aten.arange.start(total - length, total), 1)
        self.visible = aten.unsqueeze.default(aten.unsqueeze.default(aten.to.dtype(mask, torch.bool), 1), 1)


def graph_of(function, *, cache=True, stored=None):
    """A graph whose one output is the mask a function of `Sizes` computes."""
    total = TOTAL if cache else SEQUENCE
    ports = [
        Port("input_ids", "ids", "int64", (BATCH, SEQUENCE)),
        Port("attention_mask", "mask", "int64", (BATCH, total)),
        Port("position_ids", "positions", "int64", (BATCH, SEQUENCE)),
    ]
    if cache:
        ports.append(Port("past_key_values.0.key", "past", "float32", (BATCH, 2, PAST, 4), 0, "key"))

    def with_cache(ids, mask, positions, past):
        return (function(Sizes(ids, mask, positions, past)),)

    def without_cache(ids, mask, positions):
        return (function(Sizes(ids, mask, positions, None)),)

    nodes = fx.Tracer().trace(with_cache if cache else without_cache)
    for node, port in zip((n for n in nodes.nodes if n.op == "placeholder"), ports, strict=True):
        node.meta.update(dtype=getattr(torch, port.dtype), shape=port.shape)
    store = WeightStore.from_tensors({} if stored is None else {"stored": stored})
    output = Port("mask", "other", "bool", (BATCH, 1, SEQUENCE, total))
    return Graph(nodes, Signature(tuple(ports), (output,)), store)


def form_of(function, **options):
    graph = graph_of(function, **options)
    return closed_form(graph, graph.outputs[0])


def causal(s):
    return aten.le.Tensor(s.key, s.query)


def near(s, window):
    return aten.lt.Scalar(aten.sub.Tensor(s.query, s.key), window)


def both(a, b):
    return aten.logical_and.default(a, b)


def added(allowed):
    return aten.where.ScalarSelf(allowed, 0.0, aten.full.default([], torch.finfo(torch.float32).min))


def as_float(allowed, hidden):
    return aten.masked_fill.Scalar(aten.to.dtype(aten.mul.Tensor(allowed, 0), torch.float32), ~allowed, hidden)


def real_tokens(s):
    return aten.reshape.default(aten.sum.dim_IntList(s.mask, [1]), [-1, 1, 1, 1])


def hidden_tokens(s):
    return aten.reshape.default(aten.sum.dim_IntList(1 - s.mask, [1]), [-1, 1, 1, 1])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (causal, (True, None, False)),
        (lambda s: both(causal(s), s.visible), (True, None, True)),
        (lambda s: both(both(causal(s), near(s, 3)), s.visible), (True, 3, True)),
        (lambda s: both(causal(s), aten.le.Scalar(aten.sub.Tensor(s.query, s.key), 4)), (True, 5, False)),
        (lambda s: both(causal(s), aten.gt.Tensor(s.key, aten.sub.Tensor(s.query, 40))), (True, 40, False)),
        (lambda s: s.visible, (False, None, True)),
        (lambda s: as_float(both(causal(s), s.visible), -3e38), (True, None, True)),
        (lambda s: as_float(s.visible, float("-inf")), (False, None, True)),
    ],
)
def test_closed_forms(function, expected, cache):
    form = form_of(function, cache=cache)
    assert isinstance(form, MaskForm), form
    assert (form.causal, form.window, form.padding is not None) == expected


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda s: aten.logical_or.default(causal(s), aten.lt.Scalar(s.key, 3)),
            "neither causal",
        ),  # a prefix seen by all
        (lambda s: aten.eq.Tensor(s.key // 4, s.query // 4), "neither causal"),  # blocks
        (lambda s: both(causal(s), aten.eq.Tensor(s.key // 64, s.query // 64)), "neither causal"),  # long blocks
        (lambda s: near(s, 3), "neither causal"),  # a window that also sees ahead
        (lambda s: both(causal(s), aten.ne.Scalar(s.key, 1)), "neither causal"),
        (lambda s: aten.logical_or.default(causal(s), aten.logical_not.default(s.visible)), "neither causal"),
        (lambda s: aten.mul.Tensor(aten.sub.Tensor(s.key, s.query), 0.5), "adds other values"),  # a slope per head
        (lambda s: as_float(causal(s), -5.0), "adds other values"),
        (lambda s: both(causal(s), aten.unsqueeze.default(aten.ne.Scalar(s.ids, 0), 2)), "values of input_ids"),
        (lambda s: aten.le.Tensor(s.key, aten.unsqueeze.default(aten.unsqueeze.default(s.positions, 2), 1)), "neither"),
        (lambda s: aten.lt.Tensor(s.key, real_tokens(s)), "neither causal"),  # only where the padding is on the right
        (lambda s: aten.ge.Tensor(s.key, hidden_tokens(s)), "neither causal"),  # only where it is on the left
        (lambda s: aten.gt.Scalar(aten.select.int(s.past, 3, 0), 0), "values of past_key_values.0.key"),
        (lambda s: aten.reshape.default(causal(s), [2, 4, 1]), "cannot be computed on probes"),
    ],
)
def test_strange_masks(function, reason):
    form = form_of(function)
    assert isinstance(form, str)
    assert reason in form


def test_a_window_too_large_to_be_probed_without_a_cache():
    def wide(s):
        return both(causal(s), near(s, 5000))

    assert form_of(wide).window == 5000
    assert "too large" in form_of(wide, cache=False)


def test_a_mask_of_weights():
    graph = graph_of(causal, stored=torch.zeros(1))
    output = graph.fx.output_node()
    with graph.fx.inserting_before(output):
        weight = graph.fx.create_node("get_attr", "stored")
        weight.meta.update(dtype=torch.float32, shape=(1,))
        mask = graph.fx.call_function(aten.add.Tensor, (graph.outputs[0], weight))
    assert closed_form(graph, mask) == "the mask depends on weights"


def test_a_stored_triangle_is_causal():
    graph = graph_of(causal, cache=False, stored=torch.ones(60, 60, dtype=torch.bool).tril())
    mask = graph.outputs[0]
    with graph.fx.inserting_before(graph.fx.output_node()):
        weight = graph.fx.create_node("get_attr", "stored")
        weight.meta.update(dtype=torch.bool, shape=(60, 60))
        length = graph.fx.call_function(aten.sym_size.int, (graph.inputs[0], 1))
        rows = graph.fx.call_function(aten.slice.Tensor, (weight, 0, 0, length))
        mask = graph.fx.call_function(aten.slice.Tensor, (rows, 1, 0, length))
    assert closed_form(graph, mask) == MaskForm(True, None, None)


def test_layers_share_the_padding_mask():
    graph = graph_of(lambda s: both(causal(s), s.visible))
    first = closed_form(graph, graph.outputs[0])
    count = len(graph.fx.nodes)
    assert closed_form(graph, graph.outputs[0]).padding is first.padding
    assert len(graph.fx.nodes) == count
    assert first.padding.prev.prev.prev is graph.inputs[-1]  # before whatever may read it


class Attends(nn.Module):
    """A language model of one attention layer, with a mask of its own."""

    def __init__(self, mask):
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.head = nn.Linear(8, 17)
        self.mask = mask
        self.config = SimpleNamespace(to_dict=lambda: {"model_type": "attends"})

    def can_generate(self):
        return False

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        x = self.embedding(input_ids)[:, None]
        length = torch.arange(input_ids.shape[1], device=input_ids.device)
        visible = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        mask = self.mask(length[:, None], length[None], visible)
        return SimpleNamespace(logits=self.head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, 0]))


def prefix(query, key, visible):
    allowed = (key <= query) | (key < 3)
    return allowed if visible is None else allowed & visible


def triangle(query, key, visible):
    return key <= query if visible is None else (key <= query) & visible


@pytest.mark.parametrize(("mask", "is_recognized"), [(triangle, True), (prefix, False)])
def test_what_is_not_recognized_stays_a_tensor(mask, is_recognized):
    model = Attends(mask).eval()
    graph = canonicalize(capture_module(model))
    (node,) = [node for node in graph.fx.nodes if is_op(node, canonical.attention.default)]
    assert node.args[5] is is_recognized
    assert [entry["pattern"] for entry in graph.unrecognized] == ([] if is_recognized else ["attention-mask"])
    ids, real = torch.randint(17, (3, 6)), padding_mask(3, 6, "right")
    logits = run(graph, **language_inputs(graph, ids, real))["logits"]
    with torch.no_grad():
        expected = model(ids, real).logits
    torch.testing.assert_close(logits[real.bool()], expected[real.bool()])
    before = list(graph.unrecognized)
    assert canonicalize(graph).unrecognized == before


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("window", [7, 20, None])
def test_a_window_that_lies_in_a_stored_table(window, cache):
    """It is longer than any probe whose size comes from numbers in the graph; only the whole table shows it."""
    table = torch.ones(32, 32, dtype=torch.bool).tril()
    if window is not None:
        table ^= table.tril(-window)

    graph = graph_of(causal, cache=cache, stored=table)
    with graph.fx.inserting_before(graph.fx.output_node()):
        weight = graph.fx.create_node("get_attr", "stored")
        weight.meta.update(dtype=torch.bool, shape=(32, 32))
        start, end = 0, graph.fx.call_function(aten.sym_size.int, (graph.inputs[0], 1))
        if cache:
            start = graph.fx.call_function(aten.sym_size.int, (graph.inputs[3], 2))
            end = graph.fx.call_function(operator.add, (start, end))
        rows = graph.fx.call_function(aten.slice.Tensor, (weight, 0, start, end))
        mask = graph.fx.call_function(aten.slice.Tensor, (rows, 1, 0, end))
    assert closed_form(graph, mask) == MaskForm(True, window, None)


@pytest.mark.parametrize("cache", [True, False])
def test_a_small_stored_tensor_is_no_table(cache):
    graph = graph_of(lambda s: both(causal(s), near(s, 5)), cache=cache, stored=torch.tensor([True, False, True]))
    mask = graph.outputs[0]
    with graph.fx.inserting_before(graph.fx.output_node()):
        flags = graph.fx.create_node("get_attr", "stored")
        flags.meta.update(dtype=torch.bool, shape=(3,))
        flag = graph.fx.call_function(aten.select.int, (flags, 0, 2))
        mask = graph.fx.call_function(aten.logical_and.default, (mask, flag))
    assert closed_form(graph, mask) == MaskForm(True, 5, None)
