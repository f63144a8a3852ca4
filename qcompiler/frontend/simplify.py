"""What comes before any pattern: noise goes, equal nodes merge, expressions of weights alone fold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.frontend.pattern import arguments, is_weight
from qcompiler.ir import Graph, is_op

__all__ = [
    "PRODUCTS",
    "assemble_parts",
    "fold_weight_expressions",
    "is_transposed_weight",
    "merge_equal_nodes",
    "remove_noise",
    "replace_by_derived",
]

_aten = torch.ops.aten

PRODUCTS = (_aten.addmm.default, _aten.mm.default, _aten.matmul.default)
"""``x @ W`` with or without a bias."""

_ASSERTIONS = (
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range_for_size.default,
    _aten.sym_constrain_range.default,
)
_IDENTITIES = (
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.detach_.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
)
_EMPTY = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default)
_CASTS = (
    _aten.to.dtype,
    _aten.to.device,
    _aten.to.dtype_layout,
    _aten.to.other,
    _aten.type_as.default,
    _aten._to_copy.default,
)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_TURNS = (_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.numpy_T.default)
_MOVEMENTS = (
    *_TURNS,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.select.int,
    _aten.reshape.default,
    _aten.slice.Tensor,
)
_FOLDABLE = (
    *_MOVEMENTS,
    _aten.to.dtype,
    _aten.add.Tensor,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.div.Tensor,
    _aten.neg.default,
)


def remove_noise(graph: Graph) -> None:
    """Removes assertions, copies, casts to the same dtype and other nodes that change no value.

    Where a tensor is made is the executor's decision, so devices go, too; views become reshapes, which do not fail
    where a removed ``contiguous`` stood before them.
    """
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.fx.erase_node(node)
            continue
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        if node.target in _CASTS:
            node.target, node.args, node.kwargs = _aten.to.dtype, (node.args[0], node.meta["dtype"]), {}
        elif node.target in _VIEWS:
            node.target = _aten.reshape.default
        source = _same_value(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.fx.erase_node(node)
    graph.fx.eliminate_dead_code()


def _same_value(node: fx.Node) -> fx.Node | None:
    """The operand a node's value equals, or None."""
    if is_op(node, _aten.cat.default):
        return _only_operand(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source: fx.Node = node.args[0]
    rest: Any = node.args[1:]
    same_dtype = source.meta.get("dtype") == node.meta.get("dtype")
    same_shape = source.meta.get("shape") == node.meta.get("shape")
    is_same: bool
    if is_op(node, *_IDENTITIES):
        is_same = True
    elif is_op(node, _aten.to.dtype):
        is_same = same_dtype
    elif is_op(node, _aten.dropout.default):
        is_same = rest[1] is False or rest[0] in (0, 0.0)
    elif is_op(node, _aten.slice.Tensor):
        _, _, start, _, step = arguments(node, 1, 0, None, None, 1)
        is_same = same_shape and start in (None, 0) and step == 1
    elif is_op(node, _aten.slice_scatter.default):
        _, part, _, start, _, step = arguments(node, 2, 0, None, None, 1)
        return part if part.meta["shape"] == source.meta["shape"] and start in (None, 0) and step == 1 else None
    elif is_op(node, _aten.mul.Tensor, _aten.div.Tensor):
        is_same = same_dtype and isinstance(rest[0], (int, float)) and rest[0] == 1
    elif is_op(node, _aten.add.Tensor, _aten.sub.Tensor):
        is_same = same_dtype and isinstance(rest[0], (int, float)) and rest[0] == 0
    else:
        is_same = same_shape and is_op(node, _aten.expand.default, _aten.reshape.default)
    return source if is_same else None


def _only_operand(cat: fx.Node) -> fx.Node | None:
    """Drops the empty 1-D tensors that caches begin with, which `cat` ignores; returns what is left if that is one."""
    operands: Any = cat.args[0]
    kept = [item for item in operands if item.meta.get("shape") != (0,)]
    if kept and len(kept) < len(operands):
        cat.args = (kept, *cat.args[1:])
    return kept[0] if len(kept) == 1 else None


def assemble_parts(graph: Graph) -> None:
    """Turns writing into slices of an empty tensor, one after another until it is full, into a concatenation."""
    for node in list(graph.fx.nodes):
        if not is_op(node, _aten.slice_scatter.default) or node._erased:
            continue
        axis, parts = arguments(node, 2, 0, 0, None, 1)[2], _parts_written(node)
        if parts is not None:
            with graph.fx.inserting_before(node):
                whole = graph.fx.call_function(_aten.cat.default, (parts, axis))
            whole.meta.update(node.meta)
            node.replace_all_uses_with(whole)
            graph.fx.eliminate_dead_code()


def _parts_written(last: fx.Node) -> list[fx.Node] | None:
    """The values written by a chain of ``slice_scatter`` in order, if they fill an empty tensor without overlap."""
    axis = arguments(last, 2, 0, 0, None, 1)[2]
    size = last.meta["shape"][axis]
    written: dict[int, tuple[int, fx.Node]] = {}
    node: Any = last
    while is_op(node, _aten.slice_scatter.default):
        base, part, this_axis, start, end, step = arguments(node, 2, 0, 0, None, 1)
        if is_op(part, _aten.copy.default) and part.args[1].meta.get("shape") == part.meta["shape"]:
            part = part.args[1]
        width = part.meta["shape"][axis]
        ends = isinstance(width, int) and (end is None or end >= start + width)
        if this_axis != axis or step != 1 or not ends or part.meta["dtype"] != last.meta["dtype"] or start in written:
            return None
        written[start] = (width, part)
        node = base
    if not is_op(node, *_EMPTY):
        return None
    place = 0
    for start, (width, _) in sorted(written.items()):
        if start != place:
            return None
        place += width
    return [part for _, (_, part) in sorted(written.items())] if place == size else None


def merge_equal_nodes(graph: Graph) -> None:
    """Lets equal calls on equal operands share one node, such as the reshaped cosines that every layer makes anew."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.fx.nodes):
        if node.op != "call_function" or _is_random(node):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.fx.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or bool(target._schema.is_mutable)
    )


def _hashable(value: Any) -> Any:
    """Arguments as a key; numbers with their type, since 1, 1.0 and True are equal but not alike."""
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return (type(value), value)


def is_transposed_weight(node: object) -> bool:
    """Whether a node is the transpose of a stored matrix."""
    if not is_op(node, *_TURNS):
        return False
    assert isinstance(node, fx.Node)
    source = node.args[0]
    return (
        is_weight(source)
        and len(source.meta["shape"]) == 2
        and node.meta["shape"] == source.meta["shape"][::-1]
        and (not is_op(node, _aten.permute.default, _aten.transpose.int) or _swaps(node))
    )


def _swaps(node: fx.Node) -> bool:
    axes: Any = node.args[1] if is_op(node, _aten.permute.default) else node.args[1:3]
    first, second = (axis % 2 for axis in axes)
    return (first, second) == (1, 0) if is_op(node, _aten.permute.default) else first != second


def fold_weight_expressions(graph: Graph) -> None:
    """Makes expressions of stored tensors alone, such as ``1 + w``, derived tensors.

    A transpose that only products read stays: ``x @ w.T`` is a linear layer of ``w`` itself.
    """
    for node in list(graph.fx.nodes):
        sources = node.all_input_nodes
        if not is_op(node, *_FOLDABLE) or not sources or not all(is_weight(source) for source in sources):
            continue
        if is_transposed_weight(node) and node.users and all(is_op(user, *PRODUCTS) for user in node.users):
            continue
        names = tuple(str(source.target) for source in sources)
        operator = node.target.overloadpacket.__name__
        new = replace_by_derived(graph, node, names, f"{names[0]}.{operator}", _evaluator(node, sources))
        if (number := _added_number(node)) is not None:
            graph.provenance.setdefault("shifted", {})[str(new.target)] = {"source": names[0], "added": number}


def _added_number(node: fx.Node) -> float | None:
    """The number that a node adds to its only tensor; None for another expression."""
    if not is_op(node, _aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    numbers = [argument for argument in node.args if isinstance(argument, (int, float))]
    return float(numbers[0]) if len(numbers) == 1 else None


def _evaluator(node: fx.Node, sources: list[fx.Node]) -> Callable[..., Tensor]:
    target: Any = node.target
    args, kwargs = node.args, dict(node.kwargs)
    is_movement = is_op(node, *_MOVEMENTS)

    def evaluate(*tensors: Tensor) -> Tensor:
        # a captured graph computes in float32, whatever the weights are stored in
        wide = (t if is_movement or not t.is_floating_point() else t.float() for t in tensors)
        values = dict(zip(sources, wide, strict=True))
        positional, named = fx.node.map_arg((args, kwargs), values.__getitem__)
        result: Tensor = target(*positional, **named)
        return result

    return evaluate


def replace_by_derived(
    graph: Graph, node: fx.Node, sources: tuple[str, ...], name: str, function: Callable[..., Tensor]
) -> fx.Node:
    """Puts a derived tensor in the place of a node.

    Args:
        graph: whose store gets the tensor.
        node: erased.
        sources: the names of the function's arguments.
        name: of the new tensor; a number is added where it is taken.
        function: of the sources as stored.

    Returns:
        The new ``get_attr`` node.
    """
    unique, count = name, 0
    while unique in graph.weights:
        count += 1
        unique = f"{name}_{count}"
    dtype = str(node.meta["dtype"]).removeprefix("torch.")
    if is_op(node, *_MOVEMENTS):
        dtype = graph.weights.info(sources[0]).dtype  # moving elements around is exact in any dtype
    graph.weights.derive(unique, sources, function, dtype=dtype, shape=tuple(node.meta["shape"]))
    with graph.fx.inserting_before(node):
        new = graph.fx.create_node("get_attr", unique)
    new.meta.update(dtype=node.meta["dtype"], shape=node.meta["shape"])
    node.replace_all_uses_with(new)
    graph.fx.erase_node(node)
    return new
