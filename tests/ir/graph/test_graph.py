"""A copy of a graph is one of its own."""

import torch

from qcompiler.ir.graph import is_op
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from tests.ir.graph.beginnings import half_model, quantized
from tests.models import run

canonical = torch.ops.qcompiler


def test_a_copy_is_changed_alone():
    graph = half_model()
    graph.notes.append("note")
    copied = graph.copy()
    x = torch.randn(3, 8)
    before = run(graph, input_0=x)["output_0"]
    assert torch.equal(run(copied, input_0=x)["output_0"], before)
    (site,) = copied.sites()
    copied.set_weight(site, quantized(copied.weights.read(site.weight), QuantSpec("int4", group_size=4)))
    copied.schemes["1"] = Scheme.parse("w4a16")
    for report in (copied.notes, copied.lost, copied.unrecognized):
        report.clear()
    copied.provenance["source"] = "another"
    assert torch.equal(run(graph, input_0=x)["output_0"], before)
    assert (graph.schemes, graph.notes) == ({}, ["note"])
    assert graph.provenance["source"] == "Sequential"
    assert [node.name for node in graph.fx.nodes if is_op(node, canonical.dequantize.default)] == []
