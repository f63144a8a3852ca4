"""What operators give is told without running them on numbers."""

from pathlib import Path

import pytest
import torch
from torch import fx

from qcompiler.errors import PipelineError
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.graph.shapes import Described, ShapeRun
from qcompiler.numerics import hadamard
from tests.models import canonical_graph, raw_graph
from tests.tiny_graphs import Maker, language_model, other

aten, canonical = torch.ops.aten, torch.ops.qcompiler
F32 = torch.float32


def ports(graph: Graph) -> ShapeRun:
    return ShapeRun(dict(zip(graph.inputs, graph.signature.inputs, strict=True)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_every_node_of_a_model_is_described_as_it_was_traced(family: str) -> None:
    graph = canonical_graph(family)
    run, checked = ports(graph), 0
    for node in graph.fx.nodes:
        if node.op == "call_function" and "shape" in node.meta and not is_op(node, canonical.take_expert.default):
            found = run.call(node.target, node.args, node.kwargs)
            assert found == Described(node.meta["dtype"], node.meta["shape"]), node
            checked += 1
    assert checked > 40


def test_before_canonicalization_as_well() -> None:
    graph = raw_graph("gpt2")
    run = ports(graph)
    for node in graph.fx.nodes:
        if node.op == "call_function" and "shape" in node.meta:
            assert run.call(node.target, node.args, node.kwargs).shape == node.meta["shape"], node


def test_nodes_that_say_nothing_are_computed_from_those_ahead_of_them() -> None:
    graph = language_model()
    assert all("shape" not in node.meta for node in graph.fx.nodes if node.op != "get_attr")
    run = ports(graph)
    for node, port in zip(graph.outputs, graph.signature.outputs, strict=True):
        assert run.describe(node) == Described(F32, port.shape)


def described(*shape: int | str, dtype: torch.dtype = F32) -> Described:
    return Described(dtype, shape)


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.reshape.default, (described("batch", "sequence", 6), [-1, 6]), ("batch*sequence", 6)),
        (
            aten.cat.default,
            ([described("past_sequence", 4), described("sequence", 4)], 0),
            ("past_sequence + sequence", 4),
        ),
        (aten.cat.default, ([described("2*n", 4), described("n", 4)],), ("3*n", 4)),
        (aten.mul.Tensor, (described("b", "odd // thing", 4), described(4)), ("b", "odd // thing", 4)),
        (aten.cat.default, ([described("n // 2", 4), described("n", 4)],), ("(n // 2) + n", 4)),
    ],
)
def test_sizes_are_expressions(target: object, args: tuple[object, ...], expected: tuple[int | str, ...]) -> None:
    assert ShapeRun({}).call(target, args, {}).shape == expected


def test_sizes_that_vary_are_not_alike() -> None:
    with pytest.raises(PipelineError, match="does not take these") as caught:
        ShapeRun({}).call(aten.add.Tensor, (described("a", 4), described("b", 4)), {})
    assert "float32 [a, 4], float32 [b, 4]" in str(caught.value)


@pytest.mark.parametrize("size", range(2, 24))
def test_nor_are_they_like_any_fixed_size(size: int) -> None:
    with pytest.raises(PipelineError, match="does not take these"):
        ShapeRun({}).call(aten.add.Tensor, (described("a", size), described("a", "a + b")), {})


def test_what_depends_on_values_is_not_told() -> None:
    with pytest.raises(PipelineError, match="depends on the values"):
        ShapeRun({}).call(canonical.take_expert.default, (described("n", 4), described("n", dtype=torch.int64), 1), {})


def test_a_size_is_no_code(tmp_path: Path) -> None:
    text = f"__import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()"
    assert ShapeRun({}).call(aten.neg.default, (described(text, 4),), {}).shape == (text, 4)
    assert not (tmp_path / "made").exists()


def test_nothing_known() -> None:
    make = Maker()
    x = make.fx.placeholder("x")
    node = make.call(aten.neg.default, x)
    graph = make.graph([other("x", 4)], {other("y", 4): node})
    with pytest.raises(PipelineError, match="nothing is known"):
        ShapeRun({}).describe(graph.outputs[0])
    assert ports(graph).describe(graph.outputs[0]) == described(4)


def test_stored_tensors_are_computed_with_in_float32() -> None:
    make = Maker()
    assert ShapeRun({}).describe(make.tensor("w", 4, 4, dtype=torch.bfloat16)) == described(4, 4)
    codes = fx.Graph().create_node("get_attr", "codes")
    codes.meta.update(dtype=torch.int8, shape=(4, 4))
    assert ShapeRun({}).describe(codes) == described(4, 4, dtype=torch.int8)


def test_matrices_that_are_kept_hold_numbers() -> None:
    hadamard._factor.cache_clear()
    assert ShapeRun({}).call(canonical.hadamard.default, (described("n", 24), 24), {}) == described("n", 24)
    turned = hadamard.multiply(torch.eye(24), 24)
    assert torch.allclose(turned @ turned.T, torch.eye(24), atol=1e-6)
