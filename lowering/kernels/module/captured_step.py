"""Beside the model, on CUDA: decoding steps as CUDA graphs.

What Python and the driver take to launch some hundred kernels is paid once.

A step that is replayed reads and writes what lay at the same addresses when it was captured. So its token ids have a
buffer of their own, and positions and lengths come from ``start`` on the device, which the graph itself moves on. Only
a module that asks nothing of the host can be captured: `obstacles` goes through its nodes.

None of this has run on a GPU yet: tests on the CPU replay what a made-up graph has recorded, and the test that compares
captured with eager steps bit for bit waits for a GPU.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qcompiler.errors import InputError, TargetError
from qcompiler.lowering.kernels.cache.decode_attention import MOST_QUERIES
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention

if TYPE_CHECKING:
    from qcompiler.lowering.kernels.module.model import KernelCache, KernelModel

__all__ = ["CapturedStep", "CapturingModel", "obstacles", "refuse"]

_canonical = torch.ops.qcompiler
_WARM_UP = 3  # kernels are compiled and loaded by the first run, workspaces of libraries allocated by it or the next
_SYNCHRONIZING = (_canonical.take_expert.default, _canonical.merge_experts.default)
_TAGS = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def obstacles(module: fx.GraphModule, are_buffers: list[bool]) -> Iterator[str]:
    """Why a lowered module cannot be captured, in words; nothing if it can.

    Args:
        module: of `qcompiler.lowering.kernels.module.build`: its third input is the number of tokens in the caches.
        are_buffers: which of its caches are written in place.
    """
    if not are_buffers:
        yield "it has no cache"
    for index, is_buffer in enumerate(are_buffers):
        if not is_buffer:
            yield f"cache {index} is not written in place"
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    counts = {placeholders[2]}  # the number of tokens so far, and what is computed from it on the host
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, CachedAttention) and not layer.choice.is_fused:
            yield f"{node.name} is not fused: {layer.choice.reason}"
        elif node.op == "call_function" and _asks_the_host(node.target):
            yield f"{node.name} has a shape that depends on values"
        given = counts.intersection(node.all_input_nodes)
        if given and getattr(node.target, "__module__", "") == "_operator":
            counts.add(node)
        elif given and not (isinstance(layer, CachedAttention) and given == {node.args[2]}):
            yield f"{node.name} depends on the number of tokens in the cache"


def _asks_the_host(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return target in _SYNCHRONIZING or any(tag in tags for tag in _TAGS)


def refuse(model: "KernelModel") -> None:
    """Refuses a model whose steps cannot be captured.

    Raises:
        TargetError: saying why.
    """
    remedy = "decode without cuda_graph"
    if not _has_graphs(model.device):
        raise TargetError(
            "decoding steps are captured on CUDA alone", where="cuda_graph", got=model.device, remedy=remedy
        )
    found = list(obstacles(model.module, [slot.is_buffer for slot in model.slots]))
    if found:
        raise TargetError(
            "a decoding step of this model cannot be captured",
            where="cuda_graph",
            got="; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else ""),
            expected="caches written in place, fused attention, and no shape that depends on values",
            remedy=remedy,
        )


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


class CapturedStep:
    """Appends tokens to one cache, by replaying a CUDA graph of the step.

    Called with other numbers of tokens or sequences, or when buffers have been replaced (because they were full, or by
    whoever holds the cache), it captures again. Steps that are not captured may be made with the same cache between.

    This has not run on a GPU yet.

    Args:
        model: on CUDA.
        cache: as `KernelModel.prefill` gives it; changed in place.

    Attributes:
        captures: how often a step has been captured.

    Raises:
        TargetError: if steps of this model cannot be captured.
    """

    def __init__(self, model: "KernelModel", cache: "KernelCache") -> None:
        refuse(model)
        self.cache = cache
        self.captures = 0
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None
        self._key: tuple[Any, ...] = ()

    def __call__(self, ids: Tensor) -> Tensor:
        """float32 logits ``[batch, new, vocab]`` of int64 ``[batch, new]``; the next call overwrites them.

        Raises:
            InputError: for more tokens than fused attention takes, or than the model does.
        """
        new = ids.shape[1]
        if not 1 <= new <= MOST_QUERIES:
            raise InputError(
                "a captured step is for few tokens", got=new, expected=f"1 to {MOST_QUERIES}", remedy="use step"
            )
        model, cache = self._model, self.cache
        model.make_room(cache, new)
        with torch.cuda.device(model.device):
            key = (tuple(ids.shape), cache.start.data_ptr(), *((t.data_ptr(), t.shape) for t in cache.tensors))
            if self._graph is None or key != self._key:
                self._capture(ids)
                self._key = key
            assert self._graph is not None
            self._ids.copy_(ids)
            self._graph.replay()
        cache.length += new
        return self._logits

    def _capture(self, ids: Tensor) -> None:
        """Records the step. Warming up writes the rows that replaying will write, and leaves ``start`` where it was."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._ids = ids.to(self._model.device, copy=True, memory_format=torch.contiguous_format)
        before = self.cache.start.clone()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            for _ in range(_WARM_UP):
                self._run()
                self.cache.start.copy_(before)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream), torch.no_grad():
            self._logits = self._run()
        self._graph = graph
        self.captures += 1

    def _run(self) -> Tensor:
        cache = self.cache
        (logits,) = self._model.module(self._ids, cache.start, cache.length, *cache.tensors)
        cache.start += self._ids.shape[1]
        found: Tensor = logits
        return found


class CapturingModel:
    """A model whose `step` is captured, and in all else the model itself; for `qcompiler.artifacts.generation`.

    Logits that `step` gives are overwritten by the next.

    Args:
        model: on CUDA.

    Raises:
        TargetError: if its steps cannot be captured.
    """

    def __init__(self, model: "KernelModel") -> None:
        refuse(model)
        self._model = model
        self._step: CapturedStep | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """As `KernelModel.step`."""
        if self._step is None or self._step.cache is not cache:
            self._step = self._model.capture_step(cache)
        return self._step(ids), cache
