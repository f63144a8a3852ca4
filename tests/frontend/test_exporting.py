"""Tracing: what cannot be traced says so, what is written in place is made functional, shortcuts change nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.frontend.exporting import export
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import Port, Signature
from qcompiler.storage.weights import WeightStore
from tests.models import canonical_form, module, run


@pytest.mark.parametrize("kind", ["branch", "raises", "number", "state", "small"])
def test_what_cannot_be_exported_says_so(kind):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            if kind == "branch" and x.sum() > 0:
                return x + 1
            if kind == "raises":
                raise KeyError("missing")
            if kind == "number":
                return x, 3
            if kind == "state":
                self.count += 1
                return x + self.count
            if kind == "small" and x.shape[0] > 2:
                return x * 2
            return x

    with pytest.raises(UnsupportedModelError) as caught:
        capture_module(Odd(), (torch.randn(3, 2),))
    expected = {
        "branch": "cannot be exported",
        "raises": "KeyError",
        "number": "something else than tensors",
        "state": "changes its buffers",
        "small": "another path for small sizes",
    }
    assert expected[kind] in str(caught.value)


def test_a_buffer_that_is_written_over_before_it_is_read_is_no_state():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", torch.zeros(2))
            self.register_buffer("few", torch.tensor([1.0, 2.0]))
            self.register_buffer("many", torch.tensor([3.0, 4.0]))

        def forward(self, x):
            self.frequencies.copy_(torch.where(x.max() > 1, self.many, self.few))
            return x * self.frequencies

    graph = canonicalize(capture_module(Chosen(), (torch.zeros(3, 2),)))
    assert "frequencies" not in graph.weight_names()
    assert run(graph, input_0=torch.ones(2, 2))["output_0"].tolist() == [[1, 2], [1, 2]]
    assert run(graph, input_0=2 * torch.ones(2, 2))["output_0"].tolist() == [[6, 8], [6, 8]]


def written_in_place(self, x):
    y = x + 1
    y[:, 1] = 0
    y.mul_(2)
    return y.clamp_(max=3)


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return (x @ self.w).relu()


def with_gradients(self, x):
    with torch.enable_grad():
        return (x @ self.w).relu()


@pytest.mark.parametrize("function", [written_in_place, without_autocast, with_gradients])
def test_effects_are_traced_away(function):
    graph = canonical_form(module(function, w=torch.randn(4, 4)), torch.randn(3, 4))
    targets = [node.target for node in graph.fx.nodes if node.op == "call_function"]
    assert targets
    assert not any(target._schema.is_mutable for target in targets)


@pytest.mark.parametrize("keyword", [True, False])
def test_attention_is_traced_as_one_operator_and_put_back(keyword):
    def attend(self, x):
        scale = {"scale": 0.5} if keyword else {}
        return F.scaled_dot_product_attention(x, x[..., 1:, :], x[..., 1:, :2], None, 0.0, False, **scale)

    graph = capture_module(module(attend), (torch.randn(2, 3, 5, 4),))
    (node,) = [node for node in graph.fx.nodes if "attention" in str(node.target)]
    assert node.target is torch.ops.aten.scaled_dot_product_attention.default
    assert node.meta["shape"] == ("batch", 3, 5, 2)
    assert node.kwargs == ({"scale": 0.5} if keyword else {})


def test_numbers_in_the_module_become_stored_tensors():
    graph = canonical_form(module(lambda self, x: x * torch.tensor([1.0, 2.0, 3.0])), torch.randn(2, 3))
    (name,) = graph.weight_names()
    assert graph.weights.read(name).tolist() == [1.0, 2.0, 3.0]


def test_sizes_have_names():
    class Two(nn.Module):
        def forward(self, x, y):
            return torch.cat((x, y), dim=1), y.flatten()

    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 1: free}, {0: free, 1: free})
    graph = capture_module(Two(), (torch.randn(3, 4), torch.randn(3, 5)), dynamic_shapes=shapes)
    assert [port.shape for port in graph.signature.inputs] == [("batch", "dim_1"), ("batch", "dim_2")]
    assert [port.shape for port in graph.signature.outputs] == [("batch", "dim_1 + dim_2"), ("batch*dim_2",)]


def test_limits_are_those_of_the_code():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 4))

        def forward(self, x):
            return x + self.table[: x.shape[0]]

    assert capture_module(Table(), (torch.randn(3, 4),)).provenance["limits"] == {"batch": 7}
    assert capture_module(nn.ReLU(), (torch.randn(3, 4),)).provenance["limits"] == {}


def test_export_takes_the_module_as_it_is():
    exported = export(nn.Dropout(0.5).train(), (torch.randn(2, 3),), None, "Dropout")
    assert [tuple(value.shape) for value in exported.inputs] == [(2, 3)]
    assert [tuple(value.shape) for value in exported.outputs] == [(2, 3)]


class Constants(nn.Module):
    """Makes tensors of numbers while it runs, in the ways models do."""

    def forward(self, input_ids):
        x = input_ids[:, :, None] * torch.tensor([1.0, 2.0, 3.0], device=input_ids.device)
        x = x + torch.tensor(0.5, dtype=torch.float32, device=input_ids.device)
        last, others = x[:, :, [-1]], x[:, :, [0, 2]]
        return torch.cat((last, others, x[:, :, [1]]), dim=-1)


def test_constants_keep_their_values_on_meta():
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    exported = export(Constants(), (ids,), dynamic, "Constants")
    signature = Signature(
        (Port("input_ids", "ids", "int64", ("batch", "sequence")),),
        (Port("output", "other", "float32", ("batch", "sequence", 4)),),
    )
    store = WeightStore()
    graph = canonicalize(Graph(exported.to_fx(signature, store, {}, ""), signature, store))
    assert graph.weight_names() == []
    ids = torch.randint(9, (3, 5))
    torch.testing.assert_close(run(graph, input_ids=ids)["output"], Constants()(ids))
