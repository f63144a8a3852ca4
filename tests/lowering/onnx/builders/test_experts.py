"""Rows routed to experts, against the definition: experts without a row, rows without an expert, one row in all."""

import pytest
import torch

from qcompiler.lowering.onnx import lower
from tests.lowering.onnx.harness import open_session

canonical = torch.ops.qcompiler
EXPERTS = 4


@pytest.fixture
def graph(maker):
    """Each expert multiplies its rows with a matrix of its own."""
    x, experts = maker.input(torch.randn(7, 6)), maker.input(torch.arange(7) % EXPERTS)
    rows = []
    for index in range(EXPERTS):
        taken = maker.call(canonical.take_expert.default, x, experts, index)
        weight = maker.weight(f"expert.{index}.weight", torch.randn(3, 6))
        rows.append(maker.call(canonical.linear.default, taken, weight))
    return maker.graph(maker.call(canonical.merge_experts.default, rows, experts))


@pytest.mark.parametrize("choice", [[0, 1, 2, 3, 0], [3, 3, 3], [2], [1, EXPERTS, 0, 1]])
def test_each_row_is_worked_on_by_its_expert(choice, graph, run_onnx, tmp_path):
    experts, x = torch.tensor(choice), torch.randn(len(choice), 6)
    lower(graph, tmp_path / "out")
    (result,) = run_onnx(graph, x, experts, session=open_session(tmp_path / "out"))
    expected = torch.zeros(len(choice), 3)
    for row, index in enumerate(choice):
        if index < EXPERTS:  # another number is no expert
            expected[row] = graph.weights.read(f"expert.{index}.weight") @ x[row]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_where_an_experts_rows_are_is_found_once(graph, tmp_path):
    import onnx

    lower(graph, tmp_path / "out")
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node]
    assert (kinds.count("NonZero"), kinds.count("MatMul"), kinds.count("ScatterND")) == (EXPERTS, EXPERTS, 1)
