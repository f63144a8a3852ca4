"""What tests of readers compare: logits of our arithmetic on codes, and of transformers on the numbers they mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from qcompiler.artifacts import HFArtifact, NativeArtifact
from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph
from qcompiler.numerics import Scheme
from tests.frontend.checkpoints.packers import Pair

IDS = torch.arange(24).reshape(2, 12) * 97 % 4096


def refused(directory: Path, error: type[QCompilerError], match: str) -> QCompilerError:
    """The error that capturing ends with, and that tells what to do."""
    with pytest.raises(error, match=match) as caught:
        qc.capture(directory)
    assert caught.value.remedy
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


def rounded_reference(directory: Path, round_input: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Logits of transformers, with every input of a quantized layer rounded by a function of layer and value."""
    artifact: Any = HFArtifact(directory)
    for name, module in artifact._model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: (round_input(name, args[0]),))
    found: Tensor = artifact.forward(IDS)
    return found


def assert_rounded_model(pair: Pair, round_input: Callable[[str, Tensor], Tensor]) -> Graph:
    """The captured graph gives what transformers gives of the float model with inputs rounded by that function."""
    expected = rounded_reference(pair.floats, round_input)
    graph = qc.capture(pair.quantized)
    difference = (logits(graph) - expected).abs().max()
    plain = HFArtifact(pair.floats).forward(IDS)
    assert (plain - expected).abs().max() > 20 * difference  # that inputs are rounded is what is seen
    assert difference <= 1e-3 * expected.abs().max()  # a value in the middle of two codes may fall on either
    return graph


def round_in_groups(size: int) -> Callable[[str, Tensor], Tensor]:
    """Rounds an input as engines do: each group of channels of each token by its largest magnitude."""

    def round_input(name: str, x: Tensor) -> Tensor:
        parts = x.split(size, dim=-1)
        scales = [part.abs().amax(-1, keepdim=True) / 448 for part in parts]
        codes = [(part / scale).to(torch.float8_e4m3fn) for part, scale in zip(parts, scales, strict=True)]
        return torch.cat([code.float() * scale for code, scale in zip(codes, scales, strict=True)], dim=-1)

    return round_input


def assert_same_parts(before: Graph, after: Graph) -> None:
    """Codes, scales and zero points of all sites are those of another graph, bit for bit."""
    names = [name for name, scheme in before.schemes.items() if scheme != Scheme()]
    assert list(after.schemes) == names
    for name in names:
        parts = [part for part in ("codes", "scale", "zero_point") if f"{name}.weight_{part}" in before.weights]
        assert parts[:2] == ["codes", "scale"]
        for part in ("codes", "scale", "zero_point", "factor"):
            key = f"{name}.weight_{part}"
            assert (key in before.weights) == (key in after.weights)
            if part in parts:
                first, second = before.weights.read(key), after.weights.read(key)
                assert torch.equal(first.flatten().double(), second.flatten().double()), key
