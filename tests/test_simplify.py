"""What comes before the rules: noise goes, equal nodes merge, expressions of weights fold; values stay the same."""

import torch
import torch.nn.functional as F

from qcompiler.canonicalize import canonicalize
from qcompiler.capture import capture_module
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
