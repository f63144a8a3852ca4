"""The diagonal of the Fisher information against autograd on the whole model at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompiler.errors import CalibrationError
from qcompiler.ir.execute import Stretch
from qcompiler.ir.graph import Graph, Site
from qcompiler.storage.weights import WeightStore
from qcompiler.sweep.fisher import measure_fisher
from tests.models import canonical_graph, copy_graph
from tests.tiny_graphs import input_batches, language_model, residual_mlp, token_batches

CPU = torch.device("cpu")


def everything(site: Site) -> bool:
    return True


def measure(graph: Graph, batches: Sequence[Mapping[fx.Node, Tensor]], work_dir: Path, **options: Any) -> WeightStore:
    settings: dict[str, Any] = {"device": CPU, "work_dir": work_dir, "value_budget": 1 << 30} | options
    wanted = settings.pop("wanted", everything)
    return measure_fisher(graph, batches, wanted, **settings)


def by_autograd(graph: Graph, batches: Sequence[Mapping[fx.Node, Tensor]]) -> dict[str, Tensor]:
    """Squared gradients of every sequence's loss, summed, in one piece and double precision."""
    logits = graph.outputs[0]
    stretch = Stretch(graph.fx.nodes, [logits])
    loaded = {n: v.double() if v.is_floating_point() else v for n, v in stretch.load(graph.weights.read, CPU).items()}
    leaves: dict[str, list[Any]] = {
        site.name: list(dict.fromkeys(node.args[1] for node in site.nodes)) for site in graph.sites()
    }
    for node in (node for nodes in leaves.values() for node in nodes):
        loaded[node].requires_grad_()
    sums = {site.name: torch.zeros(site.out_features, site.in_features).double() for site in graph.sites()}
    rows = [
        {n: v[i : i + 1] for n, v in batch.items()} for batch in batches for i in range(len(batch[graph.inputs[0]]))
    ]
    for row in rows:
        values = {n: v.double() if v.is_floating_point() else v for n, v in row.items()}
        result = stretch.run(values, loaded, CPU, grad=True)[logits]
        loss = F.cross_entropy(result[0, :-1], row[graph.inputs[0]][0, 1:])
        gradients = torch.autograd.grad(loss, [loaded[n] for nodes in leaves.values() for n in nodes])
        given = iter(gradients)
        for name, nodes in leaves.items():
            sums[name] += torch.stack([next(given) for _ in nodes]).sum(0).square()
    return sums


def check(found: WeightStore, expected: Mapping[str, Tensor]) -> None:
    assert set(found.names()) == set(expected)
    for name, value in expected.items():
        assert float(value.max()) > 0
        measured = found.read(name).double()
        assert found.info(name).dtype == "float32"
        assert float((measured - value).abs().max() / value.max()) < 1e-5, name


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_equals_autograd_on_the_whole_model(tmp_path, budget):
    graph = language_model(layers=3, tied=False)
    batches = token_batches(graph)
    check(measure(graph, batches, tmp_path, value_budget=budget), by_autograd(graph, batches))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]  # stored values are gone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_captured_models(tmp_path, family):
    graph = copy_graph(canonical_graph(family))
    batches = token_batches(graph, (2, 1), 7)
    found = measure(graph, batches, tmp_path, wanted=lambda site: site.name != "lm_head")
    expected = by_autograd(graph, batches)
    expected.pop("lm_head", None)
    check(found, expected)


def test_a_layer_used_twice_and_a_value_alive_across_cuts(tmp_path):
    graph = language_model(layers=3, tied=False)
    first, second = (site for site in graph.sites() if site.name in ("1.gate", "1.up"))
    with graph.fx.inserting_before(second.nodes[0]):
        again = graph.fx.create_node("get_attr", first.weight)
    again.meta.update(first.nodes[0].args[1].meta)
    second.nodes[0].update_arg(1, again)  # gate and up are one layer, and its weight enters twice
    skip, last = graph.sites()[0].inputs[0], graph.sites()[-1].nodes[0]
    with graph.fx.inserting_before(last):
        joined = graph.fx.call_function(torch.ops.aten.add.Tensor, (last.args[0], skip))
    joined.meta.update(skip.meta)
    last.update_arg(0, joined)
    batches = token_batches(graph)
    check(measure(graph, batches, tmp_path), by_autograd(graph, batches))


def test_squares_are_of_sequences_whatever_the_batches(tmp_path):
    graph = language_model()
    names = ("a", "b")
    ways = [
        measure(graph, token_batches(graph, sizes), tmp_path / n)
        for n, sizes in zip(names, ((5,), (1, 4)), strict=True)
    ]
    for name in ways[0].names():
        assert torch.equal(ways[0].read(name), ways[1].read(name))


def test_only_what_is_wanted_and_progress(tmp_path):
    graph = language_model()
    seen = []
    found = measure(
        graph,
        token_batches(graph),
        tmp_path,
        wanted=lambda site: site.name == "0.q",
        progress=lambda done, steps, text: seen.append((done, steps, text)),
    )
    assert found.names() == ["0.q"]
    steps = seen[0][1]
    assert [done for done, _, _ in seen] == [*range(steps // 2 - 1), *range(steps // 2, steps)]
    assert "forward 0.q" in seen[0][2] or "forward 0.q" in seen[1][2]
    assert seen[-1][2].startswith("backward")


def test_the_graph_is_left_as_it_was(tmp_path):
    graph, other = language_model(), language_model()
    measure(graph, token_batches(graph), tmp_path)
    assert graph.to_dict() == other.to_dict()
    for name in graph.weight_names():
        assert torch.equal(graph.weights.read(name), other.weights.read(name))


def test_bad_input(tmp_path):
    graph = residual_mlp()
    with pytest.raises(CalibrationError, match="language model") as caught:
        measure(graph, input_batches(graph), tmp_path)
    assert "sensitivity='gram'" in str(caught.value)
    graph = language_model()
    with pytest.raises(CalibrationError, match="no next token"):
        measure(graph, token_batches(graph, (2,), 1), tmp_path)
    graph = language_model(tied=False)
    graph.weights.set("1.down.weight", torch.full((16, 32), 3e38))
    with pytest.raises(CalibrationError, match="not finite") as caught:
        measure(graph, token_batches(graph), tmp_path)
    assert caught.value.where
