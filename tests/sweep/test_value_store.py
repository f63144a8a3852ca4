import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from torch import fx

from qcompiler.errors import ResourceError
from qcompiler.sweep.value_store import ValueStore

VALUES = {
    "float32": torch.randn(3, 5),
    "bfloat16": torch.randn(2, 3, 4).bfloat16(),
    "float16": torch.randn(7).half(),
    "float64": torch.randn(2, 2, dtype=torch.float64),
    "int64": torch.arange(6).reshape(2, 3),
    "bool": torch.tensor([[True, False, True]]),
    "transposed": torch.randn(4, 6).T,
    "strided": torch.randn(4, 6)[:, ::2],
    "expanded": torch.randn(1, 6).expand(3, 6),
    "empty": torch.empty(2, 0, 3),
    "scalar": torch.tensor(2.5),
    "bfloat16 scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "bool scalar": torch.tensor(True),
    "size": 12,
}


def nodes(count: int) -> list[fx.Node]:
    graph = fx.Graph()
    return [graph.placeholder(f"n{i}") for i in range(count)]


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[[int], ValueStore]]:
    with ExitStack() as stack:
        yield lambda budget: stack.enter_context(closing(ValueStore(budget, tmp_path)))
    assert not list(tmp_path.iterdir())


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize("budget", [0, 100, 1 << 30])
def test_the_same_values_come_back(make_store, budget):
    store = make_store(budget)
    given = dict(zip(nodes(len(VALUES)), VALUES.values(), strict=True))
    stored = store.put(given)
    for _ in range(2):
        found = store.get(stored)
        assert list(found) == list(given)
        for node, value in given.items():
            if isinstance(value, torch.Tensor):
                assert found[node].dtype == value.dtype
                assert found[node].shape == value.shape
                assert torch.equal(found[node], value)
            else:
                assert found[node] == value


@pytest.mark.parametrize(("budget", "in_memory"), [(0, 0), (150, 100), (199, 100), (200, 200), (1 << 20, 300)])
def test_values_go_to_disk_beyond_the_budget(make_store, tmp_path, budget, in_memory):
    store = make_store(budget)
    stored = [store.put({node: torch.randn(25)}) for node in nodes(3)]
    assert sum(item.bytes_in_memory for item in stored) == in_memory
    assert store.bytes_spilled == 300 - in_memory
    assert sum(path.stat().st_size for path in files(tmp_path)) == 300 - in_memory


def test_dropping_makes_room(make_store, tmp_path):
    store = make_store(100)
    node, other = nodes(2)
    first = store.put({node: torch.randn(25), other: torch.randn(25)})
    assert len(files(tmp_path)) == 1
    store.drop(first)
    assert not files(tmp_path)
    second = store.put({node: torch.randn(25)})
    assert second.bytes_in_memory == 100
    assert not files(tmp_path)
    assert store.bytes_spilled == 100


def test_a_file_is_not_the_tensor_it_came_from(make_store):
    store = make_store(0)
    (node,) = nodes(1)
    value = torch.zeros(3)
    stored = store.put({node: value})
    value += 1
    store.get(stored)[node].add_(5)
    assert store.get(stored)[node].tolist() == [0, 0, 0]


def test_full_disk(make_store, tmp_path):
    store = make_store(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="do not fit on the disk"):
            store.put({nodes(1)[0]: torch.randn(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not files(tmp_path)


def test_a_file_that_was_cut_short(make_store, tmp_path):
    store = make_store(0)
    stored = store.put({nodes(1)[0]: torch.randn(100)})
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ResourceError, match="cut short"):
        store.get(stored)


@pytest.mark.gpu
def test_values_return_to_their_device(make_store):
    store = make_store(0)
    (node,) = nodes(1)
    value = torch.randn(4, device="cuda")
    found = store.get(store.put({node: value}))[node]
    assert found.device == value.device
    assert torch.equal(found, value)
