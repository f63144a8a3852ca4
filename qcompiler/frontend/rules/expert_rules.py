"""Mixtures of experts: a product with stored matrices chosen row by row becomes one linear layer per expert.

How rows are routed and how results are weighted stays as it was; each product alone is rewritten, and is equal by
definition. Every expert's matrix thereby becomes a site of its own, which sees exactly the rows routed to it.
"""

from typing import Any

import torch
from torch import fx

from qcompiler.frontend.pattern import Miss, is_weight, other_operand
from qcompiler.ir import Dim, Graph, is_op, site_name

__all__ = ["chosen_product", "stacked_product"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler

Parts = dict[tuple[str, bool], list[str]]
"""The names of the tensors that stacks were taken apart into, by the stack and whether they are transposed."""


def chosen_product(made: Parts, graph: Graph, product: fx.Node) -> None:
    """``y[s] = W[experts[s]] @ x[s] (+ b[experts[s]])`` → ``merge(linear(take(x, e), W[e], b[e]) for e)``."""
    left, right = product.args[:2]
    vector: Any
    if (found := _chosen(left)) is not None:  # W[experts] [S, out, in] @ x [S, in, 1]
        vector, axis, is_transposed = right, 2, False
    elif (found := _chosen(right)) is not None:  # x [S, 1, in] @ W[experts] [S, in, out]
        vector, axis, is_transposed = left, 1, True
    else:
        return
    stack, experts = found
    if not (is_op(vector, _aten.unsqueeze.default) and vector.args[1] % 3 == axis):
        raise Miss("more than one row per choice of an expert")
    x: fx.Node = vector.args[0]
    ends: list[Any] = list(product.users)
    if not ends or not all(is_op(end, _aten.squeeze.dim) and end.args[1] % 3 == axis for end in ends):
        raise Miss("the result of an expert keeps an axis of size one")
    end, bias = _with_bias(ends, experts)
    weights = _parts(made, graph, stack, is_transposed=is_transposed)
    biases: list[Any] = [None] * len(weights) if bias is None else _parts(made, graph, bias, is_transposed=False)
    rows = []
    with graph.fx.inserting_before(product):
        for index, names in enumerate(zip(weights, biases, strict=True)):
            # how many rows an expert is given is known when it runs
            shape = (f"{experts.name}_{index}", x.meta["shape"][-1])
            taken = _call(graph, _canonical.take_expert.default, (x, experts, index), shape)
            rows.append(_linear(graph, taken, *names))
        merged = _call(graph, _canonical.merge_experts.default, (rows, experts), ends[0].meta["shape"])
    for old in (end, *ends):
        old.replace_all_uses_with(merged)


def stacked_product(made: Parts, graph: Graph, product: fx.Node) -> None:
    """``x[E, N, in] @ W[E, in, out]`` with a stored stack → ``stack(linear(x[e], W[e].T) for e)``."""
    x, stack = product.args[:2]
    if not is_weight(stack) or not isinstance(x, fx.Node) or is_weight(x):
        return
    if len(stack.meta["shape"]) != 3 or len(x.meta["shape"]) != 3:
        return
    weights = _parts(made, graph, stack, is_transposed=True)
    rows: tuple[Dim, ...] = x.meta["shape"][1:]
    with graph.fx.inserting_before(product):
        results = []
        for index, weight in enumerate(weights):
            part = _call(graph, _aten.select.int, (x, 0, index), rows)
            results.append(_linear(graph, part, weight, None))
        merged = _call(graph, _aten.stack.default, (results,), product.meta["shape"])
    product.replace_all_uses_with(merged)


def _chosen(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The stored ``W[E, a, b]`` and the indices ``[S]`` of ``W[experts]``."""
    if is_op(node, _aten.index.Tensor) and len(node.args[1]) == 1:
        stack, experts = node.args[0], node.args[1][0]
    elif is_op(node, _aten.index_select.default) and node.args[1] == 0:
        stack, experts = node.args[0], node.args[2]
    else:
        return None
    fits = is_weight(stack) and isinstance(experts, fx.Node) and not experts.meta["dtype"].is_floating_point
    return (stack, experts) if fits and experts.meta["dtype"] != torch.bool and _rank(experts) == 1 else None


def _with_bias(ends: list[fx.Node], experts: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Where the product ends, and the stored ``b[E, out]`` chosen by the same indices that is added there."""
    (end, *others) = ends
    if not others and len(end.users) == 1:
        (add,) = end.users
        if is_op(add, _aten.add.Tensor) and not add.kwargs:
            found = _chosen(other_operand(add, end))
            if found is not None and found[1] is experts and _rank(found[0]) == 2:
                return add, found[0]
    return end, None


def _parts(made: Parts, graph: Graph, stack: fx.Node, *, is_transposed: bool) -> list[str]:
    """The names of the matrices (transposed where ``is_transposed``) or vectors of a stored stack."""
    source, store = str(stack.target), graph.weights
    if (source, is_transposed) not in made:
        count, *rest = stack.meta["shape"]
        names = [f"{site_name(source)}.{index}{'.weight' if len(rest) == 2 else ''}" for index in range(count)]
        if any(name in store for name in names):  # the stack is also read the other way round
            names = [f"{site_name(source)}.{index}.transposed.weight" for index in range(count)]
        for index, name in enumerate(names):
            store.slice(name, source, index)
            if is_transposed:
                dtype = store.info(source).dtype
                store.derive(name, (name,), torch.t, dtype=dtype, shape=rest[::-1], rearranges=True)
        made[source, is_transposed] = names
    return made[source, is_transposed]


def _linear(graph: Graph, x: fx.Node, weight: str, bias: str | None) -> fx.Node:
    operands = [x] + [_stored(graph, name) for name in (weight, bias) if name is not None]
    shape = operands[1].meta["shape"]
    node = _call(graph, _canonical.linear.default, tuple(operands), (*x.meta["shape"][:-1], shape[0]))
    node.meta["weight_shape"] = shape
    return node


def _stored(graph: Graph, name: str) -> fx.Node:
    node = graph.fx.create_node("get_attr", name)
    info = graph.weights.info(name)
    node.meta.update(dtype=torch.float32, shape=tuple(info.shape))
    return node


def _call(graph: Graph, target: Any, args: tuple[Any, ...], shape: Any) -> fx.Node:
    node = graph.fx.call_function(target, args)
    node.meta.update(dtype=torch.float32, shape=tuple(shape))
    return node


def _rank(node: fx.Node) -> int:
    return len(node.meta["shape"])
