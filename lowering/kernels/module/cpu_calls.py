"""Behind building, on a CPU: PyTorch's functions called themselves, and one product for layers that read one value.

For one token, calling an operator costs more than what it computes: through ``torch.ops`` PyTorch's own take up to
three times as long as through its functions, and those written in Python longer. So, in a module for the CPU,

| the module had | it gets |
|---|---|
| ``torch.ops.aten`` operators that stand in every layer | the function or method of the same name |
| `CachedAttention` over caches in float | the same, with PyTorch's attention for a single token |
| canonical ``linear``, ``rms_norm``, ``rotary`` | functions with the same arithmetic |
| ``append_static`` to a cache in float | one copy into its place |
| `WeightOnlyLinear`, several where they read one value | one `PackedProduct`, and views of its result |

Nothing is rounded elsewhere than before, but for the weights of values in attention: PyTorch multiplies them in the
dtype of the cache, as it does for many tokens at once.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from qcompiler.lowering.kernels.module.cached_attention import CachedAttention
from qcompiler.lowering.kernels.weight_only import cpu as weight_only_cpu
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear

__all__ = ["PackedProduct", "PlainAttention", "call_directly"]

_BLOCK = 64  # output channels that int4pack interleaves, at most; whole blocks may follow each other
_aten, _canonical, _kernels = torch.ops.aten, torch.ops.qcompiler, torch.ops.qcompiler_kernels


def call_directly(module: fx.GraphModule) -> None:
    """Makes the step of a module for the CPU cheap.

    Args:
        module: see `qcompiler.lowering.kernels.module.build`; changed in place.
    """
    _merge_products(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, CachedAttention) and not (layer.keys or layer.values or layer.softcap):
            module.set_submodule(name, PlainAttention(layer))
    past = next(node for node in module.graph.nodes if node.op == "placeholder" and node.target == "past")
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
        elif node.target is _kernels.append_static.default and node.args[2] is None:
            new, cache = node.args[:2]
            node.target, node.args = append, (new, cache, past)
    module.graph.lint()
    module.recompile()


@fx.node.has_side_effect  # or it would be taken for dead code
def append(new: Tensor, cache: Tensor, past: int) -> Tensor:
    """Writes float ``[B, H, S, D]`` to rows ``past`` and on of a cache ``[B, H, capacity, D]``."""
    return cache.narrow(2, past, new.shape[2]).copy_(new)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The canonical operator of float32, float16 or bfloat16."""
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The canonical operator."""
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = x.chunk(2, -1)
        rotated = torch.cat((high.neg(), low), dim=-1)
    return x * cos + rotated * sin


_METHODS: dict[Any, str] = {
    _aten.reshape.default: "reshape",
    _aten.view.default: "view",
    _aten.to.dtype: "to",
    _aten.transpose.int: "transpose",
    _aten.unsqueeze.default: "unsqueeze",
    _aten.expand.default: "expand",
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.cat.default: torch.cat,
    _aten.silu.default: F.silu,
    _aten.gelu.default: F.gelu,
    _aten.embedding.default: torch.embedding,
    _canonical.linear.default: F.linear,
    _canonical.rms_norm.default: rms_norm,
    _canonical.rotary.default: rotary,
}


class PackedProduct(nn.Module):
    """The product of one or several low-bit weights with one value, by PyTorch's operator and past the dispatcher.

    Args:
        layers: of one `_form`; their output channels follow each other.
    """

    def __init__(self, layers: Sequence[WeightOnlyLinear]) -> None:
        super().__init__()
        first = layers[0]
        self.in_features = first.in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self._layout, self._group = first.layout, first.group
        axis = 1 if first.layout == "int4pack" else 0
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]))
        self.register_buffer("scale", torch.cat([layer.scale for layer in layers], dim=axis))
        self.register_buffer("bias", torch.cat(biases) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 ``[..., in]`` → ``[..., out]``."""
        rows = x.reshape(-1, self.in_features).contiguous()
        given = cast(tuple[Tensor, Tensor, Tensor | None], (self.weight, self.scale, self.bias))
        result = weight_only_cpu.launch(rows, *given, self._group, self._layout)
        return result.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and layout, as printed with a module."""
        return f"{self.in_features}, {self.out_features}, {self._layout}"


class PlainAttention(nn.Module):
    """A single token's attention over caches in float by PyTorch's operator, which reads them where they lie.

    Args:
        layer: what it is for; takes several tokens at once.
    """

    def __init__(self, layer: CachedAttention) -> None:
        super().__init__()
        self.layer = layer
        self._scale, self._window = layer.scale, layer.window

    def forward(
        self, q: Tensor, length: Tensor, total: int, k: Tensor, k_scale: None, k_zero: None, v: Tensor, *rest: None
    ) -> Tensor:
        """See `CachedAttention.forward`."""
        if q.shape[2] > 1:
            result: Tensor = self.layer(q, length, total, k, k_scale, k_zero, v, *rest)
            return result
        used = total if self._window is None else min(total, self._window)
        keys, values = (cache.narrow(2, total - used, used) for cache in (k, v))
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, scale=self._scale, enable_gqa=is_grouped)


def _merge_products(module: fx.GraphModule) -> None:
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, WeightOnlyLinear) and layer.choice.implementation == "cpu"
    }
    calls = [node for node in module.graph.nodes if node.op == "call_module" and node.target in layers]
    uses = Counter(node.target for node in calls)
    together: dict[object, list[Node]] = {}
    for node in calls:
        layer = layers[node.target]
        joins = uses[node.target] == 1 and (layer.layout != "int4pack" or layer.out_features % _BLOCK == 0)
        key = _form(layer), node.args[0] if joins else node.target
        together.setdefault(key, []).append(node)
    for nodes in together.values():
        name, merged = str(nodes[0].target), [layers[target] for target in dict.fromkeys(n.target for n in nodes)]
        module.set_submodule(name, PackedProduct(merged))
        if len(merged) > 1:
            _share(module.graph, nodes, merged, name)
    module.delete_all_unused_submodules()


def _share(graph: fx.Graph, nodes: Sequence[Node], layers: Sequence[WeightOnlyLinear], name: str) -> None:
    """Views of one result in the place of several calls."""
    with graph.inserting_before(nodes[0]):
        whole, start = graph.call_module(name, nodes[0].args), 0
    for node, layer in zip(nodes, layers, strict=True):
        with graph.inserting_before(node):
            part = graph.call_method("narrow", (whole, -1, start, layer.out_features))
        start += layer.out_features
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _form(layer: WeightOnlyLinear) -> tuple[object, ...]:
    """Equal for layers whose output channels may follow each other."""
    return layer.layout, layer.group, layer.in_features, layer.bias is None
