"""Step 3 of 4, `build_module`: a new module in which what has a kernel is a call of it, and all else stays as it was.

It goes through the nodes of the graph in order, asks the `plan` what each becomes, and puts that into a new graph;
`values` keeps what has become of them, in which dtype. The old graph is not changed.

| in the graph | in the module |
|---|---|
| ``linear(x, dequantize(codes, ...))`` | a `WeightOnlyLinear` |
| the same, ``x`` being ``dequantize(quantize(...))`` | one quantizer for all readers, a `ScaledLinear` for each |
| ``rms_norm`` that such a quantizer alone reads | one operator for both |
| ``linear(x, sparse_add(codebook_dequantize(...)))`` | a `CodebookLinear` |
| ``kv_append`` of a cache, quantized ahead of it or not | written into a buffer in place |
| ``attention`` over such caches | a `CachedAttention` |
| norms, gated activations, rotary embeddings, on CUDA | one launch each, see `neighbours` |
| weights in another form | dequantized once |
| masks that hide only padding | left out: no token is padding |

The module takes ``(ids, start, past, *caches)`` and gives ``(logits, *loose)``: ``start`` int32 ``[1]`` on the device
and ``past`` say how many tokens the caches hold, which `Slot` describes, in the order of the graph's ports.
"""

import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx import Node

import qcompiler.lowering.kernels.rows.quantize_rows  # noqa: F401  (defines operators)
from qcompiler.ir import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    CacheFormat,
    Graph,
    is_op,
    makes_a_tensor,
)
from qcompiler.lowering.kernels.cache import append as cache_append
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.module.cached_attention import CachedAttention
from qcompiler.lowering.kernels.module.forms import AppendedCache, Rounding
from qcompiler.lowering.kernels.module.neighbours import Neighbours
from qcompiler.lowering.kernels.module.plan import Plan
from qcompiler.lowering.kernels.module.precision import is_moving, precision_of
from qcompiler.lowering.kernels.module.site_modules import Hadamard, SiteModule, make_site_module
from qcompiler.lowering.kernels.module.values import WIDE, ModuleValues, dtype_name

__all__ = ["BuiltModule", "Slot", "build_module"]

_aten, _canonical, _kernels = torch.ops.aten, torch.ops.qcompiler, torch.ops.qcompiler_kernels


@dataclass(frozen=True)
class Slot:
    """A cache that the module takes: ``[batch, heads, capacity, width]``.

    Attributes:
        dtype: of its elements.
        heads, width: as above.
        is_buffer: written in place, of any capacity that suffices; otherwise it holds exactly the tokens so far, and
            the module gives back the longer one.
    """

    dtype: torch.dtype
    heads: int
    width: int
    is_buffer: bool


@dataclass
class BuiltModule:
    """What `build_module` makes.

    Attributes:
        module: see above.
        slots: the caches that it takes.
        sites: for every linear layer, how it is computed.
        caches: for every pair of caches, how it is appended to and read.
        fused_norms: norms that quantize their result themselves.
        neighbours: the implementation of other norms, gated activations and rotary embeddings, why not a better one,
            and how many launches there are of each operator of `qcompiler.lowering.kernels.module.neighbours`.
        rounded: names of the graph's nodes whose values are rounded to the module's dtype.
    """

    module: fx.GraphModule
    slots: tuple[Slot, ...]
    sites: list[dict[str, Any]]
    caches: list[dict[str, Any]]
    fused_norms: int
    neighbours: dict[str, Any]
    rounded: frozenset[str]


def build_module(graph: Graph, device: torch.device, dtype: torch.dtype, *, is_deferred: bool = False) -> BuiltModule:
    """A module on a device that computes the logits of a graph, which is not changed.

    Args:
        graph: with ``ids`` and ``logits``.
        device: where it will run; weights are moved there one at a time.
        dtype: of activations.
        is_deferred: each weight is made once, to see what it comes to, and a `Deferred` is left in its place.
    """
    return _Builder(graph, device, dtype, is_deferred).run()


class _Builder:
    """Builds one module."""

    def __init__(self, graph: Graph, device: torch.device, dtype: torch.dtype, is_deferred: bool) -> None:
        self._graph, self._device, self._dtype = graph, device, dtype
        self._plan = Plan(graph, is_deferred=is_deferred)
        self._values = ModuleValues(graph, self._plan, device, dtype, is_deferred=is_deferred)
        self._fx = self._values.fx
        self._neighbours = Neighbours(self._values, self._plan, device, dtype)
        self._sizes: dict[str, Any] = {}
        self._buffers: dict[Node, Node] = {}  # by placeholder
        self._slots: list[Slot] = []
        self._cache_reports: list[dict[str, Any]] = []
        self._fused_norms = 0

    def run(self) -> BuiltModule:
        """Builds the module."""
        plan = self._plan
        plan.make_site_modules(self._make_site_module)
        needed = plan.needed()
        self._make_inputs()
        for node in self._graph.fx.nodes:
            if node in plan.cache_of_append and node is plan.cache_of_append[node].appends[0]:
                self._append(plan.cache_of_append[node])
            is_known = node in plan.constants or node in plan.quantizer_of
            if node in needed and node.op == "call_function" and not is_known:
                self._emit(node)
        outputs = list(zip(self._graph.outputs, self._graph.signature.outputs, strict=True))
        logits = next(node for node, port in outputs if port.role == "logits")
        loose = [n for n, port in outputs if port.role == "present" and n not in plan.cache_of_append]
        kept = [self._values.cast(self._values[logits], WIDE), *(self._values[node] for node in loose)]
        self._fx.output(tuple(kept))
        module = fx.GraphModule(self._values.members, self._fx, "LoweredModel")
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        slots, rounded = tuple(self._slots), frozenset(node.name for node in self._values.rounded)
        neighbours = {**asdict(self._neighbours.choice), "launches": dict(self._neighbours.counts)}
        return BuiltModule(
            module, slots, plan.site_reports, self._cache_reports, self._fused_norms, neighbours, rounded
        )

    def _make_site_module(self, weight: Any, bias: Node | None, rounding: Rounding | None) -> SiteModule:
        offset = None if bias is None else self._values.evaluated(bias)
        return make_site_module(weight, offset, rounding, device=self._device, dtype=self._dtype)

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _make_inputs(self) -> None:
        ids, start, past = (self._fx.placeholder(name) for name in ("ids", "start", "past"))
        for node, port in self._plan.ports.items():
            if port.role != "past":
                continue
            is_buffer = any(node in cache.past for cache in self._plan.caches)
            dtype: torch.dtype = getattr(torch, port.dtype)
            is_float = is_buffer and dtype == WIDE
            self._slots.append(
                Slot(self._dtype if is_float else dtype, int(port.shape[1]), int(port.shape[3]), is_buffer)
            )
            self._buffers[node] = self._values[node] = self._fx.placeholder(port.name.replace(".", "_"))
            stored = self._slots[-1].dtype
            self._values.made(self._buffers[node], stored if stored.is_floating_point else None)
        size = self._fx.call_function
        self._sizes = {PAST: past}
        self._sizes |= {name: size(_aten.sym_size.int, (ids, i)) for i, name in enumerate((BATCH, SEQUENCE))}
        self._sizes[TOTAL] = size(operator.add, (past, self._sizes[SEQUENCE]))
        self._length = size(_aten.add.Tensor, (start, self._sizes[SEQUENCE]))
        self._start = start
        device = {"device": self._device}
        for node, port in self._plan.ports.items():
            if port.role == "ids":
                self._values[node] = ids
            elif port.role == "mask":
                shape = [self._sizes[BATCH], self._sizes[TOTAL]]
                self._values[node] = size(_aten.ones.default, (shape,), {"dtype": torch.int64, **device})
            elif port.role == "positions":
                row = size(_aten.arange.default, (self._sizes[SEQUENCE],), {"dtype": torch.int64, **device})
                shape = [self._sizes[BATCH], self._sizes[SEQUENCE]]
                self._values[node] = size(_aten.expand.default, (size(_aten.add.Tensor, (row, start)), shape))
            elif port.role == "other":
                self._values[node] = size(_aten.zeros_like.default, (ids,))

    # --- one node after another ---------------------------------------------------------------------------------------

    def _emit(self, node: Node) -> None:
        """Puts what a node becomes into the new graph."""
        if (symbol := self._plan.size_symbol(node)) is not None:
            self._values[node] = self._sizes.get(symbol, symbol)
        elif node in self._plan.cache_of_append:
            self._values[node] = self._present(node)
        elif node in self._plan.rounding_at:
            self._emit_rounding(self._plan.rounding_at[node])
        elif is_op(node, _canonical.linear.default):
            self._values[node] = self._linear(node)
        elif is_op(node, _canonical.hadamard.default):
            self._values[node] = self._hadamard(node)
        elif (caches := self._plan.fused_caches(node)) is not None:
            self._values[node] = self._attention(node, *caches)
        elif (made := self._neighbours.emit(node)) is not None:
            self._values[node] = made
        else:
            self._values[node] = self._call(node)
        value = self._values[node]
        if isinstance(value, Node) and self._values.dtype_of(value) == self._dtype and not is_moving(node.target):
            self._values.rounded.add(node)

    def _linear(self, node: Node) -> Node:
        x, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
        layer = self._plan.site_modules[node].module
        if layer is None:
            bias = [self._values.stored(n, self._dtype) for n in node.args[2:3] if isinstance(n, Node)]
            given = (self._values.narrow(x), self._values.narrow(weight), *bias)
            return self._values.made(self._fx.call_function(_canonical.linear.default, given), self._dtype)
        name = self._values.member(weight.name, layer)
        if node in self._plan.codes_taken:
            rounding = self._plan.codes_taken[node]
            parts = [self._values[rounding.codes], self._values[rounding.scale]]
            if rounding.zero_point is not None:
                parts.append(self._values[rounding.zero_point])
            return self._values.made(self._fx.call_module(name, tuple(parts)), self._dtype)
        given = (self._values.narrow(x),)
        return self._values.made(self._fx.call_module(name, given), self._dtype)

    def _hadamard(self, node: Node) -> Node:
        name = self._values.member(f"hadamard_{node.args[1]}", Hadamard(cast(int, node.args[1]), self._device))
        given = (self._values.in_dtype(cast(Node, node.args[0]), WIDE),)
        return self._values.made(self._fx.call_module(name, given), WIDE)

    def _emit_rounding(self, rounding: Rounding) -> None:
        """One operator for all that read the codes; what it gives besides is found under the graph's own nodes."""
        spec, norm = rounding.spec, rounding.norm
        before = "" if norm is None else "rms_norm_"
        source = cast(Node, rounding.value if norm is None else norm.args[0])
        x: list[Any] = [self._values[source]]
        if norm is not None:
            x += [self._values.stored(cast(Node, norm.args[1]), WIDE), norm.args[2]]
            self._fused_norms += 1
            self._values.rounded.add(norm)
        per_token = spec.granularity == "per_token"
        zero = rounding.zero_point
        if not per_token:
            scale = self._values[rounding.scale]
            given = (*x, scale, spec.code_dtype, None if zero is None else self._values[zero], spec.bits)
            target = getattr(_kernels, f"{before}quantize_static").default
            self._values[rounding.codes] = self._values.made(self._fx.call_function(target, given), None)
            return
        if zero is None:
            target = getattr(_kernels, f"{before}quantize_rows").default
            made = self._fx.call_function(target, (*x, spec.code_dtype, spec.clip, spec.bits))
        else:
            made = self._fx.call_function(_kernels.quantize_rows_affine.default, (*x, spec.clip, spec.bits))
        self._values.made(made, None)
        for index, place in enumerate((rounding.codes, rounding.scale, zero)):
            if place is not None:
                part = self._fx.call_function(operator.getitem, (made, index))
                self._values[place] = self._values.made(part, WIDE if index == 1 else None)

    # --- caches, and attention over them ------------------------------------------------------------------------------

    def _append(self, cache: AppendedCache) -> None:
        buffers = [self._buffers[node] for node in cache.past]
        value = self._values[cache.value]
        if cache.spec is None and self._values.dtype_of(value) != self._dtype:
            self._values.rounded.add(cache.value)
        if cache.spec is None or cache.spec.scales == "static":
            scales = [None if n is None else self._values[n] for n in (cache.scale, cache.zero_point)]
            name = dtype_name(self._dtype) if cache.spec is None else cache.spec.dtype
            given = (value, buffers[0], *scales, self._start, name)
            self._fx.call_function(_kernels.append_static.default, given)
            return
        spec = cache.spec
        scale, zero = buffers[1], buffers[2] if len(buffers) > 2 else None
        options = (spec.dtype, spec.block(cache.width), spec.symmetric)
        given = (value, buffers[0], scale, zero, self._start, *options)
        self._fx.call_function(_kernels.append_quantized.default, given)

    def _present(self, append: Node) -> Node:
        """All of a cache that is in use, for what does not read buffers."""
        buffer = self._buffers[cast(Node, append.args[0])]
        used = self._fx.call_function(_aten.narrow.default, (buffer, 2, 0, self._sizes[TOTAL]))
        return self._values.made(used, self._values.dtype_of(buffer))

    def _attention(self, node: Node, keys: AppendedCache, values: AppendedCache) -> Node:
        scale, _, *rest = node.args[4:]
        window, softcap = (*rest, None, None)[:2]
        layer = CachedAttention(
            keys.spec,
            values.spec,
            (keys.width, values.width),
            scale=cast(float, scale),
            window=cast(int | None, window),
            softcap=cast(float | None, softcap),
            device=self._device,
            dtype=self._dtype,
        )
        q = self._values.narrow(cast(Node, node.args[0]))
        given_caches = [part for cache in (keys, values) for part in self._cache_arguments(cache)]
        self._report_caches(keys, values, layer.choice)
        given = (q, self._length, self._sizes[TOTAL], *given_caches)
        return self._values.made(self._fx.call_module(self._values.member(node.name, layer), given), self._dtype)

    def _cache_arguments(self, cache: AppendedCache) -> list[Any]:
        """Codes or values, scale and zero point, as `CachedAttention` takes them."""
        buffers: list[Any] = [self._buffers[node] for node in cache.past]
        if cache.spec is not None and cache.spec.scales == "static":
            buffers += [None if n is None else self._values[n] for n in (cache.scale, cache.zero_point)]
        return [*buffers, None, None][:3]

    def _report_caches(self, keys: AppendedCache, values: AppendedCache, choice: Choice) -> None:
        appends = [cache_append.choose(c.spec, c.width, Device.of(self._device)) for c in (keys, values)]
        self._cache_reports.append(
            {
                "layer": keys.port.layer,
                "keys": _format(keys.spec, self._dtype),
                "values": _format(values.spec, self._dtype),
                "append": " and ".join(dict.fromkeys(choice.implementation for choice in appends)),
                "attention": choice.implementation,
                "reason": "; ".join(dict.fromkeys(c.reason for c in (*appends, choice) if c.reason)),
            }
        )

    # --- calls that stay what they are --------------------------------------------------------------------------------

    def _call(self, node: Node) -> Node:
        kind = precision_of(node.target)
        given = self._given(node)
        floats = [dtype for n in given if (dtype := self._values.dtype_behind(n)) is not None]
        is_narrow = kind == "narrow" or (
            kind in ("follow", "mixed") and self._dtype in floats[: 1 if kind == "mixed" else None]
        )
        target_dtype = self._dtype if is_narrow and kind != "mixed" else WIDE
        first = given[0] if given else None

        def place(argument: Node) -> Any:
            if kind == "mixed" and argument is first:
                return self._values[argument]
            return self._values.in_dtype(argument, target_dtype)

        args, kwargs = fx.node.map_arg((self._arguments(node), node.kwargs), place)
        if makes_a_tensor(node):
            kwargs = {**kwargs, "device": self._device}
        made = self._fx.call_function(cast(Callable[..., Any], node.target), args, kwargs)
        result: torch.dtype | None = self._dtype if is_narrow else WIDE
        if node.target is _canonical.rotary.default:
            result = WIDE  # the product with wide cosines
        described = node.meta.get("dtype")
        if described is not None and (not described.is_floating_point or described.itemsize == 1):
            result = None
        if not _gives_tensors(node):
            result = None
        if node.target is operator.getitem and result is not None and described is None:
            result = self._values.dtype_of(self._values[given[0]])
        return self._values.made(made, result)

    def _given(self, node: Node) -> list[Node]:
        found: list[Node] = []
        fx.node.map_arg((self._arguments(node), node.kwargs), found.append)
        return found

    def _arguments(self, node: Node) -> tuple[Any, ...]:
        """A node's arguments, without a mask that hides nothing."""
        return (*node.args[:3], None, *node.args[4:]) if node in self._plan.unmasked else node.args


def _gives_tensors(node: Node) -> bool:
    """Whether a call is no arithmetic on sizes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return any("Tensor" in str(item.type) for item in node.target._schema.returns)


def _format(spec: CacheFormat | None, dtype: torch.dtype) -> str:
    return dtype_name(dtype) if spec is None else str(spec)
