"""A tiny Llama on disk, and what is compiled and written of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.artifacts.calibration import Calibration
from qcompiler.ir.graph import Graph
from qcompiler.numerics import Scheme
from qcompiler.passes import RTN, Assign, InsertQDQ
from qcompiler.protocol import Pass
from tests.models import VOCABULARY, build


def save_source(directory: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A random model of one layer, in a directory."""
    model: Any = build(family, layers=1, **options)
    model.to(dtype)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 64, intermediate 160, 61 words."""
    return save_source(tmp_path_factory.mktemp("source"), hidden_size=64, intermediate_size=160)


@pytest.fixture(scope="session")
def graph(source: Path) -> Graph:
    """Of that model; not to be changed."""
    return qc.capture(source)


@pytest.fixture(scope="session")
def odd_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Of a model with widths that fill no words: hidden 72, intermediate 100, and biases."""
    options: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 100, "attention_bias": True, "mlp_bias": True}
    return qc.capture(save_source(tmp_path_factory.mktemp("odd"), **options))


@pytest.fixture(scope="session")
def wide_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Of a model with widths that groups of 128 divide: hidden 128, intermediate 256."""
    return qc.capture(save_source(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256))


def passes_of(scheme: str, overrides: dict[str, str | None] | None = None) -> list[Pass]:
    """Rounding to nearest; inputs as the schemes say, none left in float."""
    found: list[Pass] = [Assign(scheme, overrides=overrides or {})]
    if any(name and Scheme.parse(name).activation for name in (scheme, *(overrides or {}).values())):
        found.append(InsertQDQ(least_sqnr_db=-float("inf")))
    return [*found, RTN()]


def compiled(graph: Graph, passes: list[Pass], target: str) -> CompileResult:
    """A model compiled for a target."""
    tokens = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
    given = Calibration.from_tokens(tokens) if any(item.is_calibrated for item in passes) else None
    return qc.compile(graph, passes, given, targets=[target])


def native_weight(graph: Graph, name: str) -> np.ndarray:
    """float32 ``[out, in]``: what the native artifact multiplies with."""
    (site,) = (site for site in graph.sites() if site.name == name)
    node: Any = site.nodes[0].args[1]
    read = [graph.weights.read(str(arg.target)) if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
    wide = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() and i else t for i, t in enumerate(read)]
    found: np.ndarray = node.target(*wide).numpy()
    return found


Write = Callable[..., tuple[Path, dict[str, Any], CompileResult]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Compiles by a scheme and writes for a target; ``native`` read back is what is written where asked for."""

    def made(graph: Graph, scheme: str, target: str = "checkpoint", **options: Any) -> Any:
        overrides = options.pop("overrides", None)
        result = compiled(graph, options.pop("passes", None) or passes_of(scheme, overrides), target)
        directory = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return directory, qc.lower(result, target, directory, **options), result

    return made
