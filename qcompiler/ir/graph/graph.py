"""`Graph`: an fx graph whose weights stay in a `WeightStore`. What is done to one lies in the files beside this one."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from qcompiler.ir.execute import Stretch
from qcompiler.ir.graph import floats, graph_json, insertion, quantizing
from qcompiler.ir.graph.sites import Site, find_sites
from qcompiler.ir.qtensor import QuantizedTensor
from qcompiler.ir.signature import Signature
from qcompiler.ir.walks import ancestors
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.storage import WeightStore

__all__ = ["Graph"]


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
        provenance: where the model came from: ``source``, ``config``, ``fingerprint``, ``parameters`` (elements);
            ``shifted``: by name, tensors that are one of the source, ``source``, and a number besides, ``added``;
            ``transposed``: matrices that the source has as ``[in, out]`` under the same name.
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
        return find_sites(self.fx)

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
        floats.rewrite_float(self, name, value)

    def derive_float(self, name: str, function: Callable[..., Tensor], sources: tuple[str, ...] | None = None) -> None:
        """As `rewrite_float`, but computed at every read: nothing is held in memory.

        Args:
            name: of the tensor.
            function: of the sources as they are now, in their dtypes; gives float32 of the shape the tensor has.
            sources: names of its arguments; the tensor itself by default.
        """
        floats.derive_float(self, name, function, sources)

    def source_dtype(self, name: str) -> str:
        """The dtype a float tensor has in the source model, whatever it was rewritten to."""
        return self.source_dtypes.get(name, self.weights.info(name).dtype)

    def remember_dtypes(self) -> str:
        """Keeps in mind which dtype each float tensor has, for `source_dtype` and `round_rewritten`.

        Returns:
            The dtype that most of the model's numbers have.
        """
        return floats.remember_dtypes(self)

    def round_rewritten(self, usual: str = "float32") -> None:
        """Rounds float32 matrices to the dtype of the source, when nothing more will be computed from them.

        Vectors (norms, biases) stay in float32: they take no room, and the columns that make good their scale do not
        make good its rounding. So do scales and tables, whose dtype a pass chooses.

        Args:
            usual: the dtype of those that the source has not, which a pass has added.
        """
        floats.round_rewritten(self, usual)

    def insert(
        self,
        operator: Any,
        value: Node,
        readers: Sequence[Node],
        *arguments: Any,
        tensors: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Node:
        """Puts ``operator(value, *tensors, *arguments, **options)`` between a value and some of what reads it.

        The new node stands ahead of the first reader; its dtype and shape are those that the operator gives, sizes that
        vary being symbols. Nothing is changed where something is refused. In a sweep, value and readers belong to the
        segment at hand.

        Args:
            operator: one overload of a canonical operator (`qcompiler.ir.ops`) or an ATen operator that computes one
                tensor: what a graph file may hold.
            value: a node that the graph computes, or a placeholder.
            readers: nodes that read it, the output among them if need be; each reads the new node wherever it read the
                value. What else reads the value goes on reading it.
            arguments: what follows value and tensors: numbers, dtypes, lists, other nodes.
            tensors: new stored tensors, by name. Float ones are computed with in float32; matrices are rounded to the
                model's dtype when it is written.
            options: further arguments by name.

        Returns:
            The new node. Where it is a ``linear`` layer, it is a site; one that comes behind the assignment of schemes
            stays in float.

        Raises:
            PipelineError: for a value that is stored or of another graph, for a reader that does not read it or stands
                ahead of it, for arguments that the operator does not take, or a result with which a reader would not
                give what it gave.
            ArtifactError: for an operator or argument that cannot be saved.
            WeightError: for a name that is taken, or a tensor that cannot be stored.
        """
        return insertion.insert(self, operator, value, readers, arguments, tensors or {}, options)

    def quantize_input(
        self, value: Node, readers: Sequence[Node], spec: QuantSpec, scale: str | None, zero_point: str | None
    ) -> Node:
        """Puts ``dequantize(quantize(value))`` between a value and linear layers that read it.

        Args:
            value: an activation.
            readers: ``linear`` nodes, in graph order; the new nodes stand ahead of the first.
            spec: the number format.
            scale: a stored tensor, 0-D, the factor of the tensor in NVFP4; None where the format is dynamic: the range
                is then computed from the value.
            zero_point: a stored tensor, 0-D; None where the format is dynamic or has none.

        Returns:
            The ``dequantize`` node.

        Raises:
            PipelineError: if a reader reads a quantized activation already.
        """
        return quantizing.quantize_input(self, value, readers, spec, scale, zero_point)

    def set_weight(self, site: Site, quantized: QuantizedTensor) -> None:
        """Replaces a site's float weight by what it is computed from: a ``dequantize`` or ``fp4_dequantize`` node with
        codes and scales, or a ``codebook_dequantize`` with codes and tables and, around it, a ``sparse_add``.

        The float weight leaves the graph; where it was tied to another use, that use keeps it.

        Raises:
            PipelineError: if the site is quantized already, or the shapes disagree.
        """
        quantizing.set_weight(self, site, quantized)

    def set_stored_weight(self, site: Site, spec: QuantSpec) -> None:
        """As `set_weight`, for parts that are in the store already, or are derived there when they are read.

        Args:
            site: a site with a float weight.
            spec: the number format; no codebook. The store has, in the dtypes and shapes that `set_weight` gives them,
                the weight's name followed by ``_codes``, ``_scale`` and, as the format asks for them, ``_zero_point``
                or ``_factor``.

        Raises:
            PipelineError: if the site is quantized already, or the codes are not those of the format.
            WeightError: if a part is missing.
        """
        quantizing.set_stored_weight(self, site, spec)

    def read_weight(self, site: Site) -> Tensor:
        """The matrix that a site multiplies with, float32 ``[out, in]``: dequantized, where it is quantized."""
        weight = site.nodes[0].args[1]
        assert isinstance(weight, Node)
        behind = ancestors([weight])
        nodes = [node for node in self.fx.nodes if node in behind]
        matrix: Tensor = Stretch(nodes, [weight]).load(self.weights.read, torch.device("cpu"))[weight]
        return matrix

    def stored_node(self, name: str) -> Node:
        """A new node that reads a stored tensor, at the insertion point of `fx`."""
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
        return graph_json.encode_graph(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], weights: WeightStore, provenance: dict[str, Any]) -> "Graph":
        """Rebuilds a graph from `to_dict`.

        Raises:
            ArtifactError: if the fields are damaged, name an operator that a graph may not hold, or a tensor that is
                not among the weights.
        """
        return graph_json.decode_graph(cls, fields, weights, provenance)
