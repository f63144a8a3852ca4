"""Which operators run in the dtype of a lowered model: seen in the module that is made."""

import operator

import pytest
import torch

from qcompiler.ir.feeding import feed
from qcompiler.lowering.kernels.module.build import build_module
from qcompiler.lowering.kernels.module.precision import is_moving, precision_of
from tests.models import canonical_graph
from tests.tiny_graphs import interpret, language_model

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler


def test_kinds():
    assert precision_of(_canonical.linear.default) == precision_of(_aten.embedding.default) == "narrow"
    assert precision_of(_canonical.rms_norm.default) == "mixed"
    for target in (_aten.add.Tensor, _aten.reshape.default, operator.getitem):
        assert precision_of(target) == "follow"
    for target in (_aten._softmax.default, _aten.pow.Tensor_Scalar, _canonical.layer_norm.default, operator.add):
        assert precision_of(target) == "wide"
    assert is_moving(_aten.reshape.default)
    assert not is_moving(_aten.add.Tensor)


class Recorder(torch.fx.Interpreter):
    """Dtypes of what every call takes and gives."""

    def run(self, *arguments):
        self.seen = []
        return super().run(*arguments)

    def call_function(self, target, args, kwargs):
        result = super().call_function(target, args, kwargs)
        given = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        self.seen.append((target, given, getattr(result, "dtype", None)))
        return result


def recorded(graph, dtype=torch.bfloat16):
    made = build_module(graph, torch.device("cpu"), dtype)
    tensors = [torch.zeros(1, slot.heads, 8 * slot.is_buffer, slot.width, dtype=slot.dtype) for slot in made.slots]
    recorder = Recorder(made.module)
    recorder.run(torch.tensor([[3, 1, 2]]), torch.zeros(1, dtype=torch.int32), 0, *tensors)
    return recorder.seen


def test_positions_and_norms_are_computed_in_float32_and_products_are_not():
    seen = recorded(canonical_graph("llama"))
    for target, given, result in seen:
        if target in (_aten.cos.default, _aten.sin.default):
            assert (given, result) == ([torch.float32], torch.float32)
        elif target is _canonical.rms_norm.default:
            assert (given, result) == ([torch.bfloat16, torch.float32], torch.bfloat16)
        elif target is _canonical.rotary.default:
            assert given == [torch.bfloat16, torch.float32, torch.float32]
        elif target in (_canonical.linear.default, _aten.add.Tensor, _aten.silu.default) and given:
            assert set(given) == {torch.bfloat16}
            assert result == torch.bfloat16
    assert {target for target, _, _ in seen} >= {_aten.cos.default, _canonical.rotary.default, _aten.silu.default}


def test_what_is_not_known_is_computed_in_float32():
    graph = language_model()
    last = next(node for node in graph.fx.nodes if node.target is _aten.silu.default)
    with graph.fx.inserting_after(last):
        wide = graph.fx.call_function(_aten.exp.default, (last,))
    last.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    seen = recorded(graph)
    assert [(given, result) for target, given, result in seen if target is _aten.exp.default] == [
        ([torch.float32], torch.float32)
    ]
    assert all(set(given) == {torch.bfloat16} for target, given, _ in seen if target is _canonical.linear.default)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_in_float32_nothing_is_cast(family):
    graph = canonical_graph(family)
    seen = recorded(graph, torch.float32)
    assert {dtype for _, given, result in seen for dtype in (*given, result) if dtype is not None} <= {
        torch.float32,
        torch.int64,
        torch.int32,
        torch.bool,
    }
    assert interpret(graph, feed(graph, torch.tensor([[3, 1, 2]])))
