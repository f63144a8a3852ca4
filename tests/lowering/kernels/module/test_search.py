"""The search over a model's own operators, with kernels that do nothing but ask for their configuration."""

import contextlib
import operator
from dataclasses import dataclass

import pytest
import torch

import qcompiler as qc
from qcompiler.lowering.kernels.launch.tuning import (
    TuningCache,
    cache_path,
    found,
    row_bucket,
)
from qcompiler.lowering.kernels.module import search
from qcompiler.lowering.kernels.module.model import KernelModel
from qcompiler.lowering.kernels.module.search import tune
from qcompiler.passes import RTN
from tests.tiny_graphs import language_model


@dataclass(frozen=True)
class Config:
    block: int


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    graph = qc.compile(language_model(width=32), [RTN(bits=8)]).graph
    model = KernelModel(graph, torch.device("cpu"), torch.bfloat16)
    model.max_positions = 64
    return model


def test_every_kernel_is_searched_for_once_at_every_number_of_rows(model, monkeypatch):
    launched = []

    def launch(x, *arguments):
        config = found(x.device, "product", (row_bucket(len(x)),), Config, lambda: [Config(8), Config(16)])
        launched.append((len(x), config.block if config else 0))
        return x.new_zeros(len(x), arguments[0].shape[0])

    real = torch.ops.qcompiler_kernels.weight_only_linear
    monkeypatch.setattr(torch.ops.qcompiler_kernels, "weight_only_linear", launch)
    times = []

    def measure(run):
        times.append(run())
        return float(len(times) % 2)  # the second is the fastest

    chosen = tune(model, measure, rows=(1, 4, 1000), device="gpu")
    assert chosen == {"product|1": Config(16), "product|4": Config(16)}
    assert len(times) == 4  # two candidates at two numbers of rows, in the first of fourteen layers
    assert sum(block == 0 for _, block in launched) >= 2 * 14
    assert TuningCache(cache_path()).get("gpu", "product", (4,), Config) == Config(16)
    monkeypatch.setattr(torch.ops.qcompiler_kernels, "weight_only_linear", real)
    assert torch.isfinite(model(torch.tensor([[1, 2]]))).all()


def test_a_launch_that_fails_takes_for_ever(monkeypatch):
    benchmarked = []
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **options: benchmarked.append(run()) or 2.5)
    assert search.seconds_on_cuda(lambda: 1) == 2.5e-3
    assert search.seconds_on_cuda(lambda: operator.truediv(1, 0)) == float("inf")
    assert benchmarked == [1]


def test_launches_are_timed_without_what_python_takes_for_them(monkeypatch):
    events, timed = [], []

    class Graph:
        def replay(self):
            events.append("replayed")

    @contextlib.contextmanager
    def record(graph):
        events.append("recording")
        yield
        events.append("recorded")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **options: timed.append(run()) or 2.0)
    assert search.seconds_on_cuda(lambda: events.append("launched")) == 2e-3
    assert events == ["launched", "recording", "launched", "recorded", "replayed"]

    @contextlib.contextmanager
    def refuse(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    del events[:]
    assert search.seconds_on_cuda(lambda: events.append("launched")) == 2e-3
    assert events == ["launched"] * 3
