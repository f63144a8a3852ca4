"""Models of one configuration traced once per process: tracing is nearly all of what capturing a tiny model costs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from qcompiler.frontend import capture
from qcompiler.frontend.exporting import Exported, export

_traced: dict[tuple[type[nn.Module], str], Exported] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Lets `capture` take the program of an earlier transformers model with the same code and parameters."""

    def traced(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, name: str) -> Exported:
        if not (isinstance(model, capture._Flat) and type(model.model).__module__.startswith("transformers.")):
            return export(model, inputs, dynamic_shapes, name)
        key = type(model.model), _described(model)
        if key not in _traced:
            _traced[key] = export(model, inputs, dynamic_shapes, name)
        return _traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export", traced)
        yield


@contextmanager
def traced_anew() -> Iterator[None]:
    """Lets every model be traced by itself, within `traced_once` too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "export", export)
        yield


def _described(model: capture._Flat) -> str:
    """Configuration, ports and parameters, and which of these are one tensor."""
    inner: Any = model.model
    config = {k: v for k, v in inner.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    tensors = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    parts = [(path, str(t.dtype), list(t.shape), first.setdefault(id(t), path)) for path, t in tensors]
    return json.dumps([config, model._names, model._output, parts], sort_keys=True, default=str)
