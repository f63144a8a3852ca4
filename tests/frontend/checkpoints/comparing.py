"""What tests of readers compare: logits of our arithmetic on codes, and of transformers on the numbers they mean."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import HFArtifact, NativeArtifact
from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph
from tests.frontend.checkpoints.packers import Pair

IDS = torch.arange(24).reshape(2, 12) * 97 % 4096


def refused(directory: Path, error: type[QCompilerError], match: str) -> QCompilerError:
    """The error that capturing ends with."""
    with pytest.raises(error, match=match) as caught:
        qc.capture(directory)
    return caught.value


def logits(graph: Graph) -> Tensor:
    """Of our reference arithmetic."""
    return NativeArtifact(graph).forward(IDS)


def assert_same_model(pair: Pair, *, sites: int = 7) -> Graph:
    """The captured graph, with so many quantized sites, gives what transformers gives of the float model."""
    graph = qc.capture(pair.quantized)
    assert len(graph.schemes) == sites
    expected = HFArtifact(pair.floats).forward(IDS)
    difference = (logits(graph) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max(), difference
    assert expected.std() > 1e-2
    return graph
