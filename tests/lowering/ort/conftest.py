"""Compiled models that several files of tests lower."""

from collections.abc import Callable

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.artifacts.native import load_native, save_native
from qcompiler.passes import recipe
from tests.tiny_checkpoint import save_checkpoint

Compile = Callable[[str], CompileResult]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A Llama with heads of 16 channels and one layer, by recipe, each compiled once."""
    root = tmp_path_factory.mktemp("tiny")
    save_native(qc.capture(save_checkpoint(root / "model", layers=1)), root / "native", {}, {})
    ids = torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))
    made: dict[str, CompileResult] = {}

    def compiled(name: str) -> CompileResult:
        if name not in made:
            graph, _, _ = load_native(root / "native")
            made[name] = qc.compile(graph, recipe(name), qc.Calibration.from_tokens(ids), device="cpu")
        return made[name]

    return compiled
