"""Small graphs by hand, and ONNX Runtime on what is written of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, fx

from qcompiler.ir.graph import Graph
from qcompiler.ir.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Dim,
    Port,
    Signature,
)
from qcompiler.storage.weights import WeightStore

# A size of a tensor stands for a symbol where it equals one of these.
SYMBOLS: dict[int, Dim] = {7: BATCH, 5: SEQUENCE, 13: PAST, 18: TOTAL, 28: f"4*{BATCH}", 35: f"{BATCH}*{SEQUENCE}"}


def symbolic(shape: Sequence[int]) -> tuple[Dim, ...]:
    return tuple(SYMBOLS.get(size, size) for size in shape)


def describe(node: fx.Node, value: Tensor) -> None:
    node.meta.update(dtype=value.dtype, shape=symbolic(value.shape))


class GraphMaker:
    """Grows a graph call by call; every call is also executed, so that nodes know their dtype and shape."""

    def __init__(self) -> None:
        self.fx = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.ports: list[Port] = []
        self.weights: dict[str, Tensor] = {}
        self.dtypes: dict[str, str] = {}

    def input(self, value: Tensor, name: str = "", **port: Any) -> fx.Node:
        node = self.fx.placeholder(f"input_{len(self.ports)}")
        describe(node, value)
        self.values[node] = value
        dtype = str(value.dtype).removeprefix("torch.")
        self.ports.append(Port(name or node.name, port.pop("role", "other"), dtype, symbolic(value.shape), **port))
        return node

    def weight(self, name: str, value: Tensor, dtype: str | None = None) -> fx.Node:
        node = self.fx.create_node("get_attr", name)
        node.meta.update(dtype=value.dtype, shape=tuple(value.shape))
        self.values[node] = value
        self.weights[name] = value
        if dtype is not None:
            self.dtypes[name] = dtype
        return node

    def size(self, node: fx.Node, axis: int) -> fx.Node:
        found = self.fx.call_function(torch.ops.aten.sym_size.int, (node, axis))
        self.values[found] = self.values[node].shape[axis]
        return found

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.fx.call_function(target, args, kwargs)
        real_args, real_kwargs = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        value = target(*real_args, **real_kwargs)
        if isinstance(value, Tensor):
            value = value.clone() if any(value is arg for arg in self.values.values()) else value
            describe(node, value)
        self.values[node] = value
        return node

    def graph(self, *outputs: fx.Node, names: Sequence[str] = (), roles: Sequence[Any] = ()) -> Graph:
        self.fx.output(tuple(outputs))
        ports = []
        for i, node in enumerate(outputs):
            name = names[i] if names else f"output_{i}"
            dtype = str(self.values[node].dtype).removeprefix("torch.")
            ports.append(Port(name, roles[i] if roles else "other", dtype, node.meta["shape"]))
        store = WeightStore()
        for name, value in self.weights.items():
            store.set(name, value, self.dtypes.get(name))
        return Graph(self.fx, Signature(tuple(self.ports), tuple(ports)), store)


def open_session(directory: Path, *, dump: Path | None = None, level: str = "1") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    return onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
