"""What every test runs under: the shipped model, one thread, no network, a fixed seed."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before transformers and torch are imported, here or in a process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Kernels are interpreted where there is no GPU; what compiles them ahead of time runs in a process of its own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.traced_once import traced_anew, traced_once

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, and so counts, what this machine cannot run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def booklm() -> Path:
    """The model that the project ships: a Llama of 7.3 M parameters in bfloat16, with its tokenizer."""
    return ROOT / "examples" / "booklm"


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """Models of one configuration are traced once."""
    with traced_once():
        yield


@pytest.fixture(scope="module")
def each_traced() -> Iterator[None]:
    """Every model of a file is traced, for tests of just that."""
    with traced_anew():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that leave the machine fail at once; the loopback device stays open for groups of processes."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        raise OSError(f"tests use no network: connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", local_only)
