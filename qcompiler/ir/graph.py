"""`Graph`: an fx graph whose weights stay in a `WeightStore`, with typed views of it and its JSON form."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

import qcompiler.ir.ops  # noqa: F401  (defines torch.ops.qcompiler)  # noqa: F401  (defines torch.ops.qcompiler)
from qcompiler.errors import ArtifactError, PipelineError
from qcompiler.ir.graph_json import decode_nodes, encode_nodes
from qcompiler.ir.qtensor import QuantizedTensor
from qcompiler.ir.quantized_nodes import place_weight, round_input
from qcompiler.ir.signature import Signature
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.storage import WeightStore

__all__ = [
    "Graph",
    "Site",
    "activation_rounding",
    "is_op",
    "is_quantized_weight",
    "quantized_value",
    "site_name",
    "stored_names",
]

_aten = torch.ops.aten
_canonical = torch.ops.qcompiler
_QUANTIZED_BY: dict[Any, Any] = {
    _canonical.dequantize.default: _canonical.quantize.default,
    _canonical.fp4_dequantize.default: _canonical.fp4_quantize.default,
}
_WITH_QPARAMS = (
    _canonical.quantize.default,
    _canonical.dequantize.default,
    _canonical.choose_qparams.default,
    _canonical.fp4_scale.default,
    _canonical.fp4_quantize.default,
    _canonical.fp4_dequantize.default,
    _canonical.codebook_dequantize.default,
    _canonical.sparse_add.default,
)
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def is_op(node: object, *targets: object) -> bool:
    """Whether ``node`` is a call of one of ``targets`` (operator overloads or functions)."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def quantized_value(node: object) -> Node | None:
    """What a quantized activation was before: ``x`` of ``dequantize(quantize(x, ...), ...)``; None for other nodes."""
    if not isinstance(node, Node) or not is_op(node, *_QUANTIZED_BY):
        return None
    codes = node.args[0]
    if not isinstance(codes, Node) or not is_op(codes, _QUANTIZED_BY[node.target]):
        return None
    value = codes.args[0]
    assert isinstance(value, Node)
    return value


def activation_rounding(nodes: Iterable[Node]) -> set[Node]:
    """Of some nodes, the pairs of ``quantize`` and ``dequantize`` that round activations."""
    found: set[Node] = set()
    for node in nodes:
        if quantized_value(node) is not None:
            found |= {node, node.all_input_nodes[0]}
    return found


def is_quantized_weight(node: object) -> bool:
    """Whether a linear layer's weight is computed from codes, in one of the forms `Graph.set_weight` makes."""
    return is_op(
        node,
        _canonical.dequantize.default,
        _canonical.fp4_dequantize.default,
        _canonical.codebook_dequantize.default,
        _canonical.sparse_add.default,
    )


def stored_names(weight: Node) -> list[str]:
    """The stored tensors that a linear layer's weight is computed from, codes first."""
    if weight.op == "get_attr":
        return [str(weight.target)]
    return [name for source in weight.all_input_nodes for name in stored_names(source)]


def site_name(weight_name: str) -> str:
    """The site a weight belongs to: its name without a trailing ``.weight``."""
    return weight_name.removesuffix(".weight")


@dataclass(frozen=True)
class Site:
    """One linear layer: the place where a weight meets an activation.

    Attributes:
        name: the parameter path of the source model without ``.weight``; it survives every rewrite.
        weight: the name of the float weight, ``[out, in]``.
        nodes: the ``linear`` nodes that use it (several where a module is called more than once).
        out_features, in_features: the shape of the weight.
    """

    name: str
    weight: str
    nodes: tuple[Node, ...]
    out_features: int
    in_features: int

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The distinct activations it reads."""
        return tuple(dict.fromkeys(node.args[0] for node in self.nodes))  # type: ignore[misc]

    @property
    def bias(self) -> str | None:
        """The name of the bias tensor, if there is one."""
        arguments = self.nodes[0].args
        bias = arguments[2] if len(arguments) > 2 else None
        return str(bias.target) if isinstance(bias, Node) else None


@dataclass(eq=False, repr=False)
class Graph:
    """A model as a graph.

    Attributes:
        fx: placeholders in the order of ``signature.inputs``; ``get_attr`` nodes whose target names a tensor of
            ``weights``; calls of canonical operators (`qcompiler.ir.ops`), ATen operators and ``operator`` functions on
            symbolic sizes; one output, a tuple in the order of ``signature.outputs``. A node that yields a tensor has
            ``meta["dtype"]`` and ``meta["shape"]`` (sizes as in `Port`).
        signature: the ports.
        weights: tensors by name.
        schemes: what is quantized at each site; set by one pass, read by all.
        provenance: where the model came from: ``source``, ``config``, ``fingerprint``, ``parameters`` (elements).
        unrecognized: what canonicalization left as it was, each with its reason.
        notes: sentences on how the model was read, for the report.
        lost: what the source has and the graph has not, a sentence each: for the report, and errors where strict.
        source_dtypes: the dtype that float tensors had in the source, of those that were rewritten (`rewrite_float`)
            and, while the graph is compiled, of all.
        fisher: the diagonal of the Fisher information of weights, float32 ``[out, in]`` by site; empty unless a pass
            measured it (`qcompiler.sweep.fisher`), and not part of what is saved.
    """

    fx: FxGraph
    signature: Signature
    weights: WeightStore
    schemes: dict[str, Scheme] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    unrecognized: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    source_dtypes: dict[str, str] = field(default_factory=dict)
    fisher: WeightStore = field(default_factory=WeightStore)

    def __repr__(self) -> str:
        sites, nodes = len(self.sites()), len(self.fx.nodes)
        return f"<Graph of {self.provenance.get('source', 'a model')}: {sites} linear layers, {nodes} nodes>"

    @property
    def inputs(self) -> list[Node]:
        """The placeholder nodes, in the order of ``signature.inputs``."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Node]:
        """The nodes returned, in the order of ``signature.outputs``."""
        return list(self.fx.output_node().args[0])  # type: ignore[arg-type]

    def sites(self) -> list[Site]:
        """Every linear layer, in execution order."""
        nodes: dict[str, list[Node]] = {}
        for node in self.fx.nodes:
            if is_op(node, _canonical.linear.default):
                name = self._weight_name(node)
                if name is not None:
                    nodes.setdefault(name, []).append(node)
        found = []
        for name, users in nodes.items():
            rows, columns = users[0].meta["weight_shape"]
            found.append(Site(site_name(name), name, tuple(users), rows, columns))
        return found

    @staticmethod
    def _weight_name(linear: Node) -> str | None:
        weight = linear.args[1]
        assert isinstance(weight, Node)
        if weight.op == "get_attr":
            return str(weight.target)
        return stored_names(weight)[0].removesuffix("_codes") if is_quantized_weight(weight) else None

    def weight_names(self) -> list[str]:
        """The tensors the graph reads, in execution order, each once."""
        return list(dict.fromkeys(str(node.target) for node in self.fx.nodes if node.op == "get_attr"))

    def rewrite_float(self, name: str, value: Tensor) -> None:
        """Replaces a float tensor by another of its shape, kept in float32 until the model is written.

        Args:
            name: of the tensor.
            value: float, the shape it has.

        Raises:
            PipelineError: if the shape is another one.
        """
        info = self.weights.info(name)
        if tuple(value.shape) != info.shape:
            raise PipelineError("a weight of the wrong shape", where=name, got=tuple(value.shape), expected=info.shape)
        self.source_dtypes.setdefault(name, info.dtype)
        self.weights.set(name, value.float())

    def derive_float(self, name: str, function: Callable[..., Tensor], sources: tuple[str, ...] | None = None) -> None:
        """As `rewrite_float`, but computed at every read: nothing is held in memory.

        Args:
            name: of the tensor.
            function: of the sources as they are now, in their dtypes; gives float32 of the shape the tensor has.
            sources: names of its arguments; the tensor itself by default.
        """
        info = self.weights.info(name)
        self.source_dtypes.setdefault(name, info.dtype)
        self.weights.derive(name, sources or (name,), function, dtype="float32", shape=info.shape)

    def source_dtype(self, name: str) -> str:
        """The dtype a float tensor has in the source model, whatever it was rewritten to."""
        return self.source_dtypes.get(name, self.weights.info(name).dtype)

    def remember_dtypes(self) -> str:
        """Keeps in mind which dtype each float tensor has, for `source_dtype` and `round_rewritten`.

        Returns:
            The dtype that most of the model's numbers have.
        """
        sizes: Counter[str] = Counter()
        for name in self.weight_names():
            info = self.weights.info(name)
            if info.dtype in _FLOATS:
                self.source_dtypes.setdefault(name, info.dtype)
                sizes[info.dtype] += math.prod(info.shape)
        return max(sizes, key=lambda dtype: sizes[dtype], default="float32")

    def round_rewritten(self, usual: str = "float32") -> None:
        """Rounds float32 matrices to the dtype of the source, when nothing more will be computed from them.

        Vectors (norms, biases) stay in float32: they take no room, and the columns that make good their scale do not
        make good its rounding. So do scales and tables, whose dtype a pass chooses.

        Args:
            usual: the dtype of those that the source has not, which a pass has added.
        """
        quantizers = (node for node in self.fx.nodes if is_op(node, *_WITH_QPARAMS))
        chosen = {str(part.target) for node in quantizers for part in node.all_input_nodes if part.op == "get_attr"}
        for name in self.weight_names():
            info = self.weights.info(name)
            dtype = self.source_dtypes.get(name, info.dtype if name in chosen else usual)
            if info.dtype == "float32" and dtype != info.dtype and len(info.shape) > 1:
                target = getattr(torch, dtype)
                self.weights.derive(name, (name,), lambda t, d=target: t.to(d), dtype=dtype, shape=info.shape)
        self.source_dtypes.clear()

    def quantize_input(
        self, value: Node, readers: Sequence[Node], spec: QuantSpec, scale: str | None, zero_point: str | None
    ) -> Node:
        """Puts ``dequantize(quantize(value))`` between a value and linear layers that read it.

        Args:
            value: an activation.
            readers: ``linear`` nodes, in graph order; the new nodes stand ahead of the first.
            spec: the number format.
            scale, zero_point: stored tensors, 0-D; None where the format is dynamic (the range is then computed from
                the value) or has no zero point. In NVFP4 ``scale`` is the factor of the tensor.

        Returns:
            The ``dequantize`` node.

        Raises:
            PipelineError: if a reader reads a quantized activation already.
        """
        for node in readers:
            if quantized_value(node.args[0]) is not None:
                raise PipelineError(
                    "this activation is quantized already",
                    where=node.name,
                    expected="one pass that quantizes activations",
                    remedy="drop one of the passes",
                )
        return round_input(self, value, readers, spec, scale, zero_point)

    def set_weight(self, site: Site, quantized: QuantizedTensor) -> None:
        """Replaces a site's float weight by what it is computed from: a ``dequantize`` or ``fp4_dequantize`` node with
        codes and scales, or a ``codebook_dequantize`` with codes and tables and, around it, a ``sparse_add``.

        The float weight leaves the graph; where it was tied to another use, that use keeps it.

        Raises:
            PipelineError: if the site is quantized already, or the shapes disagree.
        """
        if any(not _is_get_attr(node.args[1]) for node in site.nodes):
            raise PipelineError(
                "this weight is quantized already",
                where=site.name,
                expected="one weight quantizer per site",
                remedy="drop one of the passes, or keep them apart with schemes",
            )
        expected = (site.out_features, site.in_features)
        if tuple(quantized.codes.shape) != expected:
            raise PipelineError(
                "codes of the wrong shape", where=site.name, got=tuple(quantized.codes.shape), expected=expected
            )
        with self.fx.inserting_before(site.nodes[0]):
            weight_node = place_weight(self, site, quantized)
        for node in site.nodes:
            old = node.args[1]
            node.update_arg(1, weight_node)
            assert isinstance(old, Node)
            if not old.users:
                self.fx.erase_node(old)
        if not any(node.target == site.weight for node in self.fx.nodes if node.op == "get_attr"):
            self.weights.remove(site.weight)

    def _get_attr(self, name: str) -> Node:
        info = self.weights.info(name)
        node = self.fx.create_node("get_attr", name)
        dtype = getattr(torch, info.dtype, torch.int8 if info.dtype.startswith("int") else torch.uint8)
        node.meta.update(dtype=dtype, shape=tuple(info.shape))
        return node

    def copy(self) -> "Graph":
        """A graph with nodes, names of tensors and reports of its own; values in memory are shared."""
        return replace(
            self,
            fx=deepcopy(self.fx),
            weights=self.weights.copy(),
            schemes=dict(self.schemes),
            provenance=dict(self.provenance),
            unrecognized=[dict(entry) for entry in self.unrecognized],
            notes=list(self.notes),
            lost=list(self.lost),
            source_dtypes=dict(self.source_dtypes),
            fisher=self.fisher.copy(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The graph as JSON: nodes, signature and schemes (no weights, no code)."""
        return {
            "signature": self.signature.to_dict(),
            "nodes": encode_nodes(self.fx),
            "schemes": {site: scheme.to_dict() for site, scheme in self.schemes.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], weights: WeightStore, provenance: dict[str, Any]) -> "Graph":
        """Rebuilds a graph from `to_dict`.

        Raises:
            ArtifactError: if the fields are damaged, name an operator that a graph may not hold, or a tensor that is
                not among the weights.
        """
        try:
            nodes, signature = decode_nodes(fields["nodes"]), Signature.from_dict(fields["signature"])
            schemes = {site: Scheme.from_dict(scheme) for site, scheme in fields["schemes"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError("damaged graph file", got=f"{type(error).__name__}: {error}") from error
        graph = cls(nodes, signature, weights, schemes, provenance)
        ports = (len(signature.inputs), len(signature.outputs))
        if (len(graph.inputs), len(graph.outputs)) != ports:
            raise ArtifactError(
                "the graph's inputs and outputs are not those of its signature",
                got=(len(graph.inputs), len(graph.outputs)),
                expected=ports,
            )
        lost = [name for name in graph.weight_names() if name not in weights]
        if lost:
            raise ArtifactError("the graph reads tensors that are not there", got=", ".join(lost[:4]))
        return graph


def _is_get_attr(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"
