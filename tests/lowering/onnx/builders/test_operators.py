"""Every operator that has a builder, against torch, at the sizes it was built with and at others."""

import operator
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.onnx import lower
from qcompiler.lowering.onnx.dialect import BUILDERS
from tests.lowering.onnx.harness import GraphMaker, open_session
from tests.lowering.onnx.operator_cases import CASES

aten = torch.ops.aten


def graph_of(name: str) -> Graph:
    """The case at batch 7 and sequence 5, every result an output."""
    target, inputs, arguments = CASES[name]
    tensors, maker = inputs(7, 5), GraphMaker()
    nodes = [maker.input(tensor) for tensor in tensors]
    sizes = [
        next(
            (maker.size(node, axis) for node in nodes for axis, d in enumerate(maker.values[node].shape) if d == size),
            size,
        )
        for size in (7, 5)
    ]
    args, kwargs = arguments(*nodes, *sizes)
    node = maker.call(target, *args, **kwargs)
    if isinstance(maker.values[node], Tensor):
        return maker.graph(node)
    count = 1 if target is aten.native_layer_norm.default else len(maker.values[node])
    return maker.graph(*(maker.call(operator.getitem, node, index) for index in range(count)))


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_torch(name, run_onnx, tmp_path):
    target, inputs, arguments = CASES[name]
    graph = graph_of(name)
    lower(graph, tmp_path / "out")
    session = open_session(tmp_path / "out")
    for sizes in ((7, 5), (3, 11), (1, 1)):
        tensors = inputs(*sizes)
        args, kwargs = arguments(*tensors, *sizes)
        expected: Any = target(*args, **kwargs)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        results = run_onnx(graph, *tensors, session=session)
        for result, wanted in zip(results, expected, strict=False):
            assert result.dtype == wanted.dtype
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_every_builder_has_a_case():
    elsewhere = {  # canonical operators have a file of their own; the others occur in the cases above
        *(target for target in BUILDERS if str(target).startswith("qcompiler.")),
        operator.getitem,
        aten.sym_size.int,
    }
    sizes = {operator.add, operator.sub, operator.mul, operator.neg, operator.mod, operator.floordiv}
    sizes |= {torch.sym_max, torch.sym_min}
    assert set(BUILDERS) - elsewhere - sizes == {target for target, _, _ in CASES.values()}


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (operator.add, (7, 5)),
        (operator.sub, (7, 5)),
        (operator.mul, (7, 3)),
        (operator.floordiv, (7, 2)),
        (operator.mod, (7, 4)),
        (operator.neg, (-7,)),
        (torch.sym_max, (7, 5)),
        (torch.sym_min, (7, 5)),
    ],
)
def test_symbolic_sizes(function, arguments, maker, run_onnx):
    x = maker.input(torch.zeros(7, 5))
    known = {7: maker.size(x, 0), 5: maker.size(x, 1)}
    if arguments == (-7,):
        size = maker.call(operator.neg, maker.call(operator.neg, known[7]))
    else:
        size = maker.call(function, *(known.get(a, a) for a in arguments))
    graph = maker.graph(maker.call(aten.arange.default, size))
    (result,) = run_onnx(graph, torch.zeros(9, 4))
    batch, sequence = 9, 4
    values = [abs({7: batch, 5: sequence}.get(abs(a), abs(a))) for a in arguments]
    expected = batch if arguments == (-7,) else function(*values)
    assert result.tolist() == list(range(expected))


def test_operator_without_a_builder_is_named(maker, tmp_path):
    graph = maker.graph(maker.call(aten.acosh.default, maker.input(torch.ones(7, 5))))
    with pytest.raises(TargetError, match="no ONNX form") as caught:
        lower(graph, tmp_path / "out")
    assert caught.value.where == "acosh_default"
    assert caught.value.got == "aten.acosh.default"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.split.Tensor, lambda x, mask: (x, 2, 1)),
        (aten.index.Tensor, lambda x, mask: (x, [mask])),
        (aten.layer_norm.default, lambda x, mask: (x, [5, 8])),
        (aten.sub.Tensor, lambda x, mask: (x, x, 3)),
    ],
    ids=["split of a varying axis", "boolean index", "layer_norm over two axes", "alpha"],
)
def test_forms_without_a_builder_are_refused(target, arguments, maker, tmp_path):
    x, mask = maker.input(torch.ones(7, 5, 8)), maker.input(torch.ones(7, dtype=torch.bool))
    kwargs = {"alpha": 3} if target is aten.sub.Tensor else {}
    node = maker.call(target, *(arguments(x, mask)[: 2 if kwargs else None]), **kwargs)
    if target is aten.split.Tensor:
        node = maker.call(operator.getitem, node, 0)
    with pytest.raises(TargetError):
        lower(maker.graph(node), tmp_path / "out")


def test_operators_that_no_output_needs_are_not_written(maker, tmp_path):
    x = maker.input(torch.ones(7, 5))
    maker.call(aten.acosh.default, x)
    report = lower(maker.graph(maker.call(aten.neg.default, x)), tmp_path / "out")
    assert report["nodes"] == 1


def test_shapes_that_repeat_sizes_of_the_input_are_constant(maker, tmp_path):
    x = maker.input(torch.ones(7, 5, 8))
    sizes = [maker.size(x, 0), maker.size(x, 1)]
    node = maker.call(aten.view.default, x, [*sizes, 2, 4])
    node = maker.call(aten.reshape.default, maker.call(aten.transpose.int, node, 1, 2), [sizes[0], 2, -1])
    report = lower(maker.graph(node), tmp_path / "out")
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert kinds == ["Reshape", "Transpose", "Reshape"]
    assert report["nodes"] == 3
