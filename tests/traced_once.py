"""Models of one configuration traced once per process: tracing is nearly all of what capturing a tiny model costs."""

import json
from typing import Any

import pytest
from torch import nn

from qcompiler.frontend import capture
from qcompiler.frontend.exporting import Exported, export

_traced: dict[str, Exported] = {}


def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `capture` take the program of an earlier model with the same class, configuration and parameters."""

    def traced(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, name: str) -> Exported:
        inner: Any = model.model
        config = {k: v for k, v in inner.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        parts = [(path, str(t.dtype), list(t.shape)) for path, t in inner.state_dict().items()]
        key = json.dumps([name, config, parts], sort_keys=True, default=str)
        if key not in _traced:
            _traced[key] = export(model, inputs, dynamic_shapes, name)
        return _traced[key]

    monkeypatch.setattr(capture, "export", traced)
