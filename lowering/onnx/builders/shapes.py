"""ATen operators that move, select or create elements, and arithmetic on symbolic sizes, as standard ONNX operators."""

import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.builders.elementwise import result_dtype
from qcompiler.lowering.onnx.dtypes import dtype_of, onnx_dtype
from qcompiler.lowering.onnx.emitter import Builder, Builders, Emitter, argument, tensor_arguments

__all__ = ["SHAPE_BUILDERS"]

_aten = torch.ops.aten
_INT64 = ir.DataType.INT64
_END = 2**63 - 1


def _rank(node: object) -> int:
    assert isinstance(node, fx.Node)
    return len(node.meta["shape"])


# --- views -----------------------------------------------------------------------------------------------------------


def _reshape(e: Emitter, node: fx.Node) -> ir.Value:
    (x,) = tensor_arguments(node, 1)
    sizes: Any = node.args[1]
    return e.op("Reshape", e.value(x), _target_shape(e, x, node, sizes))


def _target_shape(e: Emitter, x: fx.Node, node: fx.Node, sizes: Sequence[Any]) -> ir.Value:
    """The shape to reshape to, constant where it can be: ``0`` repeats the input's size, one ``-1`` is inferred."""
    before, after = x.meta["shape"], node.meta["shape"]
    literal: list[Any] = []
    for axis, size in enumerate(sizes):
        if isinstance(after[axis], int):
            literal.append(after[axis])
        else:
            repeats = axis < len(before) and before[axis] == after[axis]
            literal.append(0 if repeats else size)
    open_axes = [i for i, size in enumerate(literal) if isinstance(size, fx.Node) or size == -1]
    if len(open_axes) == 1:
        literal[open_axes[0]] = -1
    return e.ints(literal)


def _flatten(e: Emitter, node: fx.Node) -> ir.Value:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = x.meta["shape"], node.meta["shape"]
    start = argument(node, 1, "start_dim", 0) % max(len(before), 1)
    sizes: list[int] = []
    for axis, size in enumerate(after):
        sizes.append(size if isinstance(size, int) else 0 if axis < start else -1)
    if sizes.count(-1) > 1:
        tail = len(before) - len(after)
        parts = [sizes[a] if sizes[a] != -1 else -1 if a == start else e.size(x, a + tail) for a in range(len(after))]
        return e.op("Reshape", e.value(x), _concat(e, parts))
    return e.op("Reshape", e.value(x), e.const(sizes))


def _concat(e: Emitter, parts: Sequence[int | ir.Value]) -> ir.Value:
    return e.op("Concat", *(e.const([part]) if isinstance(part, int) else part for part in parts), axis=0)


def _transpose(e: Emitter, node: fx.Node) -> ir.Value:
    order = list(range(_rank(node)))
    if node.target is not _aten.t.default:
        first, second = node.args[1:3]
        assert isinstance(first, int)
        assert isinstance(second, int)
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return e.op("Transpose", e.value(node.args[0]), perm=order)


def _permute(e: Emitter, node: fx.Node) -> ir.Value:
    order: Any = node.args[1]
    return e.op("Transpose", e.value(node.args[0]), perm=[axis % len(order) for axis in order])


def _unsqueeze(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Unsqueeze", e.value(node.args[0]), e.const([node.args[1]]))


def _squeeze(e: Emitter, node: fx.Node) -> ir.Value:
    (x,) = tensor_arguments(node, 1)
    shape = x.meta["shape"]
    axes = argument(node, 1, "dim", list(range(len(shape))))
    ones = [axis for axis in ([axes] if isinstance(axes, int) else axes) if shape[axis] == 1]
    return e.op("Squeeze", e.value(x), e.const(ones)) if ones else e.value(x)


def _reshape_as(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Reshape", e.value(node.args[0]), e.op("Shape", e.value(node.args[1]), dtype=_INT64))


def _expand(e: Emitter, node: fx.Node) -> ir.Value:
    sizes: Any = node.args[1]
    return e.op("Expand", e.value(node.args[0]), e.ints(1 if size == -1 else size for size in sizes))


def _expand_as(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Expand", e.value(node.args[0]), e.op("Shape", e.value(node.args[1]), dtype=_INT64))


# --- parts -----------------------------------------------------------------------------------------------------------


def _slice(e: Emitter, node: fx.Node) -> ir.Value:
    axis, start, end = (argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "end")))
    step = argument(node, 4, "step", 1)
    start, end = 0 if start is None else start, _END if end is None else end
    if start == 0 and end == _END and step == 1:
        return e.value(node.args[0])
    return e.op(
        "Slice", e.value(node.args[0]), e.size_value(start), e.size_value(end), e.const([axis or 0]), e.const([step])
    )


def _select(e: Emitter, node: fx.Node) -> ir.Value:
    axis, index = node.args[1:3]
    position = e.const(index) if isinstance(index, int) else e.value(index)
    return e.op("Gather", e.value(node.args[0]), position, axis=axis)


def _cat(e: Emitter, node: fx.Node) -> ir.Value:
    parts: Any = node.args[0]
    dtype = result_dtype(e, node, *parts)
    axis = argument(node, 1, "dim", 0)
    values = [e.value(part, dtype) for part in parts if part.meta["shape"] != (0,)]  # torch skips an empty vector
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=axis)


def _stack(e: Emitter, node: fx.Node) -> ir.Value:
    parts: Any = node.args[0]
    axis = argument(node, 1, "dim", 0)
    dtype = result_dtype(e, node, *parts)
    return e.op("Concat", *(e.op("Unsqueeze", e.value(part, dtype), e.const([axis])) for part in parts), axis=axis)


def _split(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    """``split``, ``split_with_sizes`` and ``chunk`` along an axis of fixed size."""
    x, given = node.args[:2]
    axis = argument(node, 2, "dim", 0)
    assert isinstance(x, fx.Node)
    size = x.meta["shape"][axis]
    if not isinstance(size, int):
        raise TargetError("an axis of varying size cannot be split", where=node.name, got=size)
    if isinstance(given, (list, tuple)):
        sizes = list(given)
    else:
        assert isinstance(given, int)
        step = -(-size // given) if node.target is _aten.chunk.default else given
        sizes = [min(step, size - start) for start in range(0, size, step)]
    value = e.value(x)
    return e.ops("Split", value, e.const(sizes), dtypes=(dtype_of(value),) * len(sizes), axis=axis)


def _getitem(e: Emitter, node: fx.Node) -> ir.Value:
    source, index = node.args
    found = e.values[source]  # type: ignore[index]
    if not isinstance(found, tuple) or not isinstance(index, int) or index >= len(found):
        raise TargetError("this result of an operator has no builder", where=node.name, got=f"{source}[{index}]")
    return found[index]


def _index(e: Emitter, node: fx.Node) -> ir.Value:
    """``x[i, :, j]`` with integer index tensors: Gather for one, GatherND for several that stand side by side."""
    (x,) = tensor_arguments(node, 1)
    indices: Any = node.args[1]
    used = [axis for axis, index in enumerate(indices) if index is not None]
    tensors: list[Any] = [indices[axis] for axis in used]
    if any(tensor.meta["dtype"] == torch.bool for tensor in tensors):
        raise TargetError("indexing with a mask gives a size that depends on data", where=node.name)
    if len(used) == 1:
        return e.op("Gather", e.value(x), e.value(tensors[0], _INT64), axis=used[0])
    if used != list(range(used[0], used[-1] + 1)):
        raise TargetError("index tensors that do not stand side by side have no builder", where=node.name, got=used)
    rank, first, count = _rank(x), used[0], len(used)
    value = e.value(x)
    if first:
        others = [axis for axis in range(rank) if axis not in used]
        value = e.op("Transpose", value, perm=[*used, *others])
    wide = max(_rank(tensor) for tensor in tensors)
    shape = e.op("Shape", _broadcast_sum(e, tensors), dtype=_INT64)
    columns = [e.op("Unsqueeze", e.op("Expand", e.value(tensor, _INT64), shape), e.const([wide])) for tensor in tensors]
    picked = e.op("GatherND", value, e.op("Concat", *columns, axis=wide))
    if first:  # torch puts the indexed axes where the first index stood
        picked = e.op(
            "Transpose",
            picked,
            perm=[*range(wide, wide + first), *range(wide), *range(wide + first, wide + rank - count)],
        )
    return picked


def _broadcast_sum(e: Emitter, tensors: Sequence[object]) -> ir.Value:
    total = e.value(tensors[0], _INT64)
    for tensor in tensors[1:]:
        total = e.op("Add", total, e.value(tensor, _INT64))
    return total


def _index_select(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[2]), axis=node.args[1])


def _gather(e: Emitter, node: fx.Node) -> ir.Value:
    return e.op("GatherElements", e.value(node.args[0]), e.value(node.args[2]), axis=node.args[1])


def _scatter(e: Emitter, node: fx.Node) -> ir.Value:
    x, axis, index, source = node.args
    dtype = result_dtype(e, node, x)
    places = e.value(index, _INT64)
    values = e.value(source, dtype)
    if not isinstance(source, fx.Node):
        values = e.op("Expand", values, e.op("Shape", places, dtype=_INT64))
    return e.op("ScatterElements", e.value(x, dtype), places, values, axis=axis)


def _triangle(upper: int) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        x = e.value(node.args[0])
        diagonal = e.const(argument(node, 1, "diagonal", 0))
        if x.dtype != ir.DataType.BOOL:
            return e.op("Trilu", x, diagonal, upper=upper)
        return e.cast(e.op("Trilu", e.cast(x, ir.DataType.INT32), diagonal, upper=upper), ir.DataType.BOOL)

    return build


def _repeat_interleave(e: Emitter, node: fx.Node) -> ir.Value:
    """Every slice along an axis as often as a number says, side by side."""
    (x,) = tensor_arguments(node, 1)
    repeats, axis = node.args[1], argument(node, 2, "dim")
    if not isinstance(repeats, int) or axis is None:
        raise TargetError("repeat_interleave without an axis has no builder", where=node.name)
    axis %= _rank(x)
    sizes: list[int | ir.Value] = [e.dim(x, i) for i in range(_rank(x))]
    apart = e.op("Unsqueeze", e.value(x), e.const([axis + 1]))
    wide = e.op("Expand", apart, e.const([repeats if i == axis + 1 else 1 for i in range(_rank(x) + 1)]))
    return e.op("Reshape", wide, _concat(e, [*sizes[:axis], -1, *sizes[axis + 1 :]]))


def _repeat(e: Emitter, node: fx.Node) -> ir.Value:
    repeats: Any = node.args[1]
    x = e.value(node.args[0])
    missing = len(repeats) - _rank(node.args[0])
    if missing:
        x = e.op("Unsqueeze", x, e.const(list(range(missing))))
    return e.op("Tile", x, e.ints(repeats))


# --- new tensors -----------------------------------------------------------------------------------------------------


def _arange(e: Emitter, node: fx.Node) -> ir.Value:
    bounds: tuple[Any, ...] = node.args
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    dtype = onnx_dtype(node.meta["dtype"])
    return e.op("Range", *(e.value(bound, dtype) for bound in (start, end, step)))


def _filled(e: Emitter, sizes: object, fill: object, dtype: ir.DataType) -> ir.Value:
    value = e.value(fill, dtype)
    return e.op("Expand", value, e.ints(sizes)) if len(sizes) else value  # type: ignore[arg-type]


def _full(e: Emitter, node: fx.Node) -> ir.Value:
    return _filled(e, node.args[0], node.args[1], onnx_dtype(node.meta["dtype"]))


def _new_full(e: Emitter, node: fx.Node) -> ir.Value:
    return _filled(e, node.args[1], node.args[2], onnx_dtype(node.meta["dtype"]))


def _constant_fill(fill: int, sizes: int) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        return _filled(e, node.args[sizes], fill, onnx_dtype(node.meta["dtype"]))

    return build


def _fill_like(fill: int | None) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        dtype = onnx_dtype(node.meta["dtype"])
        value = e.value(node.args[1] if fill is None else fill, dtype)
        return e.op("Expand", value, e.op("Shape", e.value(node.args[0]), dtype=_INT64))

    return build


def _scalar_tensor(e: Emitter, node: fx.Node) -> ir.Value:
    return e.value(node.args[0], onnx_dtype(node.meta["dtype"]))


# --- symbolic sizes: int64 [1] values --------------------------------------------------------------------------------


def _sym_size(e: Emitter, node: fx.Node) -> ir.Value:
    (x,) = tensor_arguments(node, 1)
    axis = node.args[1]
    assert isinstance(axis, int)
    return e.size(x, axis)


def _sizes(kind: str) -> Builder:
    def build(e: Emitter, node: fx.Node) -> ir.Value:
        return e.op(kind, *(e.size_value(arg) for arg in node.args))

    return build


def _size_floor_divide(e: Emitter, node: fx.Node) -> ir.Value:
    left, right = (e.size_value(arg) for arg in node.args)
    return e.op("Div", e.op("Sub", left, e.op("Mod", left, right)), right)


SHAPE_BUILDERS: Builders = {
    _aten.view.default: _reshape,
    _aten.reshape.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.flatten.using_ints: _flatten,
    _aten.transpose.int: _transpose,
    _aten.t.default: _transpose,
    _aten.permute.default: _permute,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.reshape_as.default: _reshape_as,
    _aten.view_as.default: _reshape_as,
    _aten.squeeze.default: _squeeze,
    _aten.squeeze.dim: _squeeze,
    _aten.squeeze.dims: _squeeze,
    _aten.expand.default: _expand,
    _aten.expand_as.default: _expand_as,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.cat.default: _cat,
    _aten.concat.default: _cat,
    _aten.stack.default: _stack,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.chunk.default: _split,
    operator.getitem: _getitem,
    _aten.index.Tensor: _index,
    _aten.index_select.default: _index_select,
    _aten.gather.default: _gather,
    _aten.scatter.src: _scatter,
    _aten.scatter.value: _scatter,
    _aten.triu.default: _triangle(1),
    _aten.tril.default: _triangle(0),
    _aten.repeat.default: _repeat,
    _aten.repeat_interleave.self_int: _repeat_interleave,
    _aten.arange.default: _arange,
    _aten.arange.start: _arange,
    _aten.arange.start_step: _arange,
    _aten.full.default: _full,
    _aten.new_full.default: _new_full,
    _aten.ones.default: _constant_fill(1, 0),
    _aten.zeros.default: _constant_fill(0, 0),
    _aten.new_ones.default: _constant_fill(1, 1),
    _aten.new_zeros.default: _constant_fill(0, 1),
    _aten.full_like.default: _fill_like(None),
    _aten.ones_like.default: _fill_like(1),
    _aten.zeros_like.default: _fill_like(0),
    _aten.scalar_tensor.default: _scalar_tensor,
    _aten.sym_size.int: _sym_size,
    operator.add: _sizes("Add"),
    operator.sub: _sizes("Sub"),
    operator.mul: _sizes("Mul"),
    operator.neg: _sizes("Neg"),
    operator.mod: _sizes("Mod"),
    operator.floordiv: _size_floor_divide,
    torch.sym_max: _sizes("Max"),
    torch.sym_min: _sizes("Min"),
}
