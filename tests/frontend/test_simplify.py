"""What comes before the rules: noise goes, equal nodes merge, expressions of weights fold; values stay the same."""

import pytest
import torch
import torch.nn.functional as F

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from tests.models import canonical_form, module, operators, reasons, run


def test_noise_goes():
    def noisy(self, x):
        x = (x.to(torch.float32).contiguous().clone().detach() * 1 + 0.0).view(x.shape)[:, 0:]
        return F.dropout(x, 0.5, training=False).expand(x.shape).relu() / 1.0

    graph = canonical_form(module(noisy), torch.randn(2, 4))
    assert operators(graph) == {"aten.relu": 1}


def test_what_changes_values_stays():
    graph = canonical_form(module(lambda self, x: (x.half().float() * 2 + 1)[:, 1:].relu()), torch.randn(2, 4))
    assert operators(graph) == {"aten.to": 2, "aten.mul": 1, "aten.add": 1, "aten.slice": 1, "aten.relu": 1}


def test_active_dropout_is_noted_and_not_merged():
    def random(self, x):
        return (F.dropout(x, 0.5, training=True) + F.dropout(x, 0.5, training=True)) * 0

    graph = canonical_form(module(random), torch.randn(2, 4))
    assert operators(graph)["aten.dropout"] == 2
    assert [reason for _, reason in reasons(graph)] == ["dropout is active: every run gives another result"] * 2


def test_expressions_of_weights_fold_in_their_dtype():
    model = module(lambda self, x: x * self.w[1:].unsqueeze(0) + (1 + self.w[:-1]), w=torch.randn(5)).bfloat16()
    graph = canonicalize(capture_module(model, (torch.randn(2, 4),)))
    assert operators(graph) == {"aten.mul": 1, "aten.add": 1}
    assert {graph.weights.info(name).dtype for name in graph.weight_names()} == {"bfloat16", "float32"}
    x, w = torch.randn(3, 4), model.w.detach().float()
    torch.testing.assert_close(run(graph, input_0=x)["output_0"], x * w[1:] + (1 + w[:-1]))


def filled(order):
    def fill(self, x):
        whole = x.new_empty(x.shape[0], 6)
        for start, end in order:
            whole[:, start:end] = x[:, : end - start] * (start + 1)
        return whole

    return fill


@pytest.mark.parametrize("order", [[(0, 2), (2, 6)], [(2, 6), (0, 2)], [(0, 1), (4, 6), (1, 4)]])
def test_an_empty_tensor_that_is_filled_part_by_part(order):
    graph = canonical_form(module(filled(order)), torch.randn(3, 6))
    assert operators(graph)["aten.slice_scatter"] == operators(graph)["aten.new_empty"] == 0
    assert operators(graph)["aten.cat"] == 1


def test_parts_that_overlap_stay():
    graph = canonical_form(module(filled([(0, 4), (2, 6)])), torch.randn(3, 6))
    assert operators(graph)["aten.cat"] == 0

    def over_zeros(self, x):
        whole = x.new_zeros(x.shape[0], 6)
        whole[:, :4] = x[:, :4]
        return whole

    graph = canonical_form(module(over_zeros), torch.randn(3, 6))
    assert operators(graph)["aten.cat"] == 0
