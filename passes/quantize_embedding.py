"""`QuantizeEmbedding`: the table that token ids choose rows of is kept as codes."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import RecipeError, UnsupportedModelError
from qcompiler.ir import Affine, Graph, Site, Table, float_tables, quantize_table
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import CANONICAL, Effect, Pass, PassContext, PassResult, SiteReport

__all__ = ["QuantizeEmbedding"]

_ROWS = 4096  # at a time
_GROUP = 32


@dataclass(frozen=True)
class QuantizeEmbedding(Pass):
    """Rounds every row of an embedding table to the nearest codes.

    ``embedding(table, ids)`` becomes ``dequantize(embedding(codes, ids), embedding(scale, ids))``. An output head that
    is the same matrix, and that no scheme says anything else of, takes the same codes: else the matrix would be needed
    in float beside them.

    Left alone: tables that something else than the token ids chooses rows of, such as those of positions.

    Error: half a step of the codes, for each element; SQNR is in the report. Targets that have no form for a quantized
    table get a float one of the same numbers.

    Attributes:
        bits: 8 or 4.
        group_size: channels of a row that share a scale; -1: all; None: all at 8 bits, 32 at 4.
        symmetric: no zero point.
        search: of scales: ``minmax``, which cover the range, or ``mse``, of least squared error.

    Raises:
        RecipeError: for other bits or groups.
    """

    bits: Literal[8, 4] = 8
    group_size: int | None = None
    symmetric: bool = True
    search: Literal["minmax", "mse"] = "minmax"

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise RecipeError("group_size out of range", got=self.group_size, expected="-1, or a positive number")

    @property
    def _spec(self) -> QuantSpec:
        group = self.group_size if self.group_size is not None else -1 if self.bits == 8 else _GROUP
        if group == -1:
            return QuantSpec(f"int{self.bits}", "per_channel", None, self.symmetric)
        return QuantSpec(f"int{self.bits}", "per_group", group, self.symmetric)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantizes the tables of a graph, some rows at a time.

        Raises:
            UnsupportedModelError: if there is none in float.
            RecipeError: if groups do not divide a row.
        """
        tables = float_tables(graph)
        if not tables:
            raise UnsupportedModelError(
                "this model has no embedding table to quantize",
                got="no stored float matrix that token ids choose rows of",
                remedy="leave QuantizeEmbedding out of the recipe",
            )
        return PassResult(modified=True, sites=tuple(one for table in tables for one in self._quantize(graph, table)))

    def _quantize(self, graph: Graph, table: Table) -> list[SiteReport]:
        start, spec = time.perf_counter(), self._spec
        if table.columns % spec.group_of(table.columns):
            raise RecipeError(
                "groups of an embedding table have to divide its rows",
                where=table.name,
                got=f"groups of {spec.group_size}, {table.columns} channels",
                remedy="choose a divisor, or -1 for one scale per row",
            )
        heads = [site for site in graph.sites() if _is_tied(graph, site, table)]
        parts, error = self._rounded(graph, table, spec)
        for part, tensor in parts.items():
            dtype = None if part == "scale" else spec.stored_dtype
            graph.weights.set(f"{table.weight}_{part}", tensor, dtype=dtype)
        for head in heads:
            _share(graph, table, head, spec, parts)
        quantize_table(graph, table, spec)
        seconds = time.perf_counter() - start
        details: dict[str, Any] = {"rows": table.rows, "columns": table.columns}
        reports = [SiteReport(table.name, self.name, f"embedding {spec}", error, seconds=seconds, details=details)]
        return reports + [
            SiteReport(head.name, self.name, f"{spec}, the codes of {table.name}", error) for head in heads
        ]

    def _rounded(self, graph: Graph, table: Table, spec: QuantSpec) -> tuple[dict[str, Tensor], float]:
        """Codes, scales and zero points; and the signal to noise ratio in dB."""
        weight = graph.weights.read(table.weight)
        scale_dtype = getattr(torch, graph.source_dtype(table.weight))
        choose = numerics.mse_qparams if self.search == "mse" else numerics.min_max_qparams
        found: dict[str, list[Tensor]] = {"codes": [], "scale": [], "zero_point": []}
        for piece in weight.split(_ROWS):
            part = Affine.of(piece.float(), *choose(piece.float(), spec, scale_dtype), spec, scale_dtype)
            found["codes"].append(part.codes)
            found["scale"].append(part.scale.to(scale_dtype))
            if part.zero_point is not None:
                found["zero_point"].append(part.zero_point)
        parts = {name: torch.cat(pieces) for name, pieces in found.items() if pieces}
        zero = parts.get("zero_point")
        rounded = numerics.dequantize(parts["codes"], parts["scale"].float(), zero, spec)
        return parts, numerics.sqnr_db(weight.float(), rounded)


def _is_tied(graph: Graph, site: Site, table: Table) -> bool:
    """Whether a layer in float multiplies with a table, under another name."""
    is_float = graph.schemes.get(site.name, Scheme()) == Scheme() and site.weight in graph.weight_names()
    return is_float and site.weight in graph.weights.tied(table.weight)


def _share(graph: Graph, table: Table, head: Site, spec: QuantSpec, parts: dict[str, Tensor]) -> None:
    """Gives a layer the codes of a table."""
    for part in parts:
        graph.weights.alias(f"{head.weight}_{part}", f"{table.weight}_{part}")
        if part != "codes" and spec.granularity == "per_channel":
            name = f"{head.weight}_{part}"
            dtype = graph.weights.info(name).dtype
            graph.weights.derive(name, (name,), torch.Tensor.flatten, dtype=dtype, shape=(table.rows,))
    graph.set_stored_weight(head, spec)
    graph.schemes[head.name] = Scheme(spec)
