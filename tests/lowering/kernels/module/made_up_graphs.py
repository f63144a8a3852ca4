"""As much of ``torch.cuda`` as capturing a step needs, on the CPU: operators are recorded, undone, and run again.

A replay calls the recorded operators with the tensors and the numbers they were recorded with, and puts what they give
where the recorded results lie: whatever Python computed in between is not computed again, as with a real graph.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MadeUpGraph:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.calls is not None, "replayed before it was captured, or after it was reset"
        self.replays += 1
        for function, arguments, options, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.calls = None


class _Recorder(TorchDispatchMode):
    """Runs operators to know their results, and remembers what they have overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a value while capturing"
        kwargs = kwargs or {}
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and given is not None:
                self.before.append((given, given.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class MadeUpStream:
    """Knows what it waited for."""

    def __init__(self, waits: list[tuple[Any, Any]]) -> None:
        self._waits = waits

    def wait_stream(self, other: Any) -> None:
        self._waits.append((self, other))


class MadeUpCuda:
    """What to put into ``torch.cuda``, and what was asked of it."""

    def __init__(self) -> None:
        self.graphs: list[MadeUpGraph] = []
        self.streams: list[Any] = []
        self.waits: list[tuple[Any, Any]] = []
        self.current: Any = self.stream()
        self.names = {
            "Stream": self.stream,
            "stream": self.on,
            "current_stream": lambda: self.current,
            "device": lambda device: contextlib.nullcontext(),
            "CUDAGraph": self.new_graph,
            "graph": self.capture,
        }

    def stream(self) -> Any:
        self.streams.append(MadeUpStream(self.waits))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def new_graph(self) -> MadeUpGraph:
        self.graphs.append(MadeUpGraph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def capture(self, graph: MadeUpGraph, stream: Any) -> Iterator[None]:
        recorder = _Recorder()
        with self.on(stream), recorder:
            yield
        for tensor, value in reversed(recorder.before):  # capturing runs nothing
            tensor.copy_(value)
        graph.calls = recorder.calls
