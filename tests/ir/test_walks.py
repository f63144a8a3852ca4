"""What a value depends on."""

from qcompiler.ir.walks import ancestors
from tests.models import canonical_graph


def test_ancestors():
    graph = canonical_graph("llama")
    found = ancestors([graph.outputs[0]])
    assert set(graph.inputs) <= found
    assert graph.outputs[0] in found
    assert ancestors([graph.inputs[0]]) == {graph.inputs[0]}
