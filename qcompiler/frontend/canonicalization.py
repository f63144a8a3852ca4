"""Rewrites an exported graph to the canonical operators of `qcompiler.ir.ops`, by structure alone.

After `qcompiler.frontend`, the rules below turn decomposed norms, linears, rotary embeddings, cache appends and
attention into one node each. What no rule recognises stays as ATen operators, which every target also takes, and is
listed in ``graph.unrecognized``.
"""

from functools import partial
from typing import Any

import torch
from torch import fx

from qcompiler.frontend.pattern import (
    Miss,
    Rule,
    apply_rules,
    arguments,
    expect,
    is_weight,
    note,
    other_operand,
    replace,
)
from qcompiler.frontend.rules.attention_rules import (
    Forms,
    attention,
    attention_written_out,
    kv_append,
    rotary,
    rotary_by_halves,
    without_dead_rows,
)
from qcompiler.frontend.rules.expert_rules import Parts, chosen_product, stacked_product
from qcompiler.frontend.rules.exported_forms import (
    error_gelu,
    gated_sigmoid,
    inverse_root,
    late_bias,
    without_empty_rows,
)
from qcompiler.frontend.simplify import (
    PRODUCTS,
    assemble_parts,
    fold_weight_expressions,
    is_transposed_weight,
    merge_equal_nodes,
    remove_noise,
    replace_by_derived,
)
from qcompiler.ir import Dim, Graph, is_op

__all__ = ["canonicalize"]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler


def canonicalize(graph: Graph) -> Graph:
    """Rewrites ``graph`` in place and returns it; applying it twice changes nothing more."""
    remove_noise(graph)
    assemble_parts(graph)
    merge_equal_nodes(graph)
    fold_weight_expressions(graph)
    apply_rules(graph, _rules())
    merge_equal_nodes(graph)  # rows that several matrices of one expert read
    _note_leftovers(graph)
    graph.fx.lint()
    return graph


# --- rules ------------------------------------------------------------------------------------------------------------


def _rms_norm(graph: Graph, rsqrt: fx.Node) -> None:
    """``x * rsqrt(mean(x^2) + eps) * weight``, computed in float32 inside a narrower model or not; weight may lack."""
    add = expect(rsqrt.args[0], _aten.add.Tensor, what="mean + eps")
    mean, eps = add.args[:2]
    if isinstance(eps, fx.Node):
        mean, eps = eps, mean
    if not isinstance(eps, float):
        raise Miss("eps is not a number")
    mean = expect(mean, _aten.mean.dim, what="a mean")
    if not _is_over_last_axis(mean):
        raise Miss("the mean is not over the last axis")
    square: Any = mean.args[0]
    if not (
        (is_op(square, _aten.pow.Tensor_Scalar) and square.args[1] == 2)
        or (is_op(square, _aten.mul.Tensor) and square.args[0] is square.args[1])
    ):
        raise Miss("the mean is not of a square")
    x = square.args[0]
    (scaled,) = _users(rsqrt, 1)
    scaled = expect(scaled, _aten.mul.Tensor, what="x * rsqrt")
    if other_operand(scaled, rsqrt) is not x:
        raise Miss("another value than the squared one is scaled")
    end, weight = _norm_weight(graph, scaled, x.meta["shape"][-1])
    replace(graph, end, _canonical.rms_norm.default, (x, weight, eps))


def _norm_weight(graph: Graph, scaled: fx.Node, width: Dim) -> tuple[fx.Node, fx.Node]:
    """Where a norm ends, and its weight: a stored vector it is multiplied with there, else ones."""
    last = scaled
    while len(last.users) == 1:
        (user,) = last.users
        if is_op(user, _aten.mul.Tensor):
            weight = other_operand(user, last)
            if is_weight(weight) and weight.meta["shape"] == (width,):
                return user, weight
        if not is_op(user, _aten.to.dtype):
            break
        last = user
    return scaled, _ones(graph, scaled, width)


def _ones(graph: Graph, norm: fx.Node, width: Dim) -> fx.Node:
    if not isinstance(width, int):
        raise Miss("the width of a norm varies")
    name = f"{norm.name}.ones"
    graph.weights.set(name, torch.ones(width))
    with graph.fx.inserting_before(norm):
        node = graph.fx.create_node("get_attr", name)
    node.meta.update(dtype=torch.float32, shape=(width,))
    return node


def _centred_norm(graph: Graph, norm: fx.Node) -> None:
    """The root mean square norm of ``x - mean(x)`` is a layer norm without a bias."""
    x, weight, eps = norm.args
    if not is_op(x, _aten.sub.Tensor) or x.kwargs:  # type: ignore[union-attr]
        return
    source, mean = x.args  # type: ignore[union-attr]
    if is_op(mean, _aten.mean.dim) and mean.args[0] is source and _is_over_last_axis(mean):  # type: ignore[union-attr]
        replace(graph, norm, _canonical.layer_norm.default, (source, weight, None, eps))


def _layer_norm(graph: Graph, node: fx.Node) -> None:
    x, shape, weight, bias, eps, *_ = arguments(node, 2, None, None, 1e-5, True)
    if len(shape) != 1:
        raise Miss("normalizes over more than the last axis")
    replace(graph, node, _canonical.layer_norm.default, (x, weight, bias, eps))


def _fused_rms_norm(graph: Graph, node: fx.Node) -> None:
    """``aten.rms_norm``, which `torch.nn.RMSNorm` calls."""
    x, shape, weight, eps = arguments(node, 2, None, None)
    if len(shape) != 1:
        raise Miss("normalizes over more than the last axis")
    if weight is None:
        weight = _ones(graph, node, x.meta["shape"][-1])
    elif not is_weight(weight):
        raise Miss("the norm's factor is not a stored vector")
    eps = torch.finfo(node.meta["dtype"]).eps if eps is None else eps
    replace(graph, node, _canonical.rms_norm.default, (x, weight, float(eps)))


def _linear(graph: Graph, node: fx.Node) -> None:
    x, weight, bias = arguments(node, 2, None)
    if not is_weight(weight) or len(weight.meta["shape"]) != 2:
        raise Miss("the weight is computed at run time, or no matrix")
    if bias is not None and not is_weight(bias):
        raise Miss("the bias is computed at run time")
    replace(graph, node, _canonical.linear.default, (x, weight, bias), weight_shape=weight.meta["shape"])


def _product_with_weight(graph: Graph, node: fx.Node) -> None:
    """``x @ W (+ b)`` with a stored ``W[in, out]``: the weight is kept transposed.

    Where nothing but such products reads the weight, it keeps its name.
    """
    if not any(is_weight(source) or is_transposed_weight(source) for source in node.all_input_nodes):
        return  # a product of two activations
    _, weight, _ = _product_operands(node)
    if is_transposed_weight(weight):
        _put_linear(graph, node, weight.args[0])  # type: ignore[arg-type]
        return
    readers = list(weight.users)
    if not graph.weights.tied(str(weight.target)) and all(_is_plain_product(user, weight) for user in readers):
        name, shape = str(weight.target), tuple(reversed(weight.meta["shape"]))
        graph.weights.derive(name, (name,), torch.t, dtype=graph.weights.info(name).dtype, shape=shape)
        graph.provenance.setdefault("transposed", []).append(name)
        weight.meta["shape"] = shape
        for reader in readers:
            _put_linear(graph, reader, weight)
        return
    with graph.fx.inserting_before(node):
        transposed = graph.fx.call_function(_aten.t.default, (weight,))
    transposed.meta.update(dtype=weight.meta["dtype"], shape=tuple(reversed(weight.meta["shape"])))
    name = f"{str(weight.target).removesuffix('.weight')}.transposed.weight"
    _put_linear(graph, node, replace_by_derived(graph, transposed, (str(weight.target),), name, torch.t))


def _product_operands(node: fx.Node) -> tuple[Any, fx.Node, Any]:
    """``x``, the stored matrix (or its transpose) and the bias of a product."""
    bias: Any = None
    if is_op(node, _aten.addmm.default):
        bias, x, weight = node.args[:3]
        if node.kwargs or len(node.args) > 3:
            raise Miss("the product or the bias is scaled")
        if not is_weight(bias) or len(bias.meta["shape"]) != 1:
            raise Miss("the bias is not a stored vector")
    else:
        x, weight = node.args[:2]
    if not ((is_weight(weight) and len(weight.meta["shape"]) == 2) or is_transposed_weight(weight)):
        raise Miss("the right factor is not a stored matrix")
    if is_weight(x):
        raise Miss("a product of two stored tensors")
    return x, weight, bias  # type: ignore[return-value]


def _is_plain_product(node: fx.Node, weight: fx.Node) -> bool:
    if not is_op(node, *PRODUCTS):
        return False
    try:
        return _product_operands(node)[1] is weight
    except Miss:
        return False


def _put_linear(graph: Graph, product: fx.Node, weight: fx.Node) -> None:
    x, _, bias = _product_operands(product)
    shape = weight.meta["shape"]
    linear = replace(graph, product, _canonical.linear.default, (x, weight, bias), weight_shape=shape)
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


def _is_over_last_axis(mean: Any) -> bool:
    return list(mean.args[1]) in ([-1], [len(mean.meta["shape"]) - 1]) and mean.args[2:3] == (True,)


def _users(node: fx.Node, count: int) -> list[fx.Node]:
    users = list(node.users)
    if len(users) != count:
        raise Miss(f"{node.name} has {len(users)} readers, not {count}")
    return users


def _rules() -> tuple[Rule, ...]:
    parts: Parts = {}
    forms: Forms = {}
    return (
        Rule("experts", (_aten.bmm.default,), partial(chosen_product, parts)),
        Rule("experts", (_aten.bmm.default, _aten.matmul.default), partial(stacked_product, parts)),
        Rule("inverse-root", (_aten.reciprocal.default, _aten.div.Tensor), inverse_root),
        Rule("silu", (_aten.sigmoid.default,), gated_sigmoid),
        Rule("gelu", (_aten.erf.default,), error_gelu),
        Rule("rms-norm", (_aten.rsqrt.default,), _rms_norm),
        Rule("rms-norm", (_aten.rms_norm.default,), _fused_rms_norm),
        Rule("layer-norm", (_canonical.rms_norm.default,), _centred_norm),
        Rule("layer-norm", (_aten.layer_norm.default,), _layer_norm),
        Rule("linear", (_aten.linear.default,), _linear),
        Rule("product-with-weight", PRODUCTS, _product_with_weight),
        Rule("bias", (_aten.add.Tensor,), late_bias),
        Rule("rotary", (_aten.add.Tensor,), rotary),
        Rule("rotary", (_aten.cat.default,), rotary_by_halves),
        Rule("kv-append", (_aten.cat.default,), kv_append),
        Rule("attention", (_aten.scaled_dot_product_attention.default,), partial(attention, forms)),
        Rule("attention", (_aten.isnan.default,), without_empty_rows),
        Rule("attention", (_aten.softmax.int,), partial(attention_written_out, forms)),
        Rule("attention", (_canonical.attention.default,), partial(without_dead_rows, forms)),
    )


_LEFTOVERS = {
    _aten.conv1d.default: "convolutions are not quantized",
    _aten.bmm.default: "a product of two computed values",
    _aten.dropout.default: "dropout is active: every run gives another result",
}


def _note_leftovers(graph: Graph) -> None:
    for node in graph.fx.nodes:
        if node.op == "call_function" and node.target in _LEFTOVERS:
            note(graph, node, str(node.target), _LEFTOVERS[node.target])
    for port, node in zip(graph.signature.inputs, graph.inputs, strict=True):
        if port.role == "past" and not any(is_op(user, _canonical.kv_append.default) for user in node.users):
            note(graph, node, "kv-append", f"the cache {port.name} is not appended to")
