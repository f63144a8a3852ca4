import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcompiler.errors import InputError, WeightError
from qcompiler.storage.checkpoint import no_directory, weight_files
from qcompiler.storage.weights import WeightStore

SINGLE_FILE, INDEX_FILE = weight_files("model")


def sharded(root: Path, weight_map: dict[str, object] | None = None) -> Path:
    """Two shards, ``a`` and ``b``, and an index; in the format's own way, not through the code under test."""
    root.mkdir(parents=True)
    save_file({"a": torch.arange(3.0)}, root / "model-00001-of-00002.safetensors")
    save_file({"b": torch.arange(4.0)}, root / "model-00002-of-00002.safetensors")
    good = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (root / INDEX_FILE).write_text(
        json.dumps({"metadata": {}, "weight_map": good if weight_map is None else weight_map})
    )
    return root


def test_shards(tmp_path):
    store = WeightStore.from_directory(sharded(tmp_path / "m"))
    assert store.names() == ["a", "b"]
    assert store.read("b").tolist() == [0, 1, 2, 3]


def test_one_file_comes_before_an_index(tmp_path):
    save_file({"c": torch.ones(1)}, sharded(tmp_path / "m") / SINGLE_FILE)
    assert WeightStore.from_directory(tmp_path / "m").names() == ["c"]


def test_missing_shard(tmp_path):
    (sharded(tmp_path / "m") / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightError, match="missing") as caught:
        WeightStore.from_directory(tmp_path / "m")
    assert "model-00002-of-00002" in str(caught.value)


def test_truncated_shard(tmp_path):
    shard = sharded(tmp_path / "m") / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightError, match="truncated") as caught:
        WeightStore.from_directory(tmp_path / "m")
    assert "model-00002-of-00002.safetensors: b" in str(caught.value)


def test_index_names_a_tensor_that_is_elsewhere(tmp_path):
    first = "model-00001-of-00002.safetensors"
    with pytest.raises(WeightError, match="not in its shard") as caught:
        WeightStore.from_directory(sharded(tmp_path / "m", {"a": first, "b": first}))
    assert f"{first}: b" in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"weight_map": ["a"]}', b'{"weight_map": {"a": 1}}', b"\xff"])
def test_damaged_index(tmp_path, text):
    (sharded(tmp_path / "m") / INDEX_FILE).write_bytes(text)
    with pytest.raises(WeightError) as caught:
        WeightStore.from_directory(tmp_path / "m")
    assert INDEX_FILE in str(caught.value.where)


@pytest.mark.parametrize(
    "kind", ["absolute", "absolute inside", "parent", "hidden parent", "parent and back", "backslash", "empty", "nul"]
)
def test_index_names_a_path_outside(tmp_path, kind):
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    shard = {
        "absolute": str(tmp_path / "out.safetensors"),
        "absolute inside": str(tmp_path / "m" / "model-00001-of-00002.safetensors"),
        "parent": "../out.safetensors",
        "hidden parent": "x/../../out.safetensors",
        "parent and back": "../m/model-00001-of-00002.safetensors",
        "backslash": "..\\out.safetensors",
        "empty": "",
        "nul": "a\0b",
    }[kind]
    with pytest.raises(WeightError, match="outside") as caught:
        WeightStore.from_directory(sharded(tmp_path / "m", {"a": shard}))
    assert INDEX_FILE in str(caught.value.where)


@pytest.mark.parametrize("name", [SINGLE_FILE, "model-00001-of-00002.safetensors"])
def test_a_link_that_leads_outside(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    path = sharded(tmp_path / "m") / name
    path.unlink(missing_ok=True)
    path.symlink_to("../out.safetensors")
    with pytest.raises(WeightError, match="outside") as caught:
        WeightStore.from_directory(tmp_path / "m")
    assert "out.safetensors" in str(caught.value.got)


def test_a_link_to_itself(tmp_path):
    tmp_path.joinpath(SINGLE_FILE).symlink_to(SINGLE_FILE)
    with pytest.raises(WeightError):
        WeightStore.from_directory(tmp_path)


def test_links_inside_the_directory_and_within_a_hub_cache(tmp_path):
    root = sharded(tmp_path / "m")
    root.joinpath(SINGLE_FILE).symlink_to("model-00001-of-00002.safetensors")
    assert WeightStore.from_directory(root).names() == ["a"]

    cache = tmp_path / "models--some--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0123").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, cache / "blobs" / "beef")
    (cache / "snapshots" / "0123" / SINGLE_FILE).symlink_to("../../blobs/beef")
    assert WeightStore.from_directory(cache / "snapshots" / "0123").read("a").tolist() == [1, 1]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(WeightError, match="pickled") as caught:
        WeightStore.from_directory(tmp_path)
    assert name in str(caught.value.got)
    assert "safe_serialization" in str(caught.value.remedy)


def test_shards_without_an_index(tmp_path):
    (sharded(tmp_path / "m") / INDEX_FILE).unlink()
    with pytest.raises(WeightError, match="no index"):
        WeightStore.from_directory(tmp_path / "m")


def test_no_weights_and_no_directory(tmp_path):
    with pytest.raises(WeightError, match="no weights"):
        WeightStore.from_directory(tmp_path)
    with pytest.raises(InputError, match="not a model directory"):
        WeightStore.from_directory(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("path", "is_name"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("a.b/c-d_e", True),
        ("./nowhere", False),
        ("/no/where", False),
        ("nowhere", False),
        ("a/b/c", False),
        ("../a", False),
        ("docs/nowhere", False),
    ],
)
def test_a_name_on_the_hub_is_no_directory(path, is_name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    error = no_directory(Path(path))
    assert "nothing is downloaded" in str(error.got)
    wanted = f"hf download {path} --local-dir {Path(path).name}, and give {Path(path).name}"
    assert str(error.remedy).endswith(wanted) is is_name
    assert ("hf download" in str(error.remedy)) is is_name


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert no_directory(tmp_path / "model.gguf").got == "a file"


def test_shards_may_hold_more_than_the_index_names(tmp_path):
    """Transformers loads what they hold."""
    root = sharded(tmp_path / "m", {"a": "model-00001-of-00002.safetensors"})
    save_file({"a": torch.arange(3.0), "c": torch.ones(2)}, root / "model-00001-of-00002.safetensors")
    assert WeightStore.from_directory(root).names() == ["a", "c"]
