"""Kernels in pieces compute what they compute as a whole; the weights of a piece alone are in memory."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from qcompiler.artifacts.streamed import run_together
from qcompiler.errors import InputError
from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import SEQUENCE
from qcompiler.lowering.kernels.module import streamed
from qcompiler.lowering.kernels.module.model import KernelModel, lower
from qcompiler.lowering.kernels.module.streamed import StreamedKernelModel, lower_streamed
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache, SqueezeLLM
from qcompiler.protocol import RunsTogether
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import language_model

CPU = torch.device("cpu")
IDS = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(32, (3, 7), generator=torch.Generator().manual_seed(2))
RUNS = [[IDS], list(IDS.split([5, 1, 1, 3, 2], dim=1)), list(OTHERS.split([2, 5], dim=1))]
RECIPES = {
    "w4a16": [Assign("w4a16-g32"), RTN()],
    "w8a8-dynamic+kv-int8": [Assign("w8a8-dynamic"), QuantizeKVCache("int8"), RTN(), InsertQDQ(observer=None)],
    "lut": [Assign("w3a16-lut"), SqueezeLLM()],
}


def graph_of(name: str) -> Graph:
    calibration = qc.Calibration.from_tokens(torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(2)))
    return qc.compile(language_model(width=32), RECIPES[name], calibration).graph


def with_a_cache_that_grows_otherwise(graph: Graph) -> Graph:
    """One that the module gives back longer."""
    found = copy_graph(graph)
    append = next(node for node in found.fx.nodes if node.target is torch.ops.qcompiler.kv_append.default)
    append.target, append.args = torch.ops.aten.cat.default, ([*append.args], 2)
    return found


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    """By recipe or family: windows and experts."""
    found = {name: graph_of(name) for name in RECIPES}
    found["gemma3"] = copy_graph(canonical_graph("gemma3"))
    experts = copy_graph(canonical_graph("mixtral"))
    found["mixtral"] = qc.compile(experts, [Assign("w4a16-g16"), RTN()], device="cpu").graph
    found["no buffer"] = with_a_cache_that_grows_otherwise(found["w4a16"])
    return found


def outputs(model: KernelModel) -> list[Tensor]:
    return list(run_together(model, RUNS))


@pytest.mark.parametrize("name", [*RECIPES, "gemma3", "mixtral", "no buffer"])
@pytest.mark.parametrize("piece_bytes", [0, 1 << 30])
def test_parts_of_texts(graphs: dict[str, Graph], name: str, piece_bytes: int) -> None:
    whole = lower(graphs[name], device=CPU)
    model = StreamedKernelModel(graphs[name], CPU, whole.dtype, piece_bytes=piece_bytes)
    assert isinstance(model, RunsTogether)
    assert not isinstance(whole, RunsTogether)
    assert (len(model._pieces) == 1) is (piece_bytes > 0)
    expected, found = outputs(whole), outputs(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["w8a8-dynamic+kv-int8", "gemma3"])
def test_it_is_an_artifact_like_any_other(graphs: dict[str, Graph], name: str) -> None:
    whole, model = lower(graphs[name], device=CPU), lower_streamed(graphs[name], device=CPU)
    assert model.report == whole.report
    assert (model.rounded, model.slots, model.dtype) == (whole.rounded, whole.slots, whole.dtype)
    assert torch.equal(model.forward(IDS), whole.forward(IDS))
    steps = []
    for each in (model, whole):
        first, cache = each.prefill(IDS[:, :5])
        second, cache = each.step(IDS[:, 5:7], cache)
        third, _ = each.step(IDS[:, 7:8], cache)
        steps.append(torch.cat((first, second, third), 1))
    assert torch.equal(*steps)


def test_the_layers_of_one_piece_are_alive(graphs: dict[str, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[nn.Module]] = []
    most: list[int] = []
    original = WeightOnlyLinear.__init__

    def counted(self: WeightOnlyLinear, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(weakref.ref(self))
        most.append(sum(layer() is not None for layer in made))

    monkeypatch.setattr(WeightOnlyLinear, "__init__", counted)
    monkeypatch.setattr(streamed, "call_directly", lambda module: None)  # which makes other modules of them
    lower(graphs["w4a16"], device=CPU)
    layers = max(most)
    made.clear()
    most.clear()
    model = StreamedKernelModel(graphs["w4a16"], CPU, torch.bfloat16, piece_bytes=0)
    outputs(model)
    assert len(made) == 2 * layers
    assert max(most) <= 2 < layers  # the one that goes and the one that comes


def test_a_text_that_is_too_long(graphs: dict[str, Graph]) -> None:
    graph = copy_graph(graphs["w4a16"])
    graph.provenance["limits"] = {SEQUENCE: 8}
    model = lower_streamed(graph, device=CPU)
    assert len(list(model.run_together([[IDS[:, :8]]]))) == 1
    with pytest.raises(InputError, match="longer than the model allows"):
        next(model.run_together([[IDS]]))
