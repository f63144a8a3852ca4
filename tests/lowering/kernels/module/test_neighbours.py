"""Norms, gates and rotations as one launch each: what is recognised, what stays, and that it computes the same."""

import operator
from collections import Counter
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.feeding import feed
from qcompiler.ir.graph import Graph
from qcompiler.ir.kv_cache import float_caches, quantize_cache
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.module import neighbours
from qcompiler.lowering.kernels.module.build import BuiltModule, build_module
from qcompiler.passes import RTN
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import interpret, language_model

_aten, _canonical, _kernels = torch.ops.aten, torch.ops.qcompiler, torch.ops.qcompiler_kernels
CPU = torch.device("cpu")


@pytest.fixture
def fused(monkeypatch):
    """As on CUDA; the operators then run their CPU implementations."""
    monkeypatch.setattr(neighbours, "choose", lambda device: Choice("triton"))


def run(made: BuiltModule, ids: torch.Tensor) -> Any:
    tensors = [torch.zeros(len(ids), s.heads, 16 * s.is_buffer, s.width, dtype=s.dtype) for s in made.slots]
    with torch.no_grad():
        return made.module(ids, torch.zeros(1, dtype=torch.int32), 0, *tensors)[0]


def calls(made: BuiltModule) -> Counter[Any]:
    return Counter(node.target for node in made.module.graph.nodes if node.op == "call_function")


def node_of(graph: Graph, target: Any) -> Any:
    return next(node for node in graph.fx.nodes if node.target is target)


def test_choices():
    assert neighbours.choose(Device("cuda", "", 90, True)) == Choice("triton")
    assert "Triton" in neighbours.choose(Device("cuda", "", 90, False)).reason
    assert "7.5" in neighbours.choose(Device("cuda", "", 75, True)).reason
    assert not neighbours.choose(Device("cpu", has_triton=True)).is_fused


def test_on_a_cpu_nothing_changes():
    made = build_module(language_model(), CPU, torch.bfloat16)
    assert made.neighbours["implementation"] == "reference"
    assert made.neighbours["launches"] == {}
    assert not any(str(target).startswith("qcompiler_kernels.r") for target in calls(made))


@pytest.mark.parametrize(
    ("family", "launches"),
    [
        ("llama", {"rms_norm": 5, "gated": 2, "rotary_pair": 2}),
        ("gemma2", {"rms_norm": 9, "gated": 2, "rotary_pair": 2}),
        ("phi3", {"rms_norm": 5, "gated": 2, "rotary_pair": 2}),
        ("gptj", {"rotary_pair": 2}),
        ("mixtral", {"rms_norm": 5, "gated": 2, "rotary_pair": 2}),
    ],
)
def test_families(family, launches, fused, monkeypatch):
    graph = qc.compile(copy_graph(canonical_graph(family)), [RTN(bits=8)]).graph
    vocab = int(graph.signature.outputs[0].shape[-1])
    ids = torch.randint(vocab, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = interpret(graph, feed(graph, ids))[graph.outputs[0].name]
    made = build_module(graph, CPU, torch.float32)
    assert made.neighbours["launches"] == launches
    left = calls(made)
    assert left[_canonical.rms_norm.default] == left[_canonical.rotary.default] == 0
    assert {name: left[getattr(_kernels, name).default] for name in launches} == launches
    names = {node.args[2] for node in made.module.graph.nodes if node.target is _kernels.gated.default}
    assert names == ({"gelu_tanh" if family == "gemma2" else "silu"} if "gated" in launches else set())
    assert (run(made, ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    narrow = run(build_module(graph, CPU, torch.bfloat16), ids)
    monkeypatch.setattr(neighbours, "choose", lambda device: Choice("reference", "asked for"))
    before = run(build_module(graph, CPU, torch.bfloat16), ids)
    assert (narrow - expected).abs().max() <= 0.1 * expected.abs().max()
    assert (narrow - before).abs().max() <= 0.1 * expected.abs().max()


def test_less_is_rounded_and_less_is_launched(fused, monkeypatch):
    graph = canonical_graph("llama")
    made = build_module(graph, CPU, torch.bfloat16)
    left = calls(made)
    assert left[_aten.silu.default] == 0
    assert not any(name.startswith("silu") for name in made.rounded)
    assert {"rotary_default", "mul_17"} <= made.rounded
    monkeypatch.setattr(neighbours, "choose", lambda device: Choice("reference", "asked for"))
    before = build_module(graph, CPU, torch.bfloat16)
    launched = [sum(n for target, n in c.items() if target is not operator.getitem) for c in (calls(before), left)]
    assert launched[0] - launched[1] == 6  # an activation, a rotation and a cast of queries in each of two layers
    assert made.rounded == before.rounded - {"silu", "silu_1"}


def test_rotated_values_are_rounded_only_where_their_readers_would(fused):
    graph = copy_graph(canonical_graph("llama"))
    for cache in float_caches(graph):
        quantize_cache(graph, cache, CacheFormat("int8"))
    made = build_module(graph, CPU, torch.bfloat16)
    pairs = [n for n in made.module.graph.nodes if n.target is _kernels.rotary_pair.default]
    assert [pair.args[5:] for pair in pairs] == [(torch.bfloat16, torch.float32)] * 2  # keys are quantized as they are
    plain = build_module(canonical_graph("llama"), CPU, torch.bfloat16)
    pairs = [n for n in plain.module.graph.nodes if n.target is _kernels.rotary_pair.default]
    assert [pair.args[5:] for pair in pairs] == [(torch.bfloat16, torch.bfloat16)] * 2


@pytest.mark.parametrize("family", ["phi3", "gptj"])
def test_parts_of_vectors_are_rounded_as_what_they_are_put_beside(family, fused):
    made = build_module(canonical_graph(family), CPU, torch.bfloat16)
    pairs = [n for n in made.module.graph.nodes if n.target is _kernels.rotary_pair.default]
    assert [pair.args[5:] for pair in pairs] == [(torch.bfloat16, torch.bfloat16)] * 2
    assert all(user.target is _aten.cat.default for pair in pairs for part in pair.users for user in part.users)


def test_readers_behind_what_only_moves_values_are_asked(fused):
    graph = copy_graph(canonical_graph("llama"))
    rotary = node_of(graph, _canonical.rotary.default)
    with graph.fx.inserting_after(rotary):
        moved = graph.fx.call_function(_aten.clone.default, (rotary,))
    moved.meta = dict(rotary.meta)
    rotary.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    dtypes = []
    for _ in range(2):
        made = build_module(graph, CPU, torch.bfloat16).module.graph.nodes
        dtypes.append(next(node.args[5] for node in made if node.target is _kernels.rotary_pair.default))
        with graph.fx.inserting_after(moved):  # something that computes from it, too
            graph.fx.call_function(_aten.exp.default, (moved,))
    assert dtypes == [torch.bfloat16, torch.float32]


def changed(change: str) -> Graph:
    graph = copy_graph(canonical_graph("llama"))
    if change == "a gate that is read twice":
        silu = node_of(graph, _aten.silu.default)
        (mul,) = silu.users
        (reader,) = mul.users
        with graph.fx.inserting_after(mul):
            more = graph.fx.call_function(_aten.add.Tensor, (mul, silu))
        reader.replace_input_with(mul, more)
        more.meta = dict(silu.meta)
    elif change == "a product of other shapes":
        mul = next(iter(node_of(graph, _aten.silu.default).users))
        up = mul.args[1]
        with graph.fx.inserting_before(mul):
            one = graph.fx.call_function(_aten.select.int, (up, 2, 0))
            one = graph.fx.call_function(_aten.unsqueeze.default, (one, 2))
        one.meta = {**up.meta, "shape": (*up.meta["shape"][:2], 1)}
        mul.update_arg(1, one)
    elif change == "a gate of itself":
        silu = node_of(graph, _aten.silu.default)
        next(iter(silu.users)).args = (silu, silu)
    elif change == "sines of another shape":
        rotary = node_of(graph, _canonical.rotary.default)
        with graph.fx.inserting_before(rotary):
            sin = graph.fx.call_function(_aten.expand.default, (rotary.args[2], [-1, 4, -1, -1]))
        sin.meta = {**rotary.args[2].meta, "shape": rotary.args[0].meta["shape"]}
        rotary.update_arg(2, sin)
    return graph


@pytest.mark.parametrize(
    ("change", "launches"),
    [
        ("nothing", {"rms_norm": 5, "gated": 2, "rotary_pair": 2}),
        ("a gate that is read twice", {"rms_norm": 5, "gated": 1, "rotary_pair": 2}),
        ("a product of other shapes", {"rms_norm": 5, "gated": 1, "rotary_pair": 2}),
        ("a gate of itself", {"rms_norm": 5, "gated": 1, "rotary_pair": 2}),
        ("sines of another shape", {"rms_norm": 5, "gated": 2, "rotary_pair": 1, "rotary": 1}),
    ],
)
def test_what_has_another_form_stays(change, launches, fused):
    graph = changed(change)
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(3))
    made = build_module(graph, CPU, torch.float32)
    assert made.neighbours["launches"] == launches
    expected = interpret(graph, feed(graph, ids))[graph.outputs[0].name]
    torch.testing.assert_close(run(made, ids), expected, rtol=1e-4, atol=1e-5)
