"""Caches in place: no copy per token, room that grows, several sequences at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import InputError
from qcompiler.lowering.onnx.streamed import StreamedOnnxArtifact
from qcompiler.lowering.ort import reader
from qcompiler.lowering.ort.reader import OrtArtifact


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reader") / "out"
    qc.lower(tiny("w4a16-rtn"), "ort", place, accuracy_level=0, verify=False)
    return place


def test_a_cache_is_written_to_where_it_is(folder: Path) -> None:
    artifact = OrtArtifact(folder)
    ids = torch.randint(4096, (1, 20))
    wanted = artifact.forward(ids)
    cache: Any
    logits, cache = artifact.prefill(ids[:, :5])
    places = {name: buffer.ctypes.data for name, buffer in cache.buffers.items()}
    assert all(buffer[:, :, 4].any() and not buffer[:, :, 5:].any() for buffer in cache.buffers.values())
    for place in range(5, 20):
        step, cache = artifact.step(ids[:, place : place + 1], cache)
        torch.testing.assert_close(step[:, 0], wanted[:, place], rtol=1e-4, atol=1e-4)
    assert {name: buffer.ctypes.data for name, buffer in cache.buffers.items()} == places
    assert cache.length == 20
    torch.testing.assert_close(logits, wanted[:, :5], rtol=1e-4, atol=1e-4)


def test_room_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_ROOM", 8)
    artifact = OrtArtifact(folder)
    ids = torch.randint(4096, (2, 24))
    wanted = artifact.forward(ids)
    cache: Any
    _, cache = artifact.prefill(ids[:, :6])
    assert cache.room == 8
    several, cache = artifact.step(ids[:, 6:14], cache)  # tokens of several sequences, beyond the room
    last, cache = artifact.step(ids[:, 14:15], cache)
    assert 14 < cache.room <= 64
    torch.testing.assert_close(torch.cat((several, last), 1), wanted[:, 6:15], rtol=1e-4, atol=1e-4)


def test_no_more_than_the_positions(folder: Path) -> None:
    artifact = OrtArtifact(folder)
    cache: Any
    _, cache = artifact.prefill(torch.randint(4096, (1, 64)))
    assert cache.room == 64
    with pytest.raises(InputError, match="positions"):
        artifact.step(torch.tensor([[1]]), cache)
    with pytest.raises(InputError, match="batch"):
        artifact.step(torch.tensor([[1], [2]]), artifact.prefill(torch.tensor([[1]]))[1])


def test_in_pieces(folder: Path) -> None:
    pieces = StreamedOnnxArtifact(folder, piece_bytes=50_000)
    ids = torch.randint(4096, (1, 16))
    wanted = OrtArtifact(folder).forward(ids)
    parts = torch.cat(list(pieces.run_together([[ids[:, :7], ids[:, 7:8], ids[:, 8:]]])), dim=1)
    torch.testing.assert_close(parts, wanted, rtol=1e-4, atol=1e-4)
