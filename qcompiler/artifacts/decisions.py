"""Holds the choices a model makes (which experts) to those another made, so that what they lead to can be compared.

Two experts that are nearly tied change places for a difference in the last bit, and everything behind is then another
function. That is no fault, and no bound on differences of logits has room for it and sees a fault too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.ir import Around

__all__ = ["Decisions"]

_aten = torch.ops.aten


class Decisions:
    """The results of every `topk` and `argmax` of some runs, in order, and how to give them to others.

    A run is told from another by its number, and may be left and entered again: what goes through a model segment by
    segment does so.
    """

    def __init__(self) -> None:
        self._chosen: dict[int, list[Tensor]] = {}

    def recording(self) -> Around:
        """Entered with the number of a run: keeps the choices of what runs inside."""
        self._chosen.clear()

        def around(number: int) -> AbstractContextManager[object]:
            return _Recording(self._chosen.setdefault(number, []))

        return around

    def holding(self) -> Around:
        """Entered with the number of a run: what runs inside chooses as was recorded of it.

        What makes other choices (another number, of other shapes) chooses itself.
        """
        left = {number: iter(chosen) for number, chosen in self._chosen.items()}

        def around(number: int) -> AbstractContextManager[object]:
            return _Replay(left.get(number, iter(())))

        return around


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
    def __init__(self, left: Iterator[Tensor]) -> None:
        super().__init__()
        self._left = left

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
