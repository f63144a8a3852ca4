"""Captured decoding steps: what can be captured, when it is captured again, and that replays give what steps give."""

import operator

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.generation import stream_tokens
from qcompiler.errors import InputError, TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.kernels.launch.device import Choice
from qcompiler.lowering.kernels.module import captured_step as module
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention
from qcompiler.lowering.kernels.module.model import KernelModel, lower
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache, SqueezeLLM
from tests.lowering.kernels.module.made_up_graphs import MadeUpCuda
from tests.tiny_graphs import language_model

CPU = torch.device("cpu")
IDS = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
RECIPES = {
    "w4a16": [Assign("w4a16-g32"), RTN()],
    "w8a8-dynamic+kv-int8": [Assign("w8a8-dynamic"), QuantizeKVCache("int8"), RTN(), InsertQDQ(observer=None)],
    "fp8+kv-int4": [Assign("fp8"), QuantizeKVCache("int4", rotate=True), RTN(), InsertQDQ(observer="minmax")],
    "lut": [Assign("w3a16-lut"), SqueezeLLM()],
}


def graph_of(name: str) -> Graph:
    calibration = qc.Calibration.from_tokens(torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(2)))
    return qc.compile(language_model(width=32), RECIPES[name], calibration).graph


@pytest.fixture
def cuda(monkeypatch):
    """A made-up ``torch.cuda`` that is held to be the CPU's."""
    made = MadeUpCuda()
    for name, value in made.names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "_has_graphs", lambda device: True)
    return made


def portable(graph: Graph) -> KernelModel:
    """The module that CUDA gets too, ahead of what makes its step cheap on a CPU."""
    return KernelModel(graph, CPU, torch.bfloat16)


def why_not(model: KernelModel) -> list[str]:
    return list(module.obstacles(model.module, [slot.is_buffer for slot in model.slots]))


@pytest.mark.parametrize("name", RECIPES)
def test_replaying_gives_what_steps_give(name, cuda):
    model = portable(graph_of(name))
    (_, eager), (_, captured) = model.prefill(IDS[:, :3]), model.prefill(IDS[:, :3])
    step = model.capture_step(captured)
    for position in range(3, 12):
        ids = IDS[:, position : position + 1]
        assert torch.equal(step(ids), model.step(ids, eager)[0])
        assert captured.length == eager.length == position + 1
        assert captured.start.tolist() == [position + 1]
    for mine, other in zip(captured.tensors, eager.tensors, strict=True):
        used = [t[:, :, :12].contiguous().view(torch.uint8) for t in (mine, other)]
        assert torch.equal(*used)
    assert step.captures == 1
    assert [graph.replays for graph in cuda.graphs] == [9]


def test_warming_up_runs_on_the_stream_that_captures(cuda, monkeypatch):
    model = portable(graph_of("w4a16"))
    _, cache = model.prefill(IDS[:, :3])
    ran = []
    run = module.CapturedStep._run

    def noted(self):
        ran.append((cuda.current, self.cache.start.tolist()))
        return run(self)

    monkeypatch.setattr(module.CapturedStep, "_run", noted)
    outside = cuda.current
    model.capture_step(cache)(IDS[:, 3:4])
    (side,) = [stream for stream in cuda.streams if stream is not outside]
    assert ran == [(side, [3])] * 4  # three to warm up, one to capture
    assert cuda.waits == [(side, outside), (outside, side)]


def test_full_buffers_other_buffers_and_other_batches_are_captured_again(cuda):
    model = portable(graph_of("w8a8-dynamic+kv-int8"))
    eager, captured = model.new_cache(2, 4), model.new_cache(2, 4)
    step = model.capture_step(captured)

    def both(ids):
        assert torch.equal(step(ids), model.step(ids, eager)[0])

    both(IDS[:, :3])
    both(IDS[:, 3:4])
    assert step.captures == 2  # another number of tokens
    both(IDS[:, 4:5])
    assert (step.captures, captured.capacity) == (3, 256)  # there was no room
    both(IDS[:, 5:6])
    assert step.captures == 3
    for cache in (eager, captured):  # only the second sequence goes on
        cache.tensors = [tensor[1:].clone() for tensor in cache.tensors]
    both(IDS[1:, 6:7])
    assert step.captures == 4
    assert [graph.calls is None for graph in cuda.graphs] == [True, True, True, False]


def test_steps_that_are_not_captured_may_stand_between(cuda):
    model = portable(graph_of("w4a16"))
    (_, eager), (_, captured) = model.prefill(IDS[:, :3]), model.prefill(IDS[:, :3])
    step = model.capture_step(captured)
    step(IDS[:, 3:4])
    model.step(IDS[:, 4:6], captured)
    found = step(IDS[:, 6:7])
    assert step.captures == 1
    model.step(IDS[:, 3:6], eager)
    torch.testing.assert_close(found, model.step(IDS[:, 6:7], eager)[0], rtol=1e-2, atol=1e-2)


def test_generation(cuda, monkeypatch):
    model = portable(graph_of("w4a16"))
    expected = list(stream_tokens(model, IDS[0, :4], max_new_tokens=20))
    capturing = module.CapturingModel(model)
    assert list(stream_tokens(capturing, IDS[0, :4], max_new_tokens=20)) == expected
    assert [graph.replays for graph in cuda.graphs] == [19]
    assert list(stream_tokens(capturing, IDS[0, :4], max_new_tokens=20)) == expected  # with a cache of its own
    assert [graph.replays for graph in cuda.graphs] == [19, 19]
    assert capturing.vocab_size == model.vocab_size


def test_generation_captures_when_asked(cuda, tmp_path, monkeypatch):
    model = portable(graph_of("w4a16"))
    model.path = tmp_path
    monkeypatch.setattr("qcompiler.artifacts.load_tokenizer", lambda path: "tokenizer")
    monkeypatch.setattr("qcompiler.artifacts.generate", lambda *given, **options: (*given, options))
    assert model.generate("Once", seed=1) == (model, "tokenizer", "Once", {"seed": 1})
    artifact, *rest = model.generate("Once", cuda_graph=True)
    assert isinstance(artifact, module.CapturingModel)
    assert rest == ["tokenizer", "Once", {}]
    assert list(stream_tokens(artifact, IDS[0, :4], max_new_tokens=3))
    assert [graph.replays for graph in cuda.graphs] == [2]
    monkeypatch.setattr(module, "_has_graphs", lambda device: False)
    with pytest.raises(TargetError, match="CUDA"):
        model.generate("Once", cuda_graph=True)


def test_on_a_cpu_nothing_is_captured():
    model = portable(graph_of("w4a16"))
    with pytest.raises(TargetError, match="CUDA"):
        model.capture_step(model.new_cache(1, 8))
    with pytest.raises(TargetError, match="CUDA"):
        module.CapturingModel(model)


def test_more_tokens_than_fused_attention_takes(cuda):
    model = portable(graph_of("w4a16"))
    step = model.capture_step(model.new_cache(1, 64))
    for count in (0, 17):
        with pytest.raises(InputError, match="few tokens"):
            step(torch.zeros(1, count, dtype=torch.int64))
    assert step(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, 32)


def test_attention_that_is_not_fused(cuda):
    model = portable(graph_of("w4a16"))
    layer = next(layer for layer in model.module.modules() if isinstance(layer, CachedAttention))
    layer.choice = Choice("reference", "asked for")
    assert [reason.partition(" ")[2] for reason in why_not(model)] == ["is not fused: asked for"]
    with pytest.raises(TargetError, match="cannot be captured"):
        model.capture_step(model.new_cache(1, 8))


def test_caches_that_are_no_buffers_and_masks_that_grow(cuda):
    graph = graph_of("w4a16")
    append = next(n for n in graph.fx.nodes if n.target is torch.ops.qcompiler.kv_append.default)
    append.target, append.args = torch.ops.aten.cat.default, ([*append.args], 2)
    model = portable(graph)
    assert "cache 0 is not written in place" in why_not(model)
    graph = graph_of("w4a16")
    attention = next(n for n in graph.fx.nodes if n.target is torch.ops.qcompiler.attention.default)
    with graph.fx.inserting_before(attention):  # the first two tokens are hidden
        late = graph.fx.call_function(torch.ops.aten.cumsum.default, (graph.inputs[1], 1))
        late = graph.fx.call_function(torch.ops.aten.gt.Scalar, (late, 2))
        for _ in range(2):
            late = graph.fx.call_function(torch.ops.aten.unsqueeze.default, (late, 1))
    attention.update_arg(3, late)
    assert all("depends on the number of tokens" in reason for reason in why_not(portable(graph)))
    assert why_not(portable(graph))


@pytest.mark.parametrize(
    "target", [torch.ops.qcompiler.take_expert.default, torch.ops.aten.nonzero.default, torch.ops.aten.item.default]
)
def test_shapes_and_numbers_that_depend_on_values(target):
    graph = torch.fx.Graph()
    ids, _, _, _ = (graph.placeholder(name) for name in ("ids", "start", "past", "cache"))
    graph.output(graph.call_function(target, (ids,)))
    (reason,) = module.obstacles(torch.fx.GraphModule({}, graph), [True])
    assert "depends on values" in reason
    assert list(module.obstacles(torch.fx.GraphModule({}, graph), [])) == ["it has no cache", reason]


def test_numbers_that_the_host_computes_are_followed():
    model = portable(graph_of("w4a16"))
    assert why_not(model) == []
    graph = model.module.graph
    past = [node for node in graph.nodes if node.op == "placeholder"][2]
    with graph.inserting_after(past):
        more = graph.call_function(operator.mul, (past, 2))
    with graph.inserting_after(more):
        made = graph.call_function(torch.ops.aten.zeros.default, ([more],))
    assert why_not(model) == [f"{made.name} depends on the number of tokens in the cache"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_a_gpu_captured_and_eager_steps_are_the_same_to_the_bit(name, dtype):
    model = lower(graph_of(name), device=torch.device("cuda"), dtype=dtype)
    (_, eager), (_, captured) = model.prefill(IDS[:, :3]), model.prefill(IDS[:, :3])
    step = model.capture_step(captured)
    for position in [*range(3, 12)] * 30:  # past the first 256 tokens
        ids = IDS[:, position : position + 1]
        assert torch.equal(step(ids), model.step(ids, eager)[0])
    assert step.captures == 2
    assert captured.start.tolist() == eager.start.tolist() == [captured.length]
    for mine, other in zip(captured.tensors, eager.tensors, strict=True):
        used = [t[:, :, : captured.length].contiguous().view(torch.uint8) for t in (mine, other)]
        assert torch.equal(*used)
