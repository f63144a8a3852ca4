"""A graph as JSON, without code: a file can name only operators that compute tensors from tensors."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qcompiler.errors import ArtifactError
from qcompiler.ir.signature import Signature
from qcompiler.numerics import Scheme
from qcompiler.storage import WeightStore

if TYPE_CHECKING:
    from qcompiler.ir.graph.graph import Graph

__all__ = ["check_argument", "check_operator", "decode_graph", "decode_nodes", "encode_graph", "encode_nodes"]

_NAMESPACES = ("aten", "qcompiler")
_OPERATORS = ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "truediv")
_SYMBOLIC = ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")
_META_KEYS = ("dtype", "shape", "weight_shape")
_NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")
_TAGS: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def check_operator(target: object) -> None:
    """Refuses a function that has no place in a graph file.

    Raises:
        ArtifactError: if so.
    """
    _encode_target(target)


def check_argument(value: object) -> None:
    """Refuses an argument that has no place in a graph file.

    Raises:
        ArtifactError: if so.
    """
    _encode(value)


def encode_graph(graph: "Graph") -> dict[str, Any]:
    """See `Graph.to_dict`."""
    return {
        "signature": graph.signature.to_dict(),
        "nodes": encode_nodes(graph.fx),
        "schemes": {site: scheme.to_dict() for site, scheme in graph.schemes.items()},
    }


def decode_graph(
    cls: "type[Graph]", fields: Mapping[str, Any], weights: WeightStore, provenance: dict[str, Any]
) -> "Graph":
    """See `Graph.from_dict`."""
    try:
        nodes, signature = decode_nodes(fields["nodes"]), Signature.from_dict(fields["signature"])
        schemes = {site: Scheme.from_dict(scheme) for site, scheme in fields["schemes"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError("damaged graph file", got=f"{type(error).__name__}: {error}") from error
    graph = cls(nodes, signature, weights, schemes, provenance)
    ports = (len(signature.inputs), len(signature.outputs))
    if (len(graph.inputs), len(graph.outputs)) != ports:
        raise ArtifactError(
            "the graph's inputs and outputs are not those of its signature",
            got=(len(graph.inputs), len(graph.outputs)),
            expected=ports,
        )
    lost = [name for name in graph.weight_names() if name not in weights]
    if lost:
        raise ArtifactError("the graph reads tensors that are not there", got=", ".join(lost[:4]))
    return graph


def encode_nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    """Plain JSON fields, one object per node; the inverse is `decode_nodes`.

    Raises:
        ArtifactError: for an operator or argument that has no place in a file.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _encode_target(node.target) if node.op == "call_function" else node.target,
            "args": _encode(node.args),
            "kwargs": _encode(node.kwargs),
            "meta": {key: _encode(node.meta[key]) for key in _META_KEYS if key in node.meta},
        }
        for node in graph.nodes
    ]


def decode_nodes(items: Sequence[Mapping[str, Any]]) -> fx.Graph:
    """Rebuilds a graph from `encode_nodes`.

    Raises:
        ArtifactError: if the fields are damaged, or name an operator that a graph may not hold.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in items:
        try:
            kind, name = item["op"], item["name"]
            if kind not in _NODE_KINDS:
                raise ArtifactError("no such kind of node", got=kind, expected=", ".join(_NODE_KINDS))
            target = _decode_target(item["target"]) if kind == "call_function" else item["target"]
            if kind != "call_function" and not isinstance(target, str):
                raise ArtifactError("a node of this kind has a name as its target", got=target)
            args, kwargs = (
                _decode(item["args"], nodes),
                {k: _decode(v, nodes) for k, v in item["kwargs"]["dict"].items()},
            )
            node = graph.create_node(kind, target, args, kwargs, name)
            node.meta.update({key: _decode(item["meta"][key], nodes) for key in _META_KEYS if key in item["meta"]})
            nodes[name] = node
        except ArtifactError as error:
            error.where = error.where or str(item.get("name"))
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError("a damaged node in the graph file", got=f"{type(error).__name__}: {error}") from error
    if [node.op for node in graph.nodes][-1:] != ["output"]:
        raise ArtifactError("the graph file is incomplete", expected="an output node at its end")
    return graph


def _encode_target(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES and _computes(target):
        return str(target)
    name = getattr(target, "__name__", "")
    if name in _OPERATORS and getattr(operator, name) is target:
        return f"operator.{name}"
    if name in _SYMBOLIC and getattr(torch, name) is target:
        return f"torch.{name}"
    raise ArtifactError("this function cannot be stored in a graph file", got=target)


def _decode_target(text: Any) -> Callable[..., Any]:
    namespace, _, rest = text.partition(".")
    found: Any = None
    if namespace in _NAMESPACES:
        packet, _, overload = rest.rpartition(".")
        found = getattr(getattr(torch.ops, namespace), packet, None)
        found = getattr(found, overload, None)
        if not isinstance(found, torch._ops.OpOverload) or not _computes(found):
            found = None
    elif namespace == "operator" and rest in _OPERATORS:
        found = getattr(operator, rest)
    elif namespace == "torch" and rest in _SYMBOLIC:
        found = getattr(torch, rest)
    if found is None:
        raise ArtifactError("the graph file names an operator that a graph may not hold", got=text)
    return found  # type: ignore[no-any-return]


def _computes(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator only computes: it writes into no argument, touches no file and gives something back."""
    schema = operator._schema
    return bool(schema.returns) and not schema.is_mutable and all(a.name != "filename" for a in schema.arguments)


def _encode(value: object) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    for tag, kind in _TAGS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise ArtifactError("this value cannot be stored in a graph file", got=f"{type(value).__name__} {value!r}")


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, nodes) for item in value)
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "node":
        return nodes[content]
    if tag == "float":
        return float(content)
    if tag == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    if tag == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    found = getattr(torch, content, None)
    if tag not in _TAGS or not isinstance(found, _TAGS[tag]):
        raise ArtifactError("an argument that a graph may not hold", got=value)
    return found
