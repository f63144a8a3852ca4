import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcompiler.errors import InputError, ResourceError, WeightError
from qcompiler.storage.stored_tensor import stack
from qcompiler.storage.weights import TensorInfo, WeightStore


def transposed(w: torch.Tensor) -> torch.Tensor:
    return w.t()


def small() -> WeightStore:
    return WeightStore.from_tensors(
        {"w": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3, dtype=torch.int64), "m": torch.tensor(True)}
    )


def test_from_tensors():
    store = small()
    assert store.names() == ["w", "b", "m"]
    assert "w" in store
    assert "x" not in store
    assert len(store) == 3
    assert store.info("w") == TensorInfo("w", "float32", (2, 3), 24)
    assert store.info("m") == TensorInfo("m", "bool", (), 1)
    assert store.read("b").tolist() == [0, 1, 2]
    assert store.stored_bytes() == 24 + 24 + 1
    assert store.stored_bytes(["b"]) == 24


def test_parameters_are_held_without_their_gradient():
    module = torch.nn.Linear(3, 2)
    store = WeightStore.from_tensors(dict(module.named_parameters()))
    assert not store.read("weight").requires_grad
    assert torch.equal(store.read("weight"), module.weight.detach())


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.read("x"),
        lambda s: s.info("x"),
        lambda s: s.remove("x"),
        lambda s: s.rename("x", "y"),
        lambda s: s.alias("y", of="x"),
        lambda s: s.tied("x"),
        lambda s: s.stored_bytes(["x"]),
        lambda s: s.derive("y", ("x",), transposed, dtype="float32", shape=(1,)),
        lambda s: s.save("nowhere", names=["x"]),
    ],
)
def test_an_unknown_name_is_an_error(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = small()
    with pytest.raises(WeightError, match="no such tensor") as caught:
        use(store)
    assert caught.value.where == "x"
    assert store.names() == ["w", "b", "m"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "__metadata__"])
def test_a_name_the_file_format_has_no_room_for(name):
    store = small()
    for use in (
        lambda: store.set(name, torch.ones(1)),
        lambda: store.alias(name, of="w"),
        lambda: store.rename("w", name),
        lambda: store.derive(name, (), lambda: torch.ones(1), dtype="float32", shape=(1,)),
    ):
        with pytest.raises(WeightError, match="not a name"):
            use()


def test_set_replaces_and_remove_forgets():
    store = small()
    store.set("w", torch.ones(1))
    assert store.read("w").tolist() == [1]
    store.remove("w")
    assert "w" not in store


def test_rename():
    store = small()
    store.rename("w", "v")
    assert "w" not in store
    assert store.read("v").shape == (2, 3)
    with pytest.raises(WeightError, match="taken"):
        store.rename("v", "b")
    assert store.read("b").tolist() == [0, 1, 2]
    store.rename("v", "v")
    assert "v" in store


def test_derive_in_place_composes_and_computes_at_each_read():
    store, calls = small(), []

    def doubled(w: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return w * 2

    store.derive("w", ("w",), transposed, dtype="float32", shape=(3, 2))
    store.derive("w", ("w",), doubled, dtype="float32", shape=(3, 2))
    assert calls == []
    assert store.info("w") == TensorInfo("w", "float32", (3, 2), 24)
    for _ in range(2):
        assert torch.equal(store.read("w"), torch.arange(6.0).reshape(2, 3).t() * 2)
    assert len(calls) == 2


def test_derived_tensors_keep_their_source():
    store = small()
    store.derive("t", ("w", "b"), lambda w, b: w + b, dtype="float32", shape=(2, 3))
    expected = store.read("t")
    store.rename("w", "other")
    store.set("b", torch.zeros(3, dtype=torch.int64))
    store.remove("other")
    assert torch.equal(store.read("t"), expected)


def test_derived_codes_are_unpacked_for_the_function_and_packed_after():
    store = WeightStore.from_tensors({})
    store.set("q", torch.tensor([[1, -2, 7]], dtype=torch.int8), "int4")
    store.derive("n", ("q",), lambda q: -q, dtype="int4", shape=(1, 3))
    assert store.info("n").nbytes == 2
    assert store.read("n").tolist() == [[-1, 2, -7]]


def test_a_transform_that_breaks_its_promise():
    store = small()
    store.derive("shape", ("w",), transposed, dtype="float32", shape=(2, 3))
    store.derive("dtype", ("w",), transposed, dtype="float16", shape=(3, 2))
    for name in ("shape", "dtype"):
        with pytest.raises(WeightError, match="declared") as caught:
            store.read(name)
        assert caught.value.where == name
    with pytest.raises(WeightError, match="unknown dtype"):
        store.derive("x", ("w",), transposed, dtype="int32x", shape=(3, 2))


def test_alias_is_one_tensor_until_set():
    store = small()
    store.alias("head", of="w")
    assert store.tied("w") == ("head",)
    assert store.tied("b") == ()
    assert store.stored_bytes() == small().stored_bytes()
    store.rename("w", "embed")
    assert store.tied("head") == ("embed",)
    store.set("embed", torch.zeros(1))
    assert store.tied("head") == ()
    assert store.read("head").shape == (2, 3)


def test_tensors_that_share_memory_are_tied():
    w = torch.arange(12.0).reshape(3, 4)
    store = WeightStore.from_tensors(
        {"a": w, "b": torch.nn.Parameter(w), "t": w[:, :3].t(), "u": w[:, :3], "row": w[0], "c": w.clone()}
    )
    assert store.tied("a") == ("b",)
    assert all(store.tied(name) == () for name in ("t", "u", "row", "c"))
    assert WeightStore.from_tensors({"a": torch.empty(0), "b": torch.empty(0)}).tied("a") == ()


def test_spill_frees_memory_and_keeps_every_value(tmp_path):
    store = small()
    store.alias("head", of="w")
    store.derive("w", ("w",), transposed, dtype="float32", shape=(3, 2))  # the first w is needed twice
    store.set("q", torch.tensor([[1, -2, 3]], dtype=torch.int8), "int4")
    store.set("b", torch.ones(2))
    store.derive("b", ("b",), lambda b: b + 1, dtype="float32", shape=(2,))
    store.set("b2", torch.ones(2))
    store.rename("b2", "x")
    store.set("b2", torch.zeros(2))
    before = {name: store.read(name) for name in store.names()}
    infos, fingerprint = [store.info(name) for name in store.names()], store.fingerprint()

    path = store.spill(tmp_path, "overlay")
    assert path == tmp_path / "overlay.safetensors"
    assert [item.name for item in tmp_path.iterdir()] == ["overlay.safetensors"]
    assert {"w", "b", "m", "q", "b2", "b2~1"} == set(load_file(path))
    assert [store.info(name) for name in store.names()] == infos
    assert all(torch.equal(store.read(name), value) for name, value in before.items())
    assert store.fingerprint() == fingerprint
    path.unlink()
    for name in store.names():  # every one of them is read from the file now
        with pytest.raises(WeightError, match="missing"):
            store.read(name)


def test_spill_twice(tmp_path):
    store = small()
    store.spill(tmp_path, "a")
    store.set("w", torch.ones(2))
    with pytest.raises(InputError, match="overwritten"):
        store.spill(tmp_path, "a")
    assert set(load_file(store.spill(tmp_path, "b"))) == {"w"}
    assert store.read("b").tolist() == [0, 1, 2]
    assert load_file(store.spill(tmp_path, "c")) == {}
    for stem in ("../up", "x/y", ".hidden"):
        with pytest.raises(InputError, match="not a file name"):
            store.spill(tmp_path, stem)


def test_spill_replaces_what_another_run_left(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    store = small()
    store.spill(tmp_path, "a")
    assert store.read("b").tolist() == [0, 1, 2]


def test_a_failed_spill_changes_nothing(tmp_path, monkeypatch):
    store = small()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ResourceError):
        store.spill(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
    assert store.read("b").tolist() == [0, 1, 2]


def test_fingerprint_depends_on_content_not_on_files(tmp_path, monkeypatch):
    monkeypatch.setattr("qcompiler.storage.safetensors_io._CHUNK_BYTES", 1000)  # strided tensors come in pieces
    value = torch.arange(100_000.0)

    def of(tensors: dict[str, torch.Tensor]) -> str:
        return WeightStore.from_tensors(tensors).fingerprint()

    same = of({"a": value, "b": torch.ones(2)})
    assert of({"b": torch.ones(2), "a": value.clone()}) == same
    assert of({"a": torch.stack([value, value], 1)[:, 0], "b": torch.ones(2)}) == same  # strided
    save_file({"a": value, "b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert WeightStore.from_directory(tmp_path).fingerprint() == same
    derived = WeightStore.from_tensors({"b": torch.ones(2)})
    derived.derive("a", (), lambda: torch.arange(100_000.0), dtype="float32", shape=(100_000,))
    assert derived.fingerprint() == same

    last, first = value.clone(), value.clone()
    last[-1], first[0] = -1, -1
    others = [
        {"a": value, "c": torch.ones(2)},
        {"a": value, "b": torch.ones(2, 1)},
        {"a": value, "b": torch.ones(2).view(torch.int32)},
        {"a": value},
        {"a": last, "b": torch.ones(2)},
        {"a": first, "b": torch.ones(2)},
        {"a": value + 1, "b": torch.ones(2)},
    ]
    assert len({same, *map(of, others)}) == 1 + len(others)


PEAK = """
import sys, torch
from pathlib import Path
from qcompiler.storage.weights import WeightStore

def status(key):  # MiB
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024

def growth(action):  # of the resident set, at its highest; writing 5 resets the high-water mark
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before

def read_all():
    for name in saved.names():
        assert saved.read(name)[-1, -1] == float(name[1:])

out, count, columns, rows = Path(sys.argv[1]), int(sys.argv[2]), 2048, 1024  # float32: 8 MiB
small = WeightStore.from_tensors({"w": torch.ones(3, 2)})
small.derive("t", ("w",), torch.t, dtype="float32", shape=(2, 3))
small.save(out / "warm")  # touches the code that the measured calls run
store = WeightStore.from_tensors({})
for i in range(count):
    made = lambda i=i: torch.full((rows, columns), float(i))
    store.derive(f"t{i:02d}", (), made, dtype="float32", shape=(rows, columns))
save = growth(lambda: store.save(out / "a"))
saved = WeightStore.from_directory(out / "a")
read = growth(read_all)
for name in saved.names():
    saved.derive(name, (name,), torch.t, dtype="float32", shape=(columns, rows))
print(save, read, growth(lambda: saved.save(out / "b", max_shard_bytes=20 << 20)))
"""


def peak_growths(out: Path, count: int) -> list[float]:
    """MiB that saving, reading and saving transposes of ``count`` tensors of 8 MiB add to a process of its own."""
    # With a fixed threshold freed tensors go back to the system at once: the allocator's habits are not measured.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(out), str(count)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [float(value) for value in done.stdout.split()]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak")
def test_memory_is_that_of_one_tensor_however_many_there_are(tmp_path):
    save, read, transpose = peak_growths(tmp_path, 8)
    assert 7 < save < 8 + 3
    assert 7 < read < 8 + 3
    assert 7 < transpose < 8 + 1 + 3  # one, and the part that is being laid out anew


def test_a_slice_of_a_file_is_read_alone(tmp_path: Path) -> None:
    whole = torch.randn(3, 4, 5)
    WeightStore.from_tensors({"w": whole, "flags": torch.tensor([[True], [False]])}).save(tmp_path)
    store = WeightStore.from_directory(tmp_path)
    store.slice("w.1", "w", 1)
    store.slice("flag", "flags", 0)
    assert (store.info("w.1").shape, store.info("w.1").dtype, store.info("w.1").nbytes) == ((4, 5), "float32", 80)
    assert torch.equal(store.read("w.1"), whole[1])
    assert store.read("flag").tolist() == [True]
    store.set("w", torch.zeros(3, 4, 5))
    assert torch.equal(store.read("w.1"), whole[1])  # what its source's name stood for when it was defined
    for index in (-1, 3):
        with pytest.raises(WeightError, match="no such slice"):
            store.slice("none", "w", index)


def test_a_slice_of_anything_else() -> None:
    store = WeightStore.from_tensors({"w": torch.arange(6.0).reshape(2, 3)})
    store.derive("twice", ("w",), lambda w: 2 * w, dtype="float32", shape=(2, 3))
    store.slice("row", "twice", 1)
    assert store.read("row").tolist() == [6.0, 8.0, 10.0]
    store.set("codes", torch.tensor([[1, -2, 3], [4, -5, 6]], dtype=torch.int8), "int4")
    store.slice("code", "codes", 1)
    assert (store.info("code").dtype, store.read("code").tolist()) == ("int4", [4, -5, 6])


def test_a_slice_of_a_stack_is_the_part() -> None:
    store = WeightStore.from_tensors({"a": torch.ones(2), "b": torch.zeros(2)})
    store.derive("ab", ("a", "b"), stack, dtype="float32", shape=(2, 2), rearranges=True)
    store.slice("second", "ab", 1)
    assert store.tied("second") == ("b",)
    assert torch.equal(store.read("ab"), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_a_copy_is_changed_and_spilled_alone(tmp_path):
    store = WeightStore.from_tensors({"a": torch.ones(2), "b": torch.zeros(3)})
    store.alias("tied", "a")
    store.derive("double", ("a",), lambda a: 2 * a, dtype="float32", shape=(2,))
    other = store.copy()
    assert other.tied("tied") == ("a",)
    other.set("b", torch.ones(3))
    other.remove("tied")
    other.spill(tmp_path, "spilled")
    (tmp_path / "spilled.safetensors").unlink()
    assert store.names() == ["a", "b", "tied", "double"]
    assert store.read("b").tolist() == [0, 0, 0]
    assert store.read("double").tolist() == [2, 2]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (torch.arange(6.0), torch.arange(6.0), True),
        (torch.arange(6.0), torch.arange(6.0).double(), True),
        (torch.arange(6.0), torch.arange(1, 7.0), False),
        (torch.zeros(3), -torch.zeros(3), True),
        (torch.zeros(3), torch.tensor([0.0, 0.0, 1e-40]), False),
        (torch.zeros(3), torch.zeros(1, 3), False),
        (torch.ones(5, 2).bfloat16(), torch.ones(5, 2).bfloat16(), True),
    ],
)
def test_equal_values(tmp_path, monkeypatch, first, second, equal):
    monkeypatch.setattr("qcompiler.storage.stored_tensor._COMPARED_BYTES", 8)
    tensors = WeightStore.from_tensors({"a": first, "b": second})
    tensors.save(tmp_path)
    for store in (tensors, WeightStore.from_directory(tmp_path)):
        assert store.is_equal("a", "b") is equal
        assert store.is_equal("a", "a")
