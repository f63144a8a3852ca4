"""The model that every example gets a copy of."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompiler import api
from qcompiler.ir.graph import Graph
from tests.fuzz.surroundings import save_original
from tests.models import copy_graph


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="session")
def _graph(original: Path) -> Graph:
    return api.capture(original / "model")


@pytest.fixture
def captured(original: Path, _graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The original, for what comes after capture: it is captured once for all examples."""

    def capture(directory: Path, **options: Any) -> Graph:
        weights = copy.deepcopy(_graph.weights)
        provenance = {**_graph.provenance, "source": str(directory), "companions": str(directory)}
        return replace(copy_graph(_graph), weights=weights, provenance=provenance)

    monkeypatch.setattr(api, "capture", capture)
    return original
