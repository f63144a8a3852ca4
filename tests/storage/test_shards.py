"""Weights written: one file or several, and what goes wrong."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcompiler.errors import InputError, ResourceError, WeightError
from qcompiler.storage.weights import WeightStore
from tests.storage.test_weights import small, transposed


def contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()}


@pytest.mark.parametrize(("names", "owner"), [(["w", "head"], "w"), (["head", "w"], "head"), (["b", "head"], None)])
def test_tied_tensors_are_saved_once_and_tied_again(tmp_path, names, owner):
    store = small()
    store.alias("head", of="w")
    store.save(tmp_path, names=names)
    again = WeightStore.from_directory(tmp_path)
    assert set(again.names()) == set(names)
    assert torch.equal(again.read("head"), store.read("head"))
    assert set(load_file(tmp_path / "model.safetensors")) == ({owner} if owner else {"b", "head"})
    assert again.tied("head") == ((({"w", "head"} - {"head"}).pop(),) if owner else ())


def test_save_reads_back_and_is_deterministic(tmp_path):
    store = small()
    store.derive("t", ("w",), transposed, dtype="float32", shape=(3, 2))
    store.set("q", torch.tensor([[1, 2, 3]], dtype=torch.uint8), "uint3")
    store.alias("w1", of="w")
    store.alias("w2", of="w")
    assert store.save(tmp_path / "one") == (tmp_path / "one" / "model.safetensors",)
    store.save(tmp_path / "two", names=["w", *store.names()[::-1]])
    again = WeightStore.from_directory(tmp_path / "one")
    again.save(tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    for name in store.names():
        assert again.info(name) == store.info(name)
        assert torch.equal(again.read(name), store.read(name))


def test_save_of_chosen_names(tmp_path):
    small().save(tmp_path, names=["b"])
    assert WeightStore.from_directory(tmp_path).names() == ["b"]


def test_save_of_nothing(tmp_path):
    WeightStore.from_tensors({}).save(tmp_path)
    assert WeightStore.from_directory(tmp_path).names() == []
    assert load_file(tmp_path / "model.safetensors") == {}


def test_shards(tmp_path):
    store = WeightStore.from_tensors({f"t{i}": torch.full((25,), float(i)) for i in range(6)})  # 100 bytes each
    store.set("t3", torch.full((75,), 3.0))
    store.alias("tie", of="t5")
    files = store.save(tmp_path, max_shard_bytes=250)
    names = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [file.name for file in files] == [*names, "model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 800
    expected = {"t0": 0, "t1": 0, "t2": 1, "t3": 2, "t4": 3, "t5": 3}
    assert {name: index["weight_map"][name] for name in expected} == {n: names[i] for n, i in expected.items()}
    for file in files[:-1]:
        held = {name for name, shard in index["weight_map"].items() if shard == file.name}
        assert set(load_file(file)) == held
    store.save(tmp_path / "reversed", names=["t5", *store.names()[::-1]], max_shard_bytes=250)
    assert contents(tmp_path / "reversed") == {file.name: file.read_bytes() for file in files}
    again = WeightStore.from_directory(tmp_path)
    assert set(again.names()) == set(store.names())
    assert again.tied("tie") == ("t5",)
    assert all(torch.equal(again.read(name), store.read(name)) for name in store.names())
    assert again.fingerprint() == store.fingerprint()


def test_no_index_where_everything_fits_exactly(tmp_path):
    files = small().save(tmp_path, max_shard_bytes=small().stored_bytes())
    assert [file.name for file in files] == ["model.safetensors"]


@pytest.mark.parametrize(
    "left", ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00009.safetensors"]
)
def test_save_never_mixes_with_other_weights(tmp_path, left):
    (tmp_path / left).write_bytes(b"x")
    with pytest.raises(InputError, match="already holds weights"):
        small().save(tmp_path)
    assert contents(tmp_path) == {left: b"x"}


def test_options_of_save_are_checked(tmp_path):
    with pytest.raises(InputError, match="reserved"):
        small().save(tmp_path, metadata={"qcompiler": "x"})
    with pytest.raises(InputError, match="positive"):
        small().save(tmp_path, max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_what_is_not_finite_and_leaves_nothing(tmp_path):
    store = small()
    store.set("z", torch.tensor([-float("inf")]))
    with pytest.raises(WeightError, match="not finite"):
        store.save(tmp_path, max_shard_bytes=24)
    assert list(tmp_path.iterdir()) == []
    store.save(tmp_path, check_finite=False)
    assert WeightStore.from_directory(tmp_path).read("z", check_finite=False).item() == -float("inf")


def test_a_source_that_goes_missing_while_saving(tmp_path):
    small().save(tmp_path / "in")
    store = WeightStore.from_directory(tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(WeightError, match="missing"):
        store.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("at", [1, 3, 6])
def test_disk_full_while_saving_shards(tmp_path, monkeypatch, at):
    genuine, calls = os.write, []

    def full(fd, data):
        calls.append(fd)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceError, match="disk is full"):
        small().save(tmp_path, max_shard_bytes=24)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    small().save(tmp_path, max_shard_bytes=24)  # and the directory is as good as before


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for use in (lambda: small().save(tmp_path / "file"), lambda: small().spill(tmp_path / "file", "x")):
        with pytest.raises(InputError, match="cannot be written"):
            use()


def test_another_stem(tmp_path):
    store = WeightStore.from_tensors({"a": torch.ones(4), "b": torch.ones(4)})
    (file,) = store.save(tmp_path / "one", stem="weights")
    assert file.name == "weights.safetensors"
    files = store.save(tmp_path / "two", stem="weights", max_shard_bytes=16)
    assert [file.name for file in files][-1] == "weights.safetensors.index.json"
    for place in ("one", "two"):
        assert WeightStore.from_directory(tmp_path / place, stem="weights").read("b").tolist() == [1] * 4
        with pytest.raises(WeightError, match="safetensors files, but no index"):
            WeightStore.from_directory(tmp_path / place)
