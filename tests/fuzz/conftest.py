"""The model that every example gets a copy of."""

from pathlib import Path

import pytest

from tests.fuzz.surroundings import save_original


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_original(tmp_path_factory.mktemp("original"))
