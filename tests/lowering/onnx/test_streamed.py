"""A written model run in pieces: they are the whole file, they compute what it computes, and faults are found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.streamed import run_together
from qcompiler.errors import VerificationError
from qcompiler.ir import Graph
from qcompiler.lowering.onnx import OnnxArtifact, lower
from qcompiler.lowering.onnx import streamed as streamed_module
from qcompiler.lowering.onnx.pieces import Piece, cut_model
from qcompiler.lowering.onnx.streamed import StreamedOnnxArtifact
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache
from tests.models import VOCABULARY, canonical_graph, copy_graph

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(2))
PARTS = [list(IDS.split([5, 1, 1, 3, 2], dim=1)), list(OTHERS.split([2, 5], dim=1))]
KINDS: dict[str, tuple[str, Callable[[], list[Any]] | None]] = {
    "float": ("llama", None),
    "gpt2": ("gpt2", None),
    "experts": ("mixtral", None),
    "bert": ("bert", None),
    "w4": ("llama", lambda: [Assign("w4a16-g16"), RTN()]),
    "w8a8": ("llama", lambda: [Assign("w8a8"), InsertQDQ(least_sqnr_db=-float("inf")), RTN()]),
    "int8": ("llama", lambda: [QuantizeKVCache("int8"), Assign("w4a16-g16"), RTN()]),
    "int4": ("llama", lambda: [QuantizeKVCache("int4")]),
    "fp8": ("llama", lambda: [QuantizeKVCache("fp8")]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Graph, Path]]:
    """Graphs and what was written of them, each made once."""
    made: dict[str, tuple[Graph, Path]] = {}

    def write(kind: str) -> tuple[Graph, Path]:
        if kind not in made:
            family, passes = KINDS[kind]
            graph = copy_graph(canonical_graph(family))
            if passes is not None:
                graph = qc.compile(graph, passes(), qc.Calibration.from_tokens(IDS)).graph
            made[kind] = graph, tmp_path_factory.mktemp("onnx") / kind
            lower(*made[kind])
        return made[kind]

    return write


def pieces_of(directory: Path, most_bytes: int = 0) -> tuple[onnx.ModelProto, list[Piece]]:
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    return model, cut_model(model, most_bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_file(kind: str, written: Any) -> None:
    model, pieces = pieces_of(written(kind)[1])
    nodes = [node.SerializeToString() for piece in pieces for node in piece.model.graph.node]
    assert set(nodes) == {node.SerializeToString() for node in model.graph.node}
    weights = {t.name: t.SerializeToString() for t in model.graph.initializer}
    found = [t for piece in pieces for t in piece.model.graph.initializer]
    assert {t.name: t.SerializeToString() for t in found} == weights  # where they are: nothing is copied
    given = {port.name for port in model.graph.input}
    for piece in pieces:
        assert given.issuperset(piece.inputs)
        given.update(piece.outputs)
    assert given.issuperset(port.name for port in model.graph.output)
    assert len(pieces) >= 6


def test_pieces_hold_few_weights(written: Any) -> None:
    _, directory = written("float")

    def stored(piece: Piece) -> int:
        lengths = [e.value for t in piece.model.graph.initializer for e in t.external_data if e.key == "length"]
        return sum(map(int, lengths))

    _, pieces = pieces_of(directory)
    every = [stored(piece) for piece in pieces]
    assert every[0] == 0  # masks and positions
    total = sum(every)
    assert max(every) < total / 3
    _, joined = pieces_of(directory, max(every) * 2)
    assert len(joined) < len(pieces)
    assert max(map(stored, joined)) <= max(every) * 2
    _, whole = pieces_of(directory, total)
    assert len(whole) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_as_at_once(kind: str, written: Any) -> None:
    _, directory = written(kind)
    whole, streamed = OnnxArtifact(directory), StreamedOnnxArtifact(directory, piece_bytes=0)
    facts = ("vocab_size", "max_positions", "has_cache", "has_quantized_cache", "cache_bytes_per_token", "provenance")
    assert all(getattr(whole, name) == getattr(streamed, name) for name in facts)
    runs = [[IDS], [OTHERS], *(PARTS if whole.has_cache else [])]
    found, expected = (list(run_together(artifact, runs)) for artifact in (streamed, whole))
    for one, other in zip(found, expected, strict=True):
        # sums in another order: a cache of codes may have one tip to the next step
        tolerance = 2e-2 if whole.has_quantized_cache or kind == "w8a8" else 2e-5
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))
    if whole.has_cache:
        logits, cache = streamed.prefill(IDS[:, :5])
        assert torch.equal(logits, next(iter(run_together(streamed, [[IDS[:, :5]]]))))
        last, _ = streamed.step(IDS[:, 5:6], cache)
        assert torch.equal(last, found[3])


def test_one_piece_is_open_at_a_time(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = written("w4")
    artifact = StreamedOnnxArtifact(directory, piece_bytes=0)
    opened: list[int] = []
    open_piece = artifact._open

    def spy(model: bytes) -> Any:
        opened.append(len(model))
        return open_piece(model)

    monkeypatch.setattr(artifact, "_open", spy)
    found = artifact.run_together([[IDS], *PARTS])
    next(found)
    assert len(opened) == len(artifact._pieces)
    list(found)
    assert len(opened) == len(artifact._pieces)  # once for all texts


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[StreamedOnnxArtifact]:
    """What is written is run in pieces however small it is; the artifacts that did."""
    made: list[StreamedOnnxArtifact] = []
    create = StreamedOnnxArtifact.__init__

    def spy(self: StreamedOnnxArtifact, path: Path) -> None:
        made.append(self)
        create(self, path, piece_bytes=0)

    monkeypatch.setattr(StreamedOnnxArtifact, "__init__", spy)
    monkeypatch.setattr(streamed_module, "PIECE_BYTES", 0)
    return made


def test_large_files_are_compared_in_pieces(small_pieces: Any, tmp_path: Path) -> None:
    result = qc.compile(copy_graph(canonical_graph("llama")), [Assign("w4a16-g16"), RTN()])
    found = qc.lower(result, "onnx", tmp_path / "out")["parity"]
    assert len(small_pieces) == 1
    assert found["max_difference"] < found["tolerance"]
    assert found["cached_difference"] < found["tolerance"]


def test_a_fault_in_one_layer_is_found(small_pieces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of one layer, damaged behind the writer's back."""
    result = qc.compile(copy_graph(canonical_graph("llama")), [Assign("w8a16-g16"), RTN()])
    describe = streamed_module.describe

    def damage(model: onnx.ModelProto) -> Any:
        (codes,) = (t for t in model.graph.initializer if "1.mlp.up_proj.weight_codes" in t.name)
        places = {entry.key: int(entry.value) for entry in codes.external_data if entry.key != "location"}
        (file,) = tmp_path.rglob("model.onnx.data")
        content = bytearray(file.read_bytes())
        for at in range(places["offset"], places["offset"] + 32):
            content[at] ^= 0x40
        file.write_bytes(content)
        return describe(model)

    monkeypatch.setattr(streamed_module, "describe", damage)
    with pytest.raises(VerificationError, match="does not compute what"):
        qc.lower(result, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
