"""A model that is run by segments gives, to the bit, what it gives as a whole; few weights are in memory."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import CompileResult, evaluate, evaluation
from qcompiler.artifacts import result as result_module
from qcompiler.artifacts.decisions import Decisions
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.artifacts.noise import with_noise
from qcompiler.artifacts.parity import check_parity
from qcompiler.artifacts.streamed import StreamedArtifact, run_together
from qcompiler.errors import VerificationError
from qcompiler.ir import Graph, free_memory, segment_graph
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache
from qcompiler.protocol import RunsTogether
from qcompiler.reporting import CompileReport
from tests.models import VOCABULARY, canonical_graph, copy_graph

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
RUNS = [[IDS], list(IDS.split([5, 1, 1, 3, 2], dim=1)), list(OTHERS.split([2, 5], dim=1))]


def run(artifact: NativeArtifact, runs: Sequence[Sequence[Tensor]] = RUNS) -> list[Tensor]:
    return list(run_together(artifact, runs))


def assert_same(graph: Graph, **options: Any) -> None:
    found, expected = (run(kind(graph, **options)) for kind in (StreamedArtifact, NativeArtifact))
    assert len(found) == sum(map(len, RUNS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_parts_of_texts(family: str) -> None:
    assert_same(canonical_graph(family))


@pytest.fixture(scope="module")
def rounded() -> dict[str, Graph]:
    """By the format of the cache, a model with codes, rounded activations and a quantized cache."""
    tokens = qc.Calibration.from_tokens(IDS)
    found = {}
    for cache in ("int8", "int4", "fp8"):
        quantizer: Any = QuantizeKVCache(cache)
        passes = [Assign("w8a8-dynamic"), quantizer, InsertQDQ(least_sqnr_db=-float("inf")), RTN()]
        found[cache] = qc.compile(copy_graph(canonical_graph("llama")), passes, tokens).graph
    return found


@pytest.mark.parametrize("cache", ["int8", "int4", "fp8"])
def test_codes_and_quantized_caches(cache: str, rounded: dict[str, Graph]) -> None:
    assert_same(rounded[cache])
    assert_same(rounded[cache], round_activations=False)


def test_samples_with_noise_are_run_by_segments_too(rounded: dict[str, Graph]) -> None:
    graph = rounded["int8"]
    names = [node.name for node in graph.fx.nodes if node.op == "call_function"]
    noisy = with_noise(graph, names, torch.bfloat16)
    assert len(segment_graph(noisy).segments) >= len(segment_graph(graph).segments)
    assert_same(noisy)
    assert not torch.equal(run(StreamedArtifact(noisy))[0], run(StreamedArtifact(graph))[0])


def test_without_a_cache() -> None:
    graph = copy_graph(canonical_graph("bert"))
    found, expected = (run(kind(graph), [[IDS], [OTHERS]]) for kind in (StreamedArtifact, NativeArtifact))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_it_is_an_artifact_like_any_other() -> None:
    streamed, whole = StreamedArtifact(canonical_graph("llama")), NativeArtifact(canonical_graph("llama"))
    assert isinstance(streamed, RunsTogether)
    assert not isinstance(whole, RunsTogether)
    logits, cache = streamed.prefill(IDS[:, :5])
    expected, expected_cache = whole.prefill(IDS[:, :5])
    assert torch.equal(logits, expected)
    assert torch.equal(streamed.step(IDS[:, 5:], cache)[0], whole.step(IDS[:, 5:], expected_cache)[0])


def test_weights_are_read_once_for_all_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = copy_graph(canonical_graph("llama"))
    reads: list[str] = []
    read = graph.weights.read

    def spy(name: str) -> Tensor:
        reads.append(name)
        return read(name)

    monkeypatch.setattr(graph.weights, "read", spy)
    list(StreamedArtifact(graph).run_together(RUNS))
    matrices = [name for name in reads if "proj" in name]
    assert len(matrices) == len(set(matrices)) == 14


def test_logits_are_computed_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of many texts together would not fit."""
    entered: list[int] = []

    def around(number: int) -> Any:
        entered.append(number)
        return torch.no_grad()

    found = StreamedArtifact(canonical_graph("llama")).run_together(RUNS, around)
    next(found)
    ahead = list(entered)
    next(found)
    assert entered == [*ahead, 1]
    assert set(entered[: len(entered) // 2]) == set(range(8))


def test_experts_are_held_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part within a segment, or segment by segment within a part."""
    graph = canonical_graph("mixtral")
    for recorded, held in ((StreamedArtifact, NativeArtifact), (NativeArtifact, StreamedArtifact)):
        decisions = Decisions()
        list(run_together(recorded(graph), RUNS, decisions.recording()))
        chosen = {number: [c.clone() for c in choices] for number, choices in decisions._chosen.items()}
        assert [len(chosen[number]) for number in range(8)] == [2] * 8  # one choice in each of two layers
        for choices in decisions._chosen.values():
            for choice in choices:
                choice.add_(1).remainder_(4)  # other experts
        other = list(run_together(held(graph), RUNS, decisions.holding()))
        expected = list(run_together(recorded(graph), RUNS, decisions.holding()))
        assert all(torch.equal(one, two) for one, two in zip(other, expected, strict=True))
        assert not torch.allclose(other[0], run(NativeArtifact(graph))[0])


class OffByLayer(StreamedArtifact):
    """Runs another graph, with a fault in one layer."""

    def run_together(self, runs: Sequence[Sequence[Tensor]], *arguments: Any) -> Iterator[Tensor]:
        graph = copy_graph(self._graph)
        (name,) = (site.weight for site in graph.sites() if site.name.endswith("1.mlp.up_proj"))
        graph.rewrite_float(name, 1.02 * graph.weights.read(name).float())
        return StreamedArtifact(graph).run_together(runs, *arguments)


@pytest.mark.parametrize("steps", [None, 0, 1])
def test_parity_by_segments(steps: int | None) -> None:
    graph = canonical_graph("llama")
    whole = check_parity(NativeArtifact(graph), NativeArtifact(graph), tolerance=1e-5, steps=steps)
    found = check_parity(StreamedArtifact(graph), StreamedArtifact(graph), tolerance=1e-5, steps=steps)
    assert found == whole
    assert found["cached_difference"] is not None
    with pytest.raises(VerificationError):
        check_parity(StreamedArtifact(graph), OffByLayer(graph), tolerance=1e-3, steps=steps)


@pytest.mark.parametrize("cached", [False, True])
def test_evaluation_in_passes_over_many_windows(
    cached: bool, rounded: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, for one reading of the weights in each pass."""
    graph = rounded["int8"].copy() if cached else copy_graph(canonical_graph("llama"))
    windows = torch.randint(VOCABULARY, (7, 9), generator=torch.Generator().manual_seed(3))
    against = NativeArtifact(copy_graph(canonical_graph("llama")))
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 2 * 9 * VOCABULARY)  # two windows
    monkeypatch.setattr(evaluation, "_TOKENS_TOGETHER", 2 * 2 * 9)  # two of those batches
    expected = evaluate(NativeArtifact(graph), tokens=windows, against=against, cached=cached)
    reads: list[str] = []
    read = graph.weights.read

    def spy(name: str) -> Tensor:
        reads.append(name)
        return read(name)

    monkeypatch.setattr(graph.weights, "read", spy)
    done: list[int] = []
    found = evaluate(
        StreamedArtifact(graph),
        tokens=windows,
        against=against,
        cached=cached,
        progress=lambda count, _: done.append(count),
    )
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    assert found.tokens == 7 * 8
    assert done == [2, 4, 6, 7]
    assert reads.count("model.layers.0.mlp.up_proj.weight" + "_codes" * cached) == 2


def test_what_does_not_fit_is_streamed(rounded: dict[str, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    result = CompileResult(rounded["int8"], CompileReport(), {})
    size = 4 * int(result.graph.provenance["parameters"])
    kinds = {}
    for free in (2 * size, 2 * size - 2):
        monkeypatch.setattr(result_module, "free_memory", lambda device, free=free: free)
        kinds[free] = type(result.artifact())
    assert list(kinds.values()) == [NativeArtifact, StreamedArtifact]
    assert type(result.artifact(streamed=False)) is NativeArtifact
    assert type(result.artifact(streamed=True)) is StreamedArtifact


def test_memory_that_is_free() -> None:
    found = free_memory(torch.device("cpu"))
    assert 1 << 26 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
