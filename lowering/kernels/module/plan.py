"""Step 2 of 4, `Plan`: what becomes of the nodes of a graph, decided before anything is built.

`forms` says what single nodes are. The plan puts that together: what an operator takes over with its neighbours (a norm
and the quantizer behind it, a cache and the attention over it) is computed by nobody else, and what nothing needs any
more is not computed at all. `build` asks it, node by node.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
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
from qcompiler.lowering.kernels.module.deferred import Deferred, bytes_of
from qcompiler.lowering.kernels.module.forms import (
    AppendedCache,
    Rounding,
    appended_caches,
    cache_reads,
    hides_nothing,
    input_rounding,
    stored_weight,
)
from qcompiler.lowering.kernels.module.site_modules import SiteModule
from qcompiler.numerics import QuantSpec

__all__ = ["Plan"]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
_SYMBOLS = {BATCH, SEQUENCE, PAST, TOTAL}

MakeSiteModule = Callable[[Affine | Codebook | None, Node | None, Rounding | None], SiteModule]
"""Of the quantized weight (None: in a form no operator knows), the node of the bias, and the rounding of the input."""


class Plan:
    """For every node of a graph: what computes its value in the module, and from which other nodes.

    Making one recognises caches and masks. `make_site_modules` then decides how each linear layer is computed, and with
    that which of them take codes of activations. `needed` is what is left to be built.

    Args:
        graph: not changed.
        is_deferred: layers are made, and left as `Deferred`.

    Attributes:
        ports: by placeholder, the port it is.
        constants: stored tensors, and what is computed from them alone.
        caches: those that are kept in buffers and written in place.
        cache_of_append: by ``kv_append`` node, the cache it appends to.
        unmasked: attention whose mask hides nothing where no token is padding.
        site_modules: by linear node, how it is computed.
        codes_taken: by linear node that takes codes of activations, the rounding that gives them.
        rounding_at: by ``quantize`` node, the rounding it belongs to, if some layer takes its codes.
        quantizer_of: by node that computes a scale or zero point, the ``quantize`` node whose operator gives it too.
        site_reports: for the report, how each linear layer is computed.
    """

    def __init__(self, graph: Graph, *, is_deferred: bool = False) -> None:
        self._graph, self._is_deferred = graph, is_deferred
        self.ports = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
        self.constants: set[Node] = set()
        for node in graph.fx.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and inputs and self.constants.issuperset(inputs)):
                self.constants.add(node)
        self.caches = appended_caches(graph)
        self.cache_of_append = {append: cache for cache in self.caches for append in cache.appends}
        self._cache_of_read = {node: cache for cache in self.caches for node in cache_reads(cache)}
        padding = next((node for node, port in self.ports.items() if port.role == "mask"), None)
        attention = [node for node in graph.fx.nodes if is_op(node, _canonical.attention.default)]
        self.unmasked = {node for node in attention if hides_nothing(cast(Node | None, node.args[3]), padding)}
        self.site_modules: dict[Node, SiteModule] = {}
        self.codes_taken: dict[Node, Rounding] = {}
        self.rounding_at: dict[Node, Rounding] = {}
        self.quantizer_of: dict[Node, Node] = {}
        self.site_reports: list[dict[str, Any]] = []

    def make_site_modules(self, make: MakeSiteModule) -> None:
        """Makes the module of every linear layer that logits or caches depend on; one for all uses of a weight.

        Args:
            make: the module, for one whose weight is not in float.
        """
        names = {node: site.name for site in self._graph.sites() for node in site.nodes}
        made: dict[tuple[Node, QuantSpec | None], SiteModule] = {}
        needed = self.needed()
        for node in self._graph.fx.nodes:
            if node not in needed or not is_op(node, _canonical.linear.default):
                continue
            weight = cast(Node, node.args[1])
            rounding = input_rounding(node.args[0], node.meta["weight_shape"][1])
            key = weight, None if rounding is None else rounding.spec
            if key not in made:
                made[key] = self._make_one(node, rounding, make, names.get(node, site_name(weight.name)))
            self.site_modules[node] = made[key]
            if rounding is not None and made[key].takes_codes:
                self._take_codes(node, rounding)

    def _make_one(self, linear: Node, rounding: Rounding | None, make: MakeSiteModule, site: str) -> SiteModule:
        """Makes the module of a linear layer, if its weight is not in float, and reports it."""
        weight, bias = cast(Node, linear.args[1]), linear.args[2] if len(linear.args) > 2 else None
        made, weight_format, implementation = _IN_FLOAT, None, "float"

        def from_store() -> tuple[Affine | Codebook | None, SiteModule]:
            form = stored_weight(self._graph, weight) if weight in self.constants else None
            return form, make(form, cast(Node | None, bias), rounding)

        if weight.op != "get_attr":
            form, made = from_store()
            weight_format, implementation = _weight_format(form, weight), made.choice.implementation
            if self._is_deferred and made.module is not None:
                size = bytes_of(made.module)
                made = replace(made, module=Deferred(lambda: cast(nn.Module, from_store()[1].module), size))
        self.site_reports.append(
            {
                "site": site,
                "weight": weight_format,
                "activation": None if rounding is None else str(rounding.spec),
                "implementation": implementation,
                "reason": made.choice.reason,
            }
        )
        return made

    def _take_codes(self, linear: Node, rounding: Rounding) -> None:
        """Notes that a linear layer takes codes; where one operator gives scales with them, those are nobody else's."""
        self.codes_taken[linear] = rounding
        self.rounding_at[rounding.codes] = rounding
        if rounding.choose is not None and rounding.spec.granularity == "per_token":
            given = (rounding.choose, rounding.scale, rounding.zero_point)
            self.quantizer_of |= {node: rounding.codes for node in given if node is not None}

    def needed(self) -> set[Node]:
        """The nodes whose values logits and caches depend on."""
        roots = [cache.value for cache in self.caches]
        for node, port in zip(self._graph.outputs, self._graph.signature.outputs, strict=True):
            if port.role == "logits" or (port.role == "present" and node not in self.cache_of_append):
                roots.append(node)
        needed: set[Node] = set()
        while roots:
            node = roots.pop()
            if node not in needed:
                needed.add(node)
                roots.extend(self._sources(node))
        return needed

    def _sources(self, node: Node) -> list[Node]:
        """What a node is computed from in the module; not what is known before it runs."""
        if node in self.constants or node in self.cache_of_append:
            return []
        if node.op == "placeholder" or self.size_symbol(node) is not None:
            return []
        if node in self.quantizer_of:
            return [self.quantizer_of[node]]
        if node in self.codes_taken:
            return [self.codes_taken[node].codes]
        if node in self.rounding_at:
            rounding = self.rounding_at[node]
            source = rounding.value if rounding.norm is None else cast(Node, rounding.norm.args[0])
            scales = (rounding.scale, rounding.zero_point)
            return [source, *(n for n in scales if n is not None and n not in self.quantizer_of)]
        if self.fused_caches(node) is not None:
            return [cast(Node, node.args[0])]
        return node.all_input_nodes  # a mask that hides nothing is left out as dead code

    def fused_caches(self, node: Node) -> tuple[AppendedCache, AppendedCache] | None:
        """The keys and values that attention reads, where the fused operator computes what it says."""
        if node not in self.unmasked or not node.args[5]:
            return None
        keys, values = (self._cache_of_read.get(cast(Node, argument)) for argument in node.args[1:3])
        return None if keys is None or values is None else (keys, values)

    def size_symbol(self, node: Node) -> str | None:
        """The size of the signature, such as ``sequence``, that a node gives; None for other nodes."""
        if not is_op(node, _aten.sym_size.int):
            return None
        source, axis = cast(tuple[Node, int], node.args)
        shape = self.ports[source].shape if source in self.ports else source.meta.get("shape", ())
        found = shape[axis] if axis < len(shape) else None
        return found if found in _SYMBOLS else None


def _weight_format(form: Affine | Codebook | None, weight: Node) -> str:
    """The format of a weight, or the operator that makes it."""
    return str(form.spec) if form is not None else str(getattr(weight.target, "__name__", weight.target)).split(".")[0]


_IN_FLOAT = SiteModule(None, Choice("reference", "not quantized"))
