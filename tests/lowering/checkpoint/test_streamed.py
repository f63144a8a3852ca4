"""transformers, module by module: what the whole model gives, with few weights in memory, and faults are found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qcompiler as qc
from qcompiler.artifacts import HFArtifact
from qcompiler.artifacts.streamed import run_together
from qcompiler.errors import VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint import target as target_module
from qcompiler.lowering.checkpoint.streamed import StreamedHFArtifact
from tests.lowering.checkpoint.conftest import Write, compiled, passes_of
from tests.models import VOCABULARY

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
RUNS = [[IDS], list(IDS.split([5, 1, 6], dim=1))]


def logits(artifact: HFArtifact) -> list[torch.Tensor]:
    return list(run_together(artifact, RUNS))


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "w8a8-dynamic", "fp8", "fp8-dynamic", "nvfp4", "mxfp4a16"]
)
def test_the_same_as_the_whole_model(scheme: str, graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, scheme, verify=False)
    whole, streamed = HFArtifact(directory), StreamedHFArtifact(directory)
    assert all(torch.equal(one, other) for one, other in zip(logits(streamed), logits(whole), strict=True))
    for fact in ("vocab_size", "max_positions", "has_cache", "cache_bytes_per_token"):
        assert getattr(streamed, fact) == getattr(whole, fact)
    assert streamed.stored_bytes() == whole.stored_bytes()
    assert streamed.bits_per_weight() == whole.bits_per_weight()


def test_a_float_model(source: Path) -> None:
    whole, streamed = HFArtifact(source), StreamedHFArtifact(source)
    assert all(torch.equal(one, other) for one, other in zip(logits(streamed), logits(whole), strict=True))


def test_weights_are_there_while_their_module_runs(graph: Graph, write: Write) -> None:
    directory, _, _ = write(graph, "w4a16-g32", verify=False)
    artifact = StreamedHFArtifact(directory)
    model: nn.Module = artifact._model

    def held() -> int:
        return sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)

    at_rest, most = held(), []
    for module in model.modules():
        if module._parameters:  # ahead of what drops them
            module.register_forward_hook(lambda *_: most.append(held() - at_rest), prepend=True)
    artifact.forward(IDS)
    assert at_rest == 2 * 7  # the shapes of packed weights
    assert len(most) == 12  # embedding, seven linear layers, three norms, head
    assert 160 * 64 <= max(most) < 1.1 * 160 * 64  # the largest layer and its scales
    assert held() == at_rest


@pytest.fixture
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> list[HFArtifact]:
    """Models are run module by module however small; the artifacts that did."""
    made: list[HFArtifact] = []
    monkeypatch.setattr(target_module, "_WHOLE_BYTES", 0)

    class Spy(StreamedHFArtifact):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(target_module, "StreamedHFArtifact", Spy)
    return made


@pytest.mark.parametrize("scheme", ["w4a16-g32", "nvfp4a16"])
def test_large_models_are_compared_so(scheme: str, small_models_too: Any, graph: Graph, write: Write) -> None:
    _, report, _ = write(graph, scheme)
    assert len(small_models_too) == 1
    found = report["parity"]
    assert found["max_difference"] <= found["tolerance"]
    assert found["cached_difference"] <= found["tolerance"]


def test_a_fault_in_one_tensor_is_found(
    small_models_too: Any, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed codes of one layer, damaged behind the writer's back."""
    by_transformers = target_module._by_transformers

    def damage(graph: Graph, directory: Path) -> Any:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.0.mlp.up_proj.weight_packed"][:8] ^= 0x11111111
        save_file(tensors, file, metadata={"format": "pt"})
        return by_transformers(graph, directory)

    monkeypatch.setattr(target_module, "_by_transformers", damage)
    with pytest.raises(VerificationError, match="does not compute what"):
        qc.lower(compiled(graph, passes_of("w4a16-g32"), "checkpoint"), "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
