"""Tiny models as ONNX files, exported once per process, and what tests do with them."""

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from qcompiler.ir import Graph
from qcompiler.ir.execute import Stretch
from tests.models import model_of

BATCH, SEQUENCE, PAST = 2, 3, 5


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


class _Flat(nn.Module):
    """A transformers model over tensors, a cache among them."""

    def __init__(self, model: nn.Module, has_cache: bool) -> None:
        super().__init__()
        self.model, self._has_cache = model, has_cache

    def forward(self, ids: Tensor, mask: Tensor, *rest: Tensor) -> Any:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        if not self._has_cache:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=rest[0]).logits
        positions, *past = rest
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        result = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return (result.logits, *(t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)))


@functools.cache
def exported(family: str, *, dynamo: bool = False) -> Path:
    """The ONNX file of a family of `tests.models`, by one of torch's two exporters."""
    path = Path(_folder().name) / f"{family}-{dynamo}" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    return export_model(model_of(family), path, has_cache=family != "bert", dynamo=dynamo)


def export_model(model: nn.Module, path: Path, *, has_cache: bool = True, dynamo: bool = False) -> Path:
    """Writes a transformers model as ONNX, its cache as inputs and outputs; what is returned is the path."""
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    total = PAST + SEQUENCE if has_cache else SEQUENCE
    arguments: dict[str, tuple[Tensor, dict[int, str]]] = {
        "input_ids": (torch.randint(0, 50, (BATCH, SEQUENCE)), {0: "batch", 1: "sequence"}),
        "attention_mask": (
            torch.ones(BATCH, total, dtype=torch.int64),
            {0: "batch", 1: "total" if has_cache else "sequence"},
        ),
    }
    outputs = {"logits": {0: "batch", 1: "sequence"}}
    if has_cache:
        positions = torch.arange(PAST, total).repeat(BATCH, 1)
        arguments["position_ids"] = (positions, {0: "batch", 1: "sequence"})
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                cache = torch.randn(BATCH, heads, PAST, width)
                arguments[f"past_key_values.{layer}.{part}"] = (cache, {0: "batch", 2: "past"})
                outputs[f"present.{layer}.{part}"] = {0: "batch", 2: "total"}
    else:
        types = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        arguments["token_type_ids"] = (types, {0: "batch", 1: "sequence"})
    axes = {name: axes for name, (_, axes) in arguments.items()}
    tensors = tuple(tensor for tensor, _ in arguments.values())
    names: dict[str, Any] = {"input_names": list(arguments), "output_names": list(outputs)}
    flat = _Flat(model, has_cache).eval()  # exporters put the mode back, of the model inside, too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            free = [dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in arguments]
            shapes = (free[0], free[1], tuple(free[2:]))
            program: Any = torch.onnx.export(flat, tensors, dynamo=True, dynamic_shapes=shapes, **names)
            assert program is not None
            program.save(str(path), external_data=True)
        else:
            torch.onnx.export(
                flat, tensors, str(path), dynamo=False, dynamic_axes=axes | outputs, opset_version=17, **names
            )
    return path


def computed(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a graph, in order."""
    cpu = torch.device("cpu")
    stretch = Stretch(graph.fx.nodes, graph.outputs)
    given = dict(zip(graph.inputs, inputs, strict=True))
    results = stretch.run(given, stretch.load(graph.weights.read, cpu), cpu)
    return [results[node] for node in graph.outputs]


def by_onnxruntime(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(t) for t in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def tensor(name: str, value: Tensor, kind: int | None = None) -> TensorProto:
    """An initializer."""
    proto = onnx.numpy_helper.from_array(value.numpy(), name)
    if kind is not None:
        proto.data_type = kind
    return proto


def port(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """An input or output."""
    return helper.make_tensor_value_info(name, kind, shape)


def saved(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[TensorProto],
    opset: int = 21,
) -> Path:
    """A model of these parts, in a file."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString())
    return path
