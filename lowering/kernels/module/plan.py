"""What becomes of the nodes of a graph, decided before anything is built."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from qcompiler.ir import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Affine,
    Codebook,
    Graph,
    is_op,
    site_name,
)
from qcompiler.lowering.kernels.launch.device import Choice
from qcompiler.lowering.kernels.module.forms import (
    AppendedCache,
    Rounding,
    appended_caches,
    input_rounding,
    reads,
    sees_all,
    stored_weight,
)
from qcompiler.lowering.kernels.module.layers import SiteLayer
from qcompiler.numerics import QuantSpec

__all__ = ["Plan"]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_SYMBOLS = {BATCH, SEQUENCE, PAST, TOTAL}


class Plan:
    """Which nodes are computed by what, and from which others.

    Args:
        graph: not changed.

    Attributes:
        ports: by placeholder.
        constant: stored tensors, and what is computed from them alone.
        caches: those that are kept in buffers.
        appends: the cache that each of their ``kv_append`` nodes belongs to.
        unmasked: attention whose mask hides nothing where no token is padding.
        layers: by linear node.
        taken: by linear layer that takes codes of activations, the rounding that gives them.
        roundings: the same, by their ``quantize`` node.
        owned: scales and zero points that a rounding gives, to its ``quantize`` node.
        sites: for the report, how each linear layer is computed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
        self.constant: set[Node] = set()
        for node in graph.fx.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and inputs and self.constant.issuperset(inputs)):
                self.constant.add(node)
        self.caches = appended_caches(graph)
        self.appends = {append: cache for cache in self.caches for append in cache.appends}
        self._reads = {node: cache for cache in self.caches for node in reads(cache)}
        padding = next((node for node, port in self.ports.items() if port.role == "mask"), None)
        attention = [node for node in graph.fx.nodes if is_op(node, _canonical.attention.default)]
        self.unmasked = {node for node in attention if sees_all(cast(Node | None, node.args[3]), padding)}
        self.layers: dict[Node, SiteLayer] = {}
        self.taken: dict[Node, Rounding] = {}
        self.roundings: dict[Node, Rounding] = {}
        self.owned: dict[Node, Node] = {}
        self.sites: list[dict[str, Any]] = []

    def make_layers(self, make: Callable[[Any, Node | None, Rounding | None], SiteLayer]) -> None:
        """Makes the module of every linear layer that logits or caches depend on; one for all uses of a weight.

        Args:
            make: of the quantized weight, the node of the bias, and the rounding of the input.
        """
        names = {node: site.name for site in self._graph.sites() for node in site.nodes}
        made: dict[tuple[Node, QuantSpec | None], SiteLayer] = {}
        needed = self.required()
        for node in self._graph.fx.nodes:
            if node not in needed or not is_op(node, _canonical.linear.default):
                continue
            weight, bias = cast(Node, node.args[1]), node.args[2] if len(node.args) > 2 else None
            rounding = input_rounding(node.args[0], node.meta["weight_shape"][1])
            key = weight, None if rounding is None else rounding.spec
            if key not in made:
                form = stored_weight(self._graph, weight) if weight in self.constant else None
                made[key] = _IN_FLOAT if weight.op == "get_attr" else make(form, cast(Node | None, bias), rounding)
                described = None if weight.op == "get_attr" else _described(form, weight)
                self._note(names.get(node, site_name(weight.name)), described, rounding, made[key].choice)
            self.layers[node] = made[key]
            if rounding is not None and made[key].takes_codes:
                self._take(node, rounding)

    def _note(self, site: str, weight: str | None, rounding: Rounding | None, choice: Choice) -> None:
        activation = None if rounding is None else str(rounding.spec)
        implementation = "float" if weight is None else choice.implementation
        fields = {"implementation": implementation, "reason": choice.reason}
        self.sites.append({"site": site, "weight": weight, "activation": activation, **fields})

    def _take(self, linear: Node, rounding: Rounding) -> None:
        self.taken[linear] = rounding
        self.roundings[rounding.codes] = rounding
        if rounding.choose is not None and rounding.spec.granularity == "per_token":
            given = (rounding.choose, rounding.scale, rounding.zero_point)
            self.owned |= {node: rounding.codes for node in given if node is not None}

    def required(self) -> set[Node]:
        """The nodes whose values logits and caches depend on."""
        roots = [cache.value for cache in self.caches]
        for node, port in zip(self._graph.outputs, self._graph.signature.outputs, strict=True):
            if port.role == "logits" or (port.role == "present" and node not in self.appends):
                roots.append(node)
        needed: set[Node] = set()
        while roots:
            node = roots.pop()
            if node not in needed:
                needed.add(node)
                roots.extend(self._needs(node))
        return needed

    def _needs(self, node: Node) -> list[Node]:
        """What a node is computed from."""
        if node in self.constant or node.op == "placeholder" or node in self.appends or self.symbol(node) is not None:
            return []
        if node in self.owned:
            return [self.owned[node]]
        if node in self.taken:
            return [self.taken[node].codes]
        if node in self.roundings:
            rounding = self.roundings[node]
            source = rounding.value if rounding.norm is None else cast(Node, rounding.norm.args[0])
            scales = (rounding.scale, rounding.zero_point)
            return [source, *(n for n in scales if n is not None and n not in self.owned)]
        if self.fused_caches(node) is not None:
            return [cast(Node, node.args[0])]
        return node.all_input_nodes  # a mask that hides nothing is left out as dead code

    def fused_caches(self, node: Node) -> tuple[AppendedCache, AppendedCache] | None:
        """The keys and values that attention reads, where the fused operator computes what it says."""
        if node not in self.unmasked or not node.args[5]:
            return None
        keys, values = (self._reads.get(cast(Node, argument)) for argument in node.args[1:3])
        return None if keys is None or values is None else (keys, values)

    def symbol(self, node: Node) -> str | None:
        """Which size of the signature a node is."""
        if not is_op(node, _aten.sym_size.int):
            return None
        source, axis = cast(tuple[Node, int], node.args)
        shape = self.ports[source].shape if source in self.ports else source.meta.get("shape", ())
        found = shape[axis] if axis < len(shape) else None
        return found if found in _SYMBOLS else None


def _described(form: Affine | Codebook | None, weight: Node) -> str:
    """The format of a weight, or the operator that makes it."""
    return str(form.spec) if form is not None else str(getattr(weight.target, "__name__", weight.target)).split(".")[0]


_IN_FLOAT = SiteLayer(None, Choice("reference", "not quantized"))
