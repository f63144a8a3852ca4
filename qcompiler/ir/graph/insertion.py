"""An operator put between a value and some of what reads it; everything is checked before anything is changed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from qcompiler.errors import PipelineError, WeightError
from qcompiler.ir.graph.graph_json import check_argument, check_operator
from qcompiler.ir.graph.nodes import is_stored
from qcompiler.ir.graph.shapes import Described, ShapeRun
from qcompiler.ir.graph.sites import site_name
from qcompiler.numerics import Scheme
from qcompiler.storage import WeightStore

if TYPE_CHECKING:
    from qcompiler.ir.graph.graph import Graph

__all__ = ["insert"]

_linear = torch.ops.qcompiler.linear.default


def insert(
    graph: "Graph",
    operator: Any,
    value: Node,
    readers: Sequence[Node],
    arguments: tuple[Any, ...],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> Node:
    """See `Graph.insert`."""
    _check_operator(operator)
    ordered = _in_order(graph, value, readers)
    _check_arguments(graph, ordered[0], (*arguments, *options.values()))
    store = _stored(graph, tensors)
    stored = [Described(_computed_dtype(tensor.dtype), tuple(tensor.shape)) for tensor in tensors.values()]
    args, kwargs = _bound(operator, (value, *stored, *arguments), options)
    run = ShapeRun(dict(zip(graph.inputs, graph.signature.inputs, strict=True)))
    result = run.call(operator, args, kwargs)
    if not isinstance(result, Described):
        raise PipelineError("an operator that is inserted gives one tensor", where=operator, got=result)
    if result != run.describe(value):
        for reader in ordered:
            _check_fit(graph, run, reader, value, result)
    with graph.fx.inserting_before(ordered[0]):
        for name in tensors:
            graph.weights.alias(name, name, store=store)
        nodes = [graph.stored_node(name) for name in tensors]
        args = (value, *nodes, *args[1 + len(nodes) :])
        node = graph.fx.call_function(operator, args, kwargs)
    node.meta.update(dtype=result.dtype, shape=result.shape)
    if operator is _linear and is_stored(args[1]):
        node.meta["weight_shape"] = tuple(args[1].meta["shape"])
        if graph.schemes:  # they are assigned already: the new layer stays in float
            graph.schemes.setdefault(site_name(str(args[1].target)), Scheme())
    for reader in ordered:
        reader.replace_input_with(value, node)
    return node


def _check_operator(operator: Any) -> None:
    """Refuses what no graph file can hold, functions on sizes among it."""
    if not isinstance(operator, torch._ops.OpOverload):
        raise PipelineError(
            "what is inserted is one overload of an operator",
            got=operator,
            expected="such as torch.ops.qcompiler.hadamard.default or torch.ops.aten.mul.Tensor",
        )
    check_operator(operator)


def _in_order(graph: "Graph", value: object, readers: Sequence[Node]) -> list[Node]:
    """The readers, each once, as they stand in the graph."""
    if not isinstance(value, Node) or value.graph is not graph.fx or value.op not in ("placeholder", "call_function"):
        raise PipelineError(
            "an operator is inserted behind a value that the graph computes or is given",
            where=value,
            got=f"the stored tensor {value}" if is_stored(value) else repr(value),
            remedy="rewrite a stored tensor by derive_float" if is_stored(value) else "take it from graph.fx.nodes",
        )
    if not readers:
        raise PipelineError("an operator is inserted ahead of readers", where=value, got="none")
    place = {node: index for index, node in enumerate(graph.fx.nodes)}
    for reader in readers:
        if reader not in place:
            raise PipelineError("a reader is no node of this graph", where=value, got=repr(reader))
        if place[reader] <= place[value]:
            raise PipelineError("a reader stands ahead of the value", where=value, got=reader)
        if value not in reader.all_input_nodes:
            raise PipelineError("a reader does not read the value", where=value, got=reader, expected=list(value.users))
    return sorted(dict.fromkeys(readers), key=place.__getitem__)


def _check_arguments(graph: "Graph", first: Node, arguments: tuple[Any, ...]) -> None:
    """Refuses arguments that a file cannot hold, and nodes that are not computed ahead of the first reader."""
    for argument in arguments:
        check_argument(argument)
    nodes: list[Node] = []
    torch.fx.node.map_arg(arguments, nodes.append)
    ahead = set()
    for node in graph.fx.nodes if nodes else ():
        if node is first:
            break
        ahead.add(node)
    for node in nodes:
        if node not in ahead:
            raise PipelineError("an argument is not computed ahead of the first reader", where=first, got=node)


def _stored(graph: "Graph", tensors: Mapping[str, Tensor]) -> WeightStore:
    """The tensors in a store of their own."""
    for name in tensors:
        if name in graph.weights:
            raise WeightError("the name of a new tensor is taken", where=name, remedy="choose another one")
    store = WeightStore()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise WeightError("what is stored is a tensor", where=name, got=repr(tensor))
        store.set(name, tensor)
    return store


def _computed_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _bound(operator: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by place as far as the operator takes them so; rewrites and targets look for them there."""
    schema = operator._schema.arguments
    positional = [argument for argument in schema if not argument.kwarg_only]
    rest = dict(options)
    unknown = [name for name in rest if name not in {argument.name for argument in schema}]
    if unknown:
        known = ", ".join(argument.name for argument in schema)
        raise PipelineError("an operator has no such argument", where=operator, got=unknown[0], expected=known)
    given = list(args)
    for argument in positional[len(args) :]:
        if not any(later.name in rest for later in positional[len(given) :]):
            break
        if argument.name not in rest and not argument.has_default_value():
            raise PipelineError("an argument of an operator is missing", where=operator, expected=argument.name)
        given.append(rest.pop(argument.name, argument.default_value))
    return tuple(given), rest


def _check_fit(graph: "Graph", run: ShapeRun, reader: Node, value: Node, result: Described) -> None:
    """Refuses a new value with which a reader would not give what it gave."""
    if reader.op == "output":
        expected: Any = run.describe(value)
        found: Any = result
    else:
        expected, found = run.describe(reader), run.call(reader.target, reader.args, reader.kwargs, {value: result})
    if found != expected:
        raise PipelineError(
            "a reader would give something else",
            where=reader,
            got=f"{found} of {result}",
            expected=f"{expected} as of {run.describe(value)}",
        )
