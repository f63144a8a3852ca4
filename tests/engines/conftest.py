"""A model, and what is written of it, once for all engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompiler as qc
from tests.engines import made


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A directory with ``native`` and ``checkpoint`` of a layout and scheme."""
    graph: list[Any] = []
    known: dict[tuple[str, str], Path] = {}

    def write(layout: str, scheme: str) -> Path:
        if (layout, scheme) not in known:
            if not graph:
                graph.append(qc.capture(model))
            directory = tmp_path_factory.mktemp(f"{layout}-{scheme}")
            made.write(graph[0], layout, scheme, directory)
            known[layout, scheme] = directory
        return known[layout, scheme]

    return write
