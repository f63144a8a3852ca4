"""Models to damage; nothing may be left behind by any test here."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompiler import api
from qcompiler.ir.graph import Graph
from tests.models import copy_graph
from tests.tiny_checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``, one file, and ``sharded``, several."""
    root = tmp_path_factory.mktemp("originals")
    save_checkpoint(root / "whole", layers=1)
    save_checkpoint(root / "sharded", layers=1, max_shard_size="300KB")
    return root


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "whole", tmp_path / "model"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "model"))


@pytest.fixture(scope="module")
def graph(originals: Path) -> Graph:
    return api.capture(originals / "whole")


@pytest.fixture
def captured(model: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, for errors that come after capture: it is captured once for all of them."""

    def capture(directory: Path, **options: Any) -> Graph:
        weights = copy.deepcopy(graph.weights)  # what is written to disk is shared otherwise
        provenance = {**graph.provenance, "companions": str(directory)}
        return replace(copy_graph(graph), weights=weights, provenance=provenance)

    monkeypatch.setattr(api, "capture", capture)
    return model


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, there is no output, nothing beside it, and nothing in the temporary directory."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"model", "text.txt", "temporary", "kept", "file"}
    assert not list(temporary.glob("*"))
