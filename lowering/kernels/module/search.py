"""Beside the model, on CUDA: searches for launch configurations, with the operators and shapes of a model itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompiler.lowering.kernels.launch.tuning import device_name, search_launches
from qcompiler.lowering.kernels.module.model import KernelModel

__all__ = ["ROWS", "seconds_on_cuda", "tune"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of new tokens that are searched for."""

_PAST = 2048

Measure = Callable[[Callable[[], object]], float]


def tune(
    model: KernelModel, measure: Measure | None = None, *, rows: tuple[int, ...] = ROWS, device: str | None = None
) -> dict[str, Any]:
    """Runs a model on as many new tokens as ``rows`` says, and every operator on the way with each configuration.

    The tokens stand behind a cache of 2048 (or half of what the model takes). What was found is kept on disk, and found
    again by every model with layers of these shapes.

    Args:
        model: on CUDA; its operators have no configurations elsewhere.
        measure: seconds that a function takes; `seconds_on_cuda` by default.
        rows: numbers of new tokens.
        device: what results are kept under; that of the model by default.

    Returns:
        The configurations, by kernel and key.
    """
    limit = model.max_positions or 2 * _PAST
    past = min(_PAST, limit // 2) if model.has_cache else 0
    name = device if device is not None else device_name(model.device)
    chosen: dict[str, Any] = {}
    with torch.no_grad():
        for count in (count for count in rows if past + count <= limit):
            cache = model.new_cache(1, 2 * _PAST)
            cache.start += past
            ids = torch.zeros(1, count, dtype=torch.int64, device=model.device)
            _Searcher(model.module, measure or seconds_on_cuda, name, chosen).run(
                ids, cache.start, past, *cache.tensors
            )
    return chosen


class _Searcher(fx.Interpreter):
    """Runs a module node by node; what a node launches is searched for, once for every kernel and key."""

    def __init__(self, module: fx.GraphModule, measure: Measure, device: str, chosen: dict[str, Any]) -> None:
        super().__init__(module)
        self._measure, self._device, self._chosen = measure, device, chosen

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""

        def run() -> Any:
            return fx.Interpreter.run_node(self, n)

        if n.op in ("call_function", "call_module"):
            self._chosen |= search_launches(run, self._measure, self._device, self._chosen)
        return run()


def seconds_on_cuda(run: Callable[[], object]) -> float:
    """The median time on the GPU, what it reads not in its cache; infinity where a launch fails."""
    from triton.testing import do_bench

    try:
        run()  # compiles
        milliseconds: float = do_bench(_recorded(run), warmup=5, rep=30, return_mode="median")
    except Exception:  # a configuration may take more registers or shared memory than there are
        return float("inf")
    return milliseconds / 1e3


def _recorded(run: Callable[[], object]) -> Callable[[], object]:
    """A function's launches without the time that Python takes for them, which is longer than many kernels take.

    The function itself where it cannot be recorded.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    replay: Callable[[], object] = graph.replay
    return replay
