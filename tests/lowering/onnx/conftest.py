"""Fixtures that lower a graph and run it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qcompiler.ir.graph import Graph
from qcompiler.lowering.onnx import lower
from tests.lowering.onnx.harness import GraphMaker, open_session


@pytest.fixture
def maker() -> GraphMaker:
    return GraphMaker()


@pytest.fixture
def optimized(tmp_path: Path) -> Callable[[Path], onnx.ModelProto]:
    """What ONNX Runtime makes of a model: its graph after optimization."""

    def load(directory: Path) -> onnx.ModelProto:
        open_session(directory, dump=tmp_path / "optimized.onnx")
        return onnx.load(tmp_path / "optimized.onnx", load_external_data=False)

    return load


@pytest.fixture
def run_onnx(tmp_path: Path) -> Callable[..., list[Tensor]]:
    """Lowers a graph and runs it on tensors given in the order of its inputs."""
    count = iter(range(100))

    def run(graph: Graph, *inputs: Tensor, session: Any = None, **options: Any) -> list[Tensor]:
        if session is None:
            directory = tmp_path / f"model_{next(count)}"
            lower(graph, directory, **options)
            session = open_session(directory)
        ports = graph.signature.inputs
        feed = {p.name: t.numpy() for p, t in zip(ports, inputs, strict=True)}
        for port in session.get_inputs():
            if port.type == "tensor(float16)":
                feed[port.name] = feed[port.name].astype(np.float16)
        return [torch.from_numpy(np.array(value)) for value in session.run(None, feed)]

    return run
