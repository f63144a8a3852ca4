"""Operators that take elements from places, or put them there. Source: onnx/docs/Operators.md."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import Known, Unsupported, Value, as_number, as_tensor, known

__all__ = ["PLACES"]


def _gather(call: Call) -> Value:
    x, places, axis = call.value(0), call.value(1), call.get("axis", 0)
    if isinstance(x, Known) and isinstance(places, Known):
        return Known(np.asarray(np.take(x.array, places.array.astype(np.int64), axis), dtype=object), x.dtype)
    if isinstance(places, Known) and places.array.ndim == 0:
        return call.tensor(0).select(axis, as_number(places))
    table = call.tensor(0)
    axis = axis % table.dim()
    if isinstance(places, Known):
        places = places.map(lambda place: place + table.shape[axis] if place < 0 else place)
    index = as_tensor(places, call.device)
    if axis == 0 and table.dim() == 2 and table.is_floating_point():
        return torch.nn.functional.embedding(index, table)
    if index.dim() == 1:
        return torch.index_select(table, axis, index)
    flat = torch.index_select(table, axis, index.reshape(-1))
    return flat.reshape([*table.shape[:axis], *index.shape, *table.shape[axis + 1 :]])


def _gather_elements(call: Call) -> Value:
    x, index = call.tensor(0), call.tensor(1).long()
    axis = call.get("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def _gather_many(call: Call) -> Value:
    """``data[index[..., 0], index[..., 1], ...]``, behind as many axes that both have in common."""
    x, index, common = call.tensor(0), call.tensor(1).long(), call.get("batch_dims", 0)
    if common > 1:
        raise Unsupported(f"batch_dims {common}")
    depth = index.shape[-1]
    places: list[Any] = [index[..., i] for i in range(depth)]
    if common:
        first = torch.arange(x.shape[0], device=call.device)
        places.insert(0, first.reshape([-1, *(1 for _ in index.shape[1:-1])]))
    return x[tuple(places)]


def _scatter_many(call: Call) -> Value:
    x, index, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    call.refuse(reduction="none")
    return torch.index_put(x, tuple(index[..., i] for i in range(index.shape[-1])), updates)


def _scatter_elements(call: Call) -> Value:
    how = call.get("reduction", "none")
    if how not in ("none", "add"):
        raise Unsupported(f"reduction {how}")
    x, index = call.tensor(0), call.tensor(1).long()
    axis = call.get("axis", 0)
    function = torch.scatter_add if how == "add" else torch.scatter
    return function(x, axis, torch.where(index < 0, index + x.shape[axis], index), call.tensor(2))


def _one_hot(call: Call) -> Value:
    index, depth = call.tensor(0), as_number(call.value(1), "a depth")
    axis = call.get("axis", -1)
    levels = torch.arange(depth, device=call.device)
    index = index.unsqueeze(axis)
    index = torch.where(index < 0, index + depth, index)
    hits = index == levels.reshape([-1 if place == axis % index.dim() else 1 for place in range(index.dim())])
    values: Tensor = call.tensor(2)
    return torch.where(hits, values[1], values[0])


def _constant(call: Call) -> Value:
    for name, dtype in (("value_int", torch.int64), ("value_float", torch.float32)):
        if call.get(name) is not None:
            return known(call.get(name), dtype)
    for name, dtype in (("value_ints", torch.int64), ("value_floats", torch.float32)):
        if call.get(name) is not None:
            return known(list(call.get(name)), dtype)
    raise Unsupported("a constant that is no tensor of numbers")


PLACES: Operators = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_many,
    "ScatterND": _scatter_many,
    "ScatterElements": _scatter_elements,
    "OneHot": _one_hot,
    "Constant": _constant,
}
