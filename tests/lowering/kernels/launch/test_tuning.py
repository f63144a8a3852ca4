"""Launch configurations: kept on disk, found again, searched for."""

import json
from dataclasses import dataclass

import pytest
import torch

from qcompiler.lowering.kernels.launch import tuning
from qcompiler.lowering.kernels.launch.tuning import (
    TuningCache,
    cache_path,
    found,
    row_bucket,
    search_launches,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    block: int
    warps: int = 4


@dataclass(frozen=True)
class Renamed:
    tile: int


CANDIDATES = [Config(16), Config(32), Config(64, 8)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    return tmp_path


def test_rows_share_configurations_by_powers_of_two():
    assert [row_bucket(n) for n in (0, 1, 2, 3, 5, 64, 65, 5000)] == [1, 1, 2, 4, 8, 64, 128, 4096]


def test_the_fastest_is_kept_and_found_by_another_process():
    times = {16: 3.0, 32: 1.0, 64: float("inf")}
    best = TuningCache(cache_path()).search("gpu", "product", (1, "int4"), CANDIDATES, lambda c: times[c.block])
    assert best == Config(32)
    again = TuningCache(cache_path())
    assert again.get("gpu", "product", (1, "int4"), Config) == Config(32)
    for device, kernel, key in (("other", "product", (1, "int4")), ("gpu", "x", (1, "int4")), ("gpu", "product", (2,))):
        assert again.get(device, kernel, key, Config) is None


def test_the_place_is_that_of_the_environment(folder, monkeypatch):
    assert cache_path() == folder / "tuning.json"
    monkeypatch.delenv("QCOMPILER_CACHE")
    assert cache_path().parts[-3:] == (".cache", "qcompiler", "tuning.json")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_file_counts_as_empty_and_is_replaced(folder, content):
    (folder / "tuning.json").write_text(content)
    cache = TuningCache(cache_path())
    assert cache.get("gpu", "product", (), Config) is None
    cache.search("gpu", "product", (), CANDIDATES[:1], lambda c: 1.0)
    assert json.loads((folder / "tuning.json").read_text()) == {"gpu|product": {"block": 16, "warps": 4}}
    assert list(folder.iterdir()) == [folder / "tuning.json"]


def test_fields_of_another_version_are_not_found():
    TuningCache(cache_path()).search("gpu", "product", (), CANDIDATES, lambda c: c.block)
    assert TuningCache(cache_path()).get("gpu", "product", (), Renamed) is None


def launcher(log, rows, kernel="product"):
    """What a kernel's launcher does about its configuration."""
    config = found(CPU, kernel, (rows,), Config, lambda: CANDIDATES) or Config(128)
    log.append((kernel, rows, config.block))


def test_without_a_search_a_launcher_takes_its_default():
    log = []
    launcher(log, 1)
    assert log == [("product", 1, 128)]


def test_a_search_tries_every_candidate_of_every_kernel():
    log, measured = [], []

    def run():
        launcher(log, 1)
        launcher(log, 4)
        found(CPU, "unsearched", (), Config)

    def measure(function):
        del log[:]
        function()
        measured.append(tuple(log))
        return {16: 2.0, 32: 3.0, 64: 1.0, 128: 0.0}[min(block for _, _, block in log)]

    chosen = search_launches(run, measure, "gpu")
    assert chosen == {"product|1": Config(64, 8), "product|4": Config(64, 8)}
    assert measured[:3] == [(("product", 1, b), ("product", 4, 128)) for b in (16, 32, 64)]
    assert measured[3:] == [(("product", 1, 128), ("product", 4, b)) for b in (16, 32, 64)]
    assert TuningCache(cache_path()).get("gpu", "product", (4,), Config) == Config(64, 8)
    launcher(log, 1)
    assert log[-1] == ("product", 1, 128)  # the search is over


def test_what_is_known_is_not_searched_for():
    log = []
    run = lambda: (launcher(log, 1), launcher(log, 4))  # noqa: E731
    assert search_launches(run, lambda f: f() and 1.0, "gpu", {"product|1"}) == {"product|4": Config(16)}
    assert ("product", 1, 16) not in log


def test_two_processes_do_not_undo_each_other():
    first, second = TuningCache(cache_path()), TuningCache(cache_path())
    for cache in (first, second):
        assert cache.get("gpu", "product", (1,), Config) is None
    first.search("gpu", "product", (1,), CANDIDATES, lambda c: c.block)
    second.search("gpu", "product", (2,), CANDIDATES, lambda c: c.block)
    assert len(json.loads(cache_path().read_text())) == 2


def test_on_cuda_what_was_found_is_looked_up_once(monkeypatch):
    monkeypatch.setattr(tuning, "device_name", lambda device: "gpu")
    reads = []
    monkeypatch.setattr(TuningCache, "_read", lambda self: reads.append(1) or {"gpu|product|1": {"block": 7}})
    cuda = torch.device("cuda")
    assert [found(cuda, "product", (1,), Config) for _ in range(3)] == [Config(7)] * 3
    assert len(reads) == 1


def test_a_failing_search_leaves_nothing_behind():
    with pytest.raises(RuntimeError, match="broken"):
        search_launches(lambda: (_ for _ in ()).throw(RuntimeError("broken")), lambda f: 1.0, "gpu")
    log = []
    launcher(log, 1)
    assert log == [("product", 1, 128)]


def test_a_place_that_cannot_be_written_serves_the_process(folder, monkeypatch, caplog):
    (folder / "file").write_text("no folder")
    monkeypatch.setenv("QCOMPILER_CACHE", str(folder / "file"))
    monkeypatch.setattr(tuning, "device_name", lambda device: "gpu")
    run = lambda: (launcher([], 1), launcher([], 4))  # noqa: E731
    assert set(search_launches(run, lambda f: f() and 1.0, "gpu")) == {"product|1", "product|4"}
    assert "serve this process alone" in caplog.text
    cuda = torch.device("cuda")
    assert [found(cuda, "product", (rows,), Config, lambda: CANDIDATES) for rows in (1, 4)] == [Config(16)] * 2


def test_a_file_that_is_not_replaced_leaves_nothing_beside_it(folder, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(PermissionError("denied")))
    TuningCache(cache_path()).search("gpu", "product", (), CANDIDATES, lambda c: c.block)
    assert list(folder.iterdir()) == []


def test_what_is_no_candidate_any_more_is_not_launched(monkeypatch):
    monkeypatch.setattr(tuning, "device_name", lambda device: "gpu")
    for row, kept in ((1, Config(7)), (2, CANDIDATES[1])):
        TuningCache(cache_path()).search("gpu", "product", (row,), [kept], lambda c: 1.0)
    cuda = torch.device("cuda")
    assert found(cuda, "product", (1,), Config, lambda: CANDIDATES) is None
    assert found(cuda, "product", (2,), Config, lambda: CANDIDATES) == CANDIDATES[1]


def test_the_version_of_triton_does_not_depend_on_the_name_it_was_installed_under(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(LookupError(name)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    assert tuning.device_name(torch.device("cuda", 71)) == f"a card, triton {triton.__version__}"
