"""Checkpoints of one model are traced once."""

import pytest

from tests.traced_once import trace_once


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_once(monkeypatch)
