"""How long a launch takes: by CUDA graphs on a GPU, by the clock on a CPU."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from benchmarks.kernels.protocol import REPLAYS, per_launch, rounds_needed

__all__ = ["Call", "ClockTimer", "GraphTimer", "Timer", "copy_bandwidth", "launch_floor", "timer_for"]

Call = Callable[[], Any]


class Timer(Protocol):
    """Measures calls that do the same work on different operands."""

    description: str

    def measure(self, calls: Sequence[Call]) -> float:
        """Seconds per call."""
        ...


class GraphTimer:
    """CUDA graphs: each holds every call once per round; replays are queued without a gap, events between them."""

    description = f"CUDA graphs, median of {REPLAYS} replays or more"

    def measure(self, calls: Sequence[Call]) -> float:
        """Seconds per call, without what Python and the driver take to launch it.

        The calls are made once outside a graph first, so that kernels are compiled and libraries hold their workspace.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = _capture(calls, 1)
        _replay(graph, 1)  # the first uploads the graph
        rounds = rounds_needed(min(_replay(graph, 3)))
        if rounds > 1:
            graph.reset()
            graph = _capture(calls, rounds)
            _replay(graph, 1)
        seconds = per_launch(_replay(graph, REPLAYS), len(calls) * rounds)
        graph.reset()
        return seconds


def _capture(calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


class ClockTimer:
    """The clock of the process. For trying the benchmark where there is no GPU; its figures say nothing about one."""

    description = "clock of a CPU: no GPU figure"

    def __init__(self, replays: int = 3) -> None:
        self.replays = replays

    def measure(self, calls: Sequence[Call]) -> float:
        """Seconds per call, Python included."""
        calls[0]()
        taken = []
        for _ in range(self.replays):
            start = time.perf_counter()
            for call in calls:
                call()
            taken.append(time.perf_counter() - start)
        return per_launch(taken, len(calls))


def timer_for(device: torch.device) -> Timer:
    """Graphs on CUDA, the clock elsewhere."""
    return GraphTimer() if device.type == "cuda" else ClockTimer()


def copy_bandwidth(timer: Timer, device: torch.device) -> float:
    """Bytes read and written per second by copying a tensor: 1 GiB on a GPU, 32 MiB on a CPU."""
    size = 1 << (30 if device.type == "cuda" else 25)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / timer.measure([lambda: target.copy_(source)])


def launch_floor(timer: Timer, device: torch.device) -> float:
    """Seconds of a launch that does nothing: an empty Triton kernel on a GPU, an addition of one number on a CPU."""
    x = torch.zeros(1, device=device)
    if device.type == "cuda":
        from benchmarks.kernels.empty_triton import launch

        return timer.measure([lambda: launch(x)] * 64)
    return timer.measure([lambda: x.add_(1)] * 64)
