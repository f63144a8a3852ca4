"""Holds the choices a model makes (which experts) to those another made, so that what they lead to can be compared.

Two experts that are nearly tied change places for a difference in the last bit, and everything behind is then another
function. That is no fault, and no bound on differences of logits has room for it and sees a fault too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Decisions"]

_aten = torch.ops.aten


class Decisions:
    """The results of every `topk` and `argmax` of a run, in order, and how to give them to another run."""

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keeps the choices of what runs inside."""
        self._chosen.clear()
        with _Recording(self._chosen):
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """What runs inside chooses as before; what makes other choices (another number, of other shapes) chooses."""
        with _Replay(self._chosen):
            yield


class _Recording(TorchDispatchMode):
    def __init__(self, chosen: list[Tensor]) -> None:
        super().__init__()
        self._chosen = chosen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (_aten.topk.default, _aten.argmax.default):
            self._chosen.append(result[1] if func is _aten.topk.default else result)
        return result


class _Replay(TorchDispatchMode):
    def __init__(self, chosen: list[Tensor]) -> None:
        super().__init__()
        self._left = iter(chosen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (_aten.topk.default, _aten.argmax.default):
            return result
        chosen = next(self._left, None)
        found = result[1] if func is _aten.topk.default else result
        if chosen is None or chosen.shape != found.shape:
            return result
        chosen = chosen.to(found.device)
        if func is _aten.argmax.default:
            return chosen
        axis = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        return args[0].gather(axis, chosen), chosen
