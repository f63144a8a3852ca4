import io
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import torch as reference

from qcompiler.errors import WeightError
from qcompiler.storage.safetensors_io import (
    TORCH_DTYPES,
    SafetensorsFile,
    byte_chunks,
    read_exactly,
    write_safetensors,
)

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(path: Path, header, data: bytes = bytes(8), length: int | None = None) -> Path:
    """Writes a file with any header, so that each kind of damage can be made."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes):
    return {"a": {**GOOD["a"], **changes}}


def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = {
        tag: torch.arange(6).remainder(2).reshape(2, 3).to(dtype) for tag, dtype in TORCH_DTYPES.items()
    }  # every dtype of the table
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    reference.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        value = file.read(name)
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert torch.equal(value.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_each_read_owns_its_buffer(tmp_path):
    file = SafetensorsFile(raw(tmp_path / "x.safetensors", GOOD))
    file.read("a").fill_(7)
    assert file.read("a").tolist() == [0, 0]


def test_read_blocks(tmp_path):
    file = SafetensorsFile(raw(tmp_path / "x.safetensors", GOOD, bytes(range(8))))
    assert file.read_blocks("a", [(6, 8), (0, 3)]) == [bytes([6, 7]), bytes([0, 1, 2])]


@pytest.mark.parametrize(
    ("header", "what"),
    [
        pytest.param(b"{nonsense", "JSON cannot be read", id="not JSON"),
        pytest.param(b"\xff\xfe{}", "JSON cannot be read", id="not UTF-8"),
        pytest.param(b"[" * 100_000, "JSON cannot be read", id="too deep"),
        pytest.param(b'{"a": %s}' % (b"9" * 5000), "JSON cannot be read", id="absurd integer"),
        pytest.param(b"[1, 2]", "not an object", id="a list"),
        pytest.param(b'{"a": 1, "a": 2}', "JSON cannot be read", id="a name twice"),
        pytest.param({**GOOD, "__metadata__": {"n": 1}}, "strings to strings", id="metadata with numbers"),
        pytest.param({"a": 5}, "damaged header entry", id="entry is no object"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, "damaged header entry", id="offsets missing"),
        pytest.param(entry(dtype="F33"), "unknown dtype", id="unknown dtype"),
        pytest.param(entry(dtype=["F32"]), "unknown dtype", id="dtype is no string"),
        pytest.param(entry(shape=[-2]), "damaged shape", id="negative size"),
        pytest.param(entry(shape=[2.0]), "damaged shape", id="size is a float"),
        pytest.param(entry(shape=[True, 2]), "damaged shape", id="size is a boolean"),
        pytest.param(entry(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]), "damaged shape", id="absurd empty"),
        pytest.param(entry(data_offsets=[8, 0]), "damaged data_offsets", id="end before begin"),
        pytest.param(entry(data_offsets=[0, 8, 8]), "damaged data_offsets", id="three offsets"),
        pytest.param(entry(shape=[3]), "size and shape disagree", id="shape too large for its bytes"),
        pytest.param({**GOOD, "b": {**GOOD["a"], "data_offsets": [4, 12]}}, "overlaps", id="overlap"),
        pytest.param({"b": {**GOOD["a"], "data_offsets": [4, 12]}}, "a gap", id="gap"),
        pytest.param({}, "bytes follow", id="data that no tensor owns"),
        pytest.param({**GOOD, "b": {**GOOD["a"], "data_offsets": [8, 16]}}, "truncated", id="tensor beyond the end"),
    ],
)
def test_damaged_header_is_refused_before_data_is_read(tmp_path, header, what):
    path = raw(tmp_path / "x.safetensors", header, bytes(12) if "gap" in what or "overlap" in what else bytes(8))
    with pytest.raises(WeightError, match=what) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value.where)
    named = isinstance(header, dict) and header and "__metadata__" not in header
    assert not named or str(caught.value.where)[len(str(path)) :] in (": a", ": b")


@pytest.mark.parametrize(
    ("length", "what"), [(1 << 60, "absurd"), (200_000_000, "absurd"), (0, "absurd"), (5000, "truncated in the header")]
)
def test_impossible_header_length(tmp_path, length, what):
    with pytest.raises(WeightError, match=what):
        SafetensorsFile(raw(tmp_path / "x.safetensors", GOOD, length=length))


def test_every_truncation_is_noticed(tmp_path):
    path = raw(tmp_path / "x.safetensors", GOOD)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightError):
            SafetensorsFile(path)


def test_missing_file_and_pipe(tmp_path):
    with pytest.raises(WeightError, match="missing"):
        SafetensorsFile(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WeightError, match="regular file"):
        SafetensorsFile(tmp_path / "pipe")


def test_a_file_that_changes_while_in_use(tmp_path):
    path = raw(tmp_path / "x.safetensors", GOOD)
    file = SafetensorsFile(path)
    raw(tmp_path / "y", GOOD).replace(path)
    with pytest.raises(WeightError, match="changed while"):
        file.read("a")


def test_a_read_beyond_the_end(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    with (tmp_path / "short").open("rb") as file, pytest.raises(WeightError, match="ends too early") as caught:
        read_exactly(file.fileno(), memoryview(bytearray(4)), 2, "here")
    assert (caught.value.where, caught.value.got) == ("here", "3 bytes at offset 2")


def test_boolean_of_other_bytes(tmp_path):
    header = {"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}
    with pytest.raises(WeightError, match="boolean"):
        SafetensorsFile(raw(tmp_path / "x.safetensors", header, bytes([0, 1, 2, 0, 0, 0, 0, 0]))).read("a")


def test_no_descriptor_stays_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    file = SafetensorsFile(raw(tmp_path / "x.safetensors", GOOD))
    file.read("a")
    with pytest.raises(WeightError):
        SafetensorsFile(raw(tmp_path / "bad", b"{"))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_byte_chunks_of_strided_tensors(monkeypatch):
    monkeypatch.setattr("qcompiler.storage.safetensors_io._CHUNK_BYTES", 64)
    for tensor in (torch.arange(60.0).reshape(5, 12).t(), torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1)):
        chunks = list(byte_chunks(tensor))
        assert len(chunks) > 1
        assert b"".join(chunks) == tensor.contiguous().numpy().tobytes()
    assert list(byte_chunks(torch.empty(3, 0))) == []


def test_written_file_is_aligned_and_deterministic():
    tensors = {"c": torch.tensor([True] * 3), "b": torch.ones(3, dtype=torch.int8), "a": torch.ones(3)}
    tensors |= {"d": torch.ones(1, dtype=torch.float64), "e": torch.ones(3, dtype=torch.bfloat16)}
    files = []
    for names in (list(tensors), list(tensors)[::-1]):
        stream = io.BytesIO()
        entries = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        write_safetensors(stream.write, entries, {}, tensors.__getitem__)
        files.append(stream.getvalue())
    assert files[0] == files[1]
    length = int.from_bytes(files[0][:8], "little")
    assert length % 8 == 0
    header = json.loads(files[0][8 : 8 + length])
    assert list(header) == ["d", "a", "e", "b", "c"]
    assert all(value["data_offsets"][0] % tensors[name].itemsize == 0 for name, value in header.items())
    assert all(torch.equal(value, tensors[name]) for name, value in reference.load(files[0]).items())
