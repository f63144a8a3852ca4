"""Rewrites an exported graph to the canonical operators of `qcompiler.ops`, by structure alone.

Three steps: noise that changes no value is removed; expressions of stored tensors only (a transposed weight, ``1 + w``) become
derived tensors; then the rules below turn decomposed norms, linears, rotary embeddings, cache appends and attention into one node each.
What no rule recognises stays as ATen operators, which every target also takes, and is listed in ``graph.unrecognized``.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.graph import Graph, is_op
from qcompiler.masks import MaskForm, closed_form
from qcompiler.pattern import Miss, Rule, apply_rules, expect, is_weight, other_operand, replace
from qcompiler.signature import Dim

__all__ = ["canonicalize"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler


def canonicalize(graph: Graph) -> Graph:
    """Rewrites ``graph`` in place and returns it; applying it twice changes nothing more."""
    _remove_noise(graph)
    _fold_weight_expressions(graph)
    graph.unrecognized.clear()
    _transpose_product_weights(graph)
    apply_rules(graph, _rules())
    _note_leftovers(graph)
    graph.fx.lint()
    return graph


# --- noise -------------------------------------------------------------------------------------------------------------

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
_CASTS = (_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten._to_copy.default)
_PRODUCTS = (_aten.addmm.default, _aten.mm.default, _aten.matmul.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_LAST = torch.iinfo(torch.int64).max


def _remove_noise(graph: Graph) -> None:
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.fx.erase_node(node)
            continue
        if any(key in node.kwargs for key in ("device", "pin_memory", "layout")):
            # where a tensor is made is the executor's decision, not the export's
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        if node.target in _CASTS:
            node.target, node.args, node.kwargs = _aten.to.dtype, (node.args[0], node.meta["dtype"]), {}
        elif node.target in _VIEWS:
            node.target = _aten.reshape.default  # a view fails where a removed `contiguous` stood before it
        elif is_op(node, _aten.cat.default):
            _drop_empty_operands(node)
        if _changes_nothing(node):
            source = node.args[0][0] if is_op(node, _aten.cat.default) else node.args[0]  # type: ignore[index]
            node.replace_all_uses_with(source)  # type: ignore[arg-type]
            graph.fx.erase_node(node)
    graph.fx.eliminate_dead_code()


def _drop_empty_operands(cat: fx.Node) -> None:
    """A cache starts as an empty 1-D tensor, which `cat` ignores."""
    operands: Any = cat.args[0]
    kept = [item for item in operands if item.meta.get("shape") != (0,)]
    if kept and len(kept) < len(operands):
        cat.args = (kept, *cat.args[1:])


def _changes_nothing(node: fx.Node) -> bool:
    args: Any = node.args
    if not node.args or not (isinstance(args[0], fx.Node) or is_op(node, _aten.cat.default)):
        return False
    if is_op(node, *_IDENTITIES):
        return True
    if is_op(node, _aten.cat.default):
        return len(args[0]) == 1
    source = args[0]
    if is_op(node, _aten.to.dtype):
        return bool(source.meta.get("dtype") == node.meta["dtype"])
    if is_op(node, _aten.dropout.default):
        return args[2] is False
    if is_op(node, _aten.slice.Tensor):
        start = args[2] if len(args) > 2 else None
        end = args[3] if len(args) > 3 else None
        step = args[4] if len(args) > 4 else 1
        return start in (None, 0) and (end is None or end == _LAST) and step == 1
    if is_op(node, _aten.mul.Tensor, _aten.div.Tensor):
        return args[1] in (1, 1.0) and not isinstance(args[1], fx.Node) and _keeps_dtype(node)
    if is_op(node, _aten.add.Tensor, _aten.sub.Tensor):
        return args[1] in (0, 0.0) and not isinstance(args[1], fx.Node) and _keeps_dtype(node)
    if is_op(node, _aten.expand.default, _aten.reshape.default):
        return bool(source.meta.get("shape") == node.meta["shape"])
    return False


def _keeps_dtype(node: fx.Node) -> bool:
    source: Any = node.args[0]
    return bool(source.meta.get("dtype") == node.meta.get("dtype"))


# --- expressions of stored tensors -------------------------------------------------------------------------------------

_MOVEMENTS = (
    _aten.t.default,
    _aten.transpose.int,
    _aten.permute.default,
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


def _fold_weight_expressions(graph: Graph) -> None:
    for node in list(graph.fx.nodes):
        sources = node.all_input_nodes
        if is_op(node, *_FOLDABLE) and sources and all(is_weight(source) for source in sources):
            names = tuple(str(source.target) for source in sources)
            operator = node.target.overloadpacket.__name__  # type: ignore[union-attr]
            _replace_by_derived(graph, node, names, f"{names[0]}.{operator}", _evaluator(node, sources))


def _evaluator(node: fx.Node, sources: list[fx.Node]) -> Any:
    target: Any = node.target
    args, kwargs = node.args, dict(node.kwargs)

    def evaluate(*tensors: Tensor) -> Tensor:
        # weights are computed with in float32, as everywhere in a captured graph
        values = dict(zip(sources, (t.float() if t.is_floating_point() else t for t in tensors), strict=True))
        positional, named = fx.node.map_arg((args, kwargs), values.__getitem__)  # type: ignore[type-var]
        result: Tensor = target(*positional, **named)
        return result

    return evaluate


def _replace_by_derived(graph: Graph, node: fx.Node, sources: tuple[str, ...], name: str, function: Any) -> fx.Node:
    unique, count = name, 0
    while unique in graph.weights:
        count += 1
        unique = f"{name}_{count}"
    dtype = str(node.meta["dtype"]).removeprefix("torch.")
    if dtype == "float32" and is_op(node, *_MOVEMENTS):
        dtype = graph.weights.info(sources[0]).dtype  # moving elements around is exact in any dtype
    graph.weights.derive(unique, sources, function, dtype=dtype, shape=tuple(node.meta["shape"]))
    with graph.fx.inserting_before(node):
        new = graph.fx.create_node("get_attr", unique)
    new.meta.update(dtype=node.meta["dtype"], shape=node.meta["shape"])
    node.replace_all_uses_with(new)
    graph.fx.erase_node(node)
    return new


# --- rules -------------------------------------------------------------------------------------------------------------


def _rms_norm(graph: Graph, rsqrt: fx.Node) -> None:
    """``x * rsqrt(mean(x^2) + eps) * weight``, computed in float32 inside a narrower model or not."""
    add = expect(rsqrt.args[0], _aten.add.Tensor, what="mean + eps")
    mean, eps = add.args[:2]
    if isinstance(eps, fx.Node):
        mean, eps = eps, mean
    if not isinstance(eps, float):
        raise Miss("eps is not a number")
    mean = expect(mean, _aten.mean.dim, what="a mean")
    if list(mean.args[1]) != [-1] or mean.args[2:3] != (True,):  # type: ignore[arg-type]
        raise Miss("the mean is not over the last axis")
    square = mean.args[0]
    if is_op(square, _aten.pow.Tensor_Scalar) and square.args[1] == 2:  # type: ignore[union-attr]
        x = square.args[0]  # type: ignore[union-attr]
    elif is_op(square, _aten.mul.Tensor) and square.args[0] is square.args[1]:  # type: ignore[union-attr]
        x = square.args[0]  # type: ignore[union-attr]
    else:
        raise Miss("the mean is not of a square")
    (scaled,) = _users(rsqrt, 1)
    scaled = expect(scaled, _aten.mul.Tensor, what="x * rsqrt")
    if other_operand(scaled, rsqrt) is not x:
        raise Miss("another value than the squared one is scaled")
    last, (user,) = scaled, _users(scaled, 1)
    while is_op(user, _aten.to.dtype):
        last, (user,) = user, _users(user, 1)
    user = expect(user, _aten.mul.Tensor, what="a multiplication by the norm's weight")
    weight = other_operand(user, last)
    if not is_weight(weight) or len(weight.meta["shape"]) != 1:
        raise Miss("the norm's factor is not a stored vector")
    replace(graph, user, _canonical.rms_norm.default, (x, weight, eps))


def _layer_norm(graph: Graph, node: fx.Node) -> None:
    x, shape, *rest = node.args
    if len(shape) != 1:  # type: ignore[arg-type]
        raise Miss("normalizes over more than the last axis")
    weight, bias, eps, *_ = (*rest, *(None, None, 1e-5)[len(rest) :])
    replace(graph, node, _canonical.layer_norm.default, (x, weight, bias, eps))


def _linear(graph: Graph, node: fx.Node) -> None:
    x, weight, *rest = node.args
    if not is_weight(weight):
        raise Miss("the weight is computed at run time")
    shape = weight.meta["shape"]
    replace(graph, node, _canonical.linear.default, (x, weight, rest[0] if rest else None), weight_shape=shape)


def _transpose_product_weights(graph: Graph) -> None:
    """Turns ``W[in, out]`` around under its own name where nothing but products ``x @ W`` reads it."""
    for node in graph.fx.nodes:
        if not is_weight(node) or len(node.meta["shape"]) != 2 or graph.weights.tied(str(node.target)):
            continue
        positions = [user.args.index(node) for user in node.users if is_op(user, *_PRODUCTS)]
        if len(positions) == len(node.users) and all(
            position == (2 if is_op(user, _aten.addmm.default) else 1)
            for user, position in zip(node.users, positions, strict=True)
        ):
            name, shape = str(node.target), tuple(reversed(node.meta["shape"]))
            graph.weights.derive(name, (name,), torch.t, dtype=graph.weights.info(name).dtype, shape=shape)
            node.meta.update(shape=shape, transposed=True)


def _product_with_weight(graph: Graph, node: fx.Node) -> None:
    """``x @ W (+ b)`` with a stored ``W[in, out]``: the weight is kept transposed."""
    bias: Any = None
    if is_op(node, _aten.addmm.default):
        bias, x, weight = node.args[:3]
        if node.kwargs or not is_weight(bias) or len(bias.meta["shape"]) != 1:
            raise Miss("scaled, or the bias is not a stored vector")
    else:
        x, weight = node.args[:2]
    if not is_weight(weight) or len(weight.meta["shape"]) != 2:
        if isinstance(weight, fx.Node) and len(weight.meta["shape"]) == 2:
            raise Miss("the weight is computed at run time")
        return  # a product of two activations
    if not weight.meta.get("transposed"):
        name, (columns, rows) = str(weight.target), weight.meta["shape"]
        with graph.fx.inserting_before(node):
            transpose = graph.fx.call_function(_aten.t.default, (weight,))
        transpose.meta.update(dtype=weight.meta["dtype"], shape=(rows, columns))
        weight = _replace_by_derived(graph, transpose, (name,), f"{name.removesuffix('.weight')}.transposed.weight")
    shape = weight.meta["shape"]
    linear = replace(graph, node, _canonical.linear.default, (x, weight, bias), weight_shape=shape)
    _lift_over_flattening(graph, linear)


def _lift_over_flattening(graph: Graph, linear: fx.Node) -> None:
    """``reshape(linear(reshape(x, [-1, in])), [..., out])`` → ``linear(x)``."""
    flat: Any = linear.args[0]
    users = list(linear.users)
    if not is_op(flat, _aten.reshape.default) or not users:
        return
    x = flat.args[0]
    leading: tuple[Dim, ...] = x.meta["shape"][:-1]
    restored = (*leading, linear.meta["shape"][-1])
    if x.meta["shape"][-1] != flat.meta["shape"][-1]:
        return
    if all(is_op(user, _aten.reshape.default) and user.meta["shape"] == restored for user in users):
        linear.update_arg(0, x)
        linear.meta["shape"] = restored
        for user in users:
            user.replace_all_uses_with(linear)
            graph.fx.erase_node(user)


def _rotary(graph: Graph, add: fx.Node) -> None:
    """``x * cos + cat(-x[half:], x[:half]) * sin``."""
    first, second = add.args[:2]
    if not (is_op(first, _aten.mul.Tensor) and is_op(second, _aten.mul.Tensor)):
        return
    for direct, turned in ((first, second), (second, first)):
        for cat, sin in (turned.args[:2], turned.args[1::-1]):  # type: ignore[union-attr]
            if is_op(cat, _aten.cat.default) and (x := _half_rotated(cat)) is not None:
                if x not in direct.args:  # type: ignore[union-attr]
                    raise Miss("the rotated value is not the one multiplied by the cosine")
                cos = other_operand(direct, x)  # type: ignore[arg-type]
                replace(graph, add, _canonical.rotary.default, (x, cos, sin, False))
                return


def _half_rotated(cat: fx.Node) -> fx.Node | None:
    operands: Any = cat.args[0]
    rank = len(cat.meta["shape"])
    axis = cat.args[1] if len(cat.args) > 1 else 0
    if len(operands) != 2 or axis not in (-1, rank - 1) or not is_op(operands[0], _aten.neg.default):
        return None
    upper, lower = operands[0].args[0], operands[1]
    if not (is_op(upper, _aten.slice.Tensor) and is_op(lower, _aten.slice.Tensor)):
        return None
    x = upper.args[0]
    half = x.meta["shape"][-1] // 2
    lower_args = (*lower.args[1:], *(0, 0, _LAST, 1)[len(lower.args) - 1 :])
    upper_args = (*upper.args[1:], *(0, 0, _LAST, 1)[len(upper.args) - 1 :])
    fits = (
        lower.args[0] is x
        and lower_args in ((rank - 1, 0, half, 1), (-1, 0, half, 1))
        and upper_args[0] in (rank - 1, -1)
        and upper_args[1] == half
        and upper_args[2] >= 2 * half
    )
    return x if fits else None


def _kv_append(graph: Graph, cat: fx.Node) -> None:
    operands: Any = cat.args[0]
    if len(operands) != 2 or operands[0].op != "placeholder":
        return
    port = graph.signature.inputs[graph.inputs.index(operands[0])]
    if port.role != "past":
        return
    if len(cat.meta["shape"]) != 4 or cat.args[1] not in (2, -2):
        raise Miss("a cache is appended along another axis than the sequence")
    replace(graph, cat, _canonical.kv_append.default, tuple(operands))


def _attention(forms: dict[fx.Node, MaskForm | str], graph: Graph, node: fx.Node) -> None:
    query, key, value, *rest = node.args
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    options: dict[str, Any] = {**dict(zip(names, rest, strict=False)), **node.kwargs}
    if options.get("dropout_p"):
        raise Miss("attention with dropout")
    head_dim: Any = query.meta["shape"][-1]  # type: ignore[union-attr]
    scale = options.get("scale")
    scale = head_dim**-0.5 if scale is None else scale
    key, value = _without_repeated_heads(key), _without_repeated_heads(value)
    mask = options.get("attn_mask")
    causal, window = bool(options.get("is_causal")), None
    if mask is not None:
        if mask not in forms:  # layers share their mask
            forms[mask] = closed_form(graph, mask)
        form = forms[mask]
        if isinstance(form, str):
            graph.unrecognized.append({"node": node.name, "pattern": "attention-mask", "reason": form})
        else:
            causal, window, mask = form.causal, form.window, form.padding
    replace(graph, node, _canonical.attention.default, (query, key, value, mask, float(scale), causal, window, None))


def _without_repeated_heads(node: Any) -> Any:
    """``reshape(expand(unsqueeze(k, 2)))``, grouped-query attention's repeated heads → ``k``."""
    reshape, expand = node, node.args[0] if node.args else None
    if not (is_op(reshape, _aten.reshape.default) and is_op(expand, _aten.expand.default)):
        return node
    unsqueeze = expand.args[0]
    if not (is_op(unsqueeze, _aten.unsqueeze.default) and unsqueeze.args[1] == 2):
        return node
    source = unsqueeze.args[0]
    batch, heads, length, width = source.meta["shape"]
    expanded = expand.meta["shape"]
    if expanded == (batch, heads, expanded[2], length, width) and reshape.meta["shape"][2:] == (length, width):
        return source
    return node


def _users(node: fx.Node, count: int) -> list[fx.Node]:
    users = list(node.users)
    if len(users) != count:
        raise Miss(f"{node.name} has {len(users)} readers, not {count}")
    return users


def _rules() -> tuple[Rule, ...]:
    return (
        Rule("rms-norm", (_aten.rsqrt.default,), _rms_norm),
        Rule("layer-norm", (_aten.layer_norm.default,), _layer_norm),
        Rule("linear", (_aten.linear.default,), _linear),
        Rule("product-with-weight", _PRODUCTS, _product_with_weight),
        Rule("rotary", (_aten.add.Tensor,), _rotary),
        Rule("kv-append", (_aten.cat.default,), _kv_append),
        Rule("attention", (_aten.scaled_dot_product_attention.default,), partial(_attention, {})),
    )


_LEFTOVERS = {
    _aten.softmax.int: "attention written out: only scaled_dot_product_attention is recognised",
    _aten.conv1d.default: "convolutions are not quantized",
    _aten.bmm.default: "a product of two computed values",
}


def _note_leftovers(graph: Graph) -> None:
    for node in graph.fx.nodes:
        if node.op == "call_function" and node.target in _LEFTOVERS:
            reason = _LEFTOVERS[node.target]
            graph.unrecognized.append({"node": node.name, "pattern": str(node.target), "reason": reason})
    for port, node in zip(graph.signature.inputs, graph.inputs, strict=True):
        if port.role == "past" and not any(is_op(user, _canonical.kv_append.default) for user in node.users):
            reason = f"the cache {port.name} is not appended to"
            graph.unrecognized.append({"node": node.name, "pattern": "kv-append", "reason": reason})


