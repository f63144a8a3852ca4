"""Tiny models with random weights, captured once per process, and what tests do with them."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.execute import Stretch
from qcompiler.ir.graph import Graph
from tests.families import COMMON, SPECS
from tests.families import POSITIONS as POSITIONS
from tests.families import VOCABULARY as VOCABULARY
from tests.families import WINDOW as WINDOW

FAMILIES = ("llama", "mistral", "gpt2", "bert")
DECODERS = ("llama", "mistral", "gpt2")


def build(family: str, *, layers: int = 2, **options: Any) -> nn.Module:
    """A model in evaluation mode, float32, every parameter random (norms and biases, too)."""
    torch.manual_seed(7)
    kind, config, own = SPECS[family]
    settings = getattr(transformers, config)(**{**COMMON, "num_hidden_layers": layers, **own, **options})
    model: nn.Module = getattr(transformers, kind)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or float(parameter.std()) == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def model_of(family: str) -> nn.Module:
    """The model of a family; not to be changed."""
    return build(family)


@functools.cache
def _captured(family: str) -> Graph:
    return capture_module(model_of(family))


def raw_graph(family: str) -> Graph:
    """A copy of the graph as captured, before canonicalization."""
    return _captured(family).copy()


@functools.cache
def canonical_graph(family: str) -> Graph:
    """The canonical graph of a family; not to be changed."""
    return canonicalize(raw_graph(family))


def copy_graph(graph: Graph) -> Graph:
    """A graph with nodes, weight names and reports of its own; tensors are shared."""
    return graph.copy()


def run(graph: Graph, **values: Tensor) -> dict[str, Tensor]:
    """The outputs by port name, for inputs by port name (dots as underscores)."""
    cpu = torch.device("cpu")
    stretch = Stretch(graph.fx.nodes, graph.outputs)
    by_port = {
        port.name.replace(".", "_"): node for port, node in zip(graph.signature.inputs, graph.inputs, strict=True)
    }
    assert by_port.keys() == values.keys()
    given = {by_port[name]: value for name, value in values.items()}
    results = stretch.run(given, stretch.load(graph.weights.read, cpu), cpu)
    return {port.name: results[node] for port, node in zip(graph.signature.outputs, graph.outputs, strict=True)}


def language_inputs(
    graph: Graph, ids: Tensor, mask: Tensor, past: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Inputs of a language model: ``mask`` covers the cache, too; positions count every token."""
    values = {}
    before = mask.shape[1] - ids.shape[1]
    for port in graph.signature.inputs:
        name = port.name.replace(".", "_")
        if port.role == "ids":
            values[name] = ids
        elif port.role == "mask":
            values[name] = mask
        elif port.role == "positions":
            values[name] = torch.arange(before, mask.shape[1]).expand(ids.shape)
        elif port.role == "past":
            present = port.name.replace("past_key_values", "present")
            empty = torch.zeros(ids.shape[0], int(port.shape[1]), 0, int(port.shape[3]))
            values[name] = empty if past is None else past[present]
        else:
            values[name] = torch.zeros_like(ids)
    return values


def padding_mask(batch: int, length: int, side: str) -> Tensor:
    """int64 ``[batch, length]``: row i lacks i tokens on that side ("none" for none)."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        if side == "left":
            mask[row, :row] = 0
        elif side == "right":
            mask[row, length - row :] = 0
    return mask


def tolerance(reference: Tensor, operations: int = 256) -> float:
    """The rounding that so many float32 operations of the reference's size may add up to."""
    return operations * torch.finfo(torch.float32).eps * float(reference.abs().max())


def operators(graph: Graph) -> Counter[str]:
    """How often each operator occurs: ``{"qcompiler.linear": 15, "aten.add": 4}``."""
    calls = (node.target for node in graph.fx.nodes if node.op == "call_function")
    return Counter(str(target).rsplit(".", 1)[0] for target in calls if isinstance(target, torch._ops.OpOverload))


def reasons(graph: Graph) -> list[tuple[str, str]]:
    """Pattern and reason of everything that was not recognized."""
    return [(entry["pattern"], entry["reason"]) for entry in graph.unrecognized]


def canonical_form(model: nn.Module, *inputs: Tensor) -> Graph:
    """The canonical graph of a module, checked to compute the same on inputs of another batch size."""
    graph = canonicalize(capture_module(model, inputs))
    others = [torch.cat((x, x[:1] + 1)) if x.is_floating_point() else x for x in inputs]
    out = run(graph, **{f"input_{i}": x for i, x in enumerate(others)})["output_0"]
    with torch.no_grad():
        torch.testing.assert_close(out, model(*others))
    return graph


def module(function: Callable[..., Tensor], **parameters: Tensor) -> nn.Module:
    """A module that computes a function of itself and its inputs."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in parameters.items():
                setattr(self, name, nn.Parameter(value))

        def forward(self, *inputs: Tensor) -> Tensor:
            return function(self, *inputs)

    return Module().eval()
