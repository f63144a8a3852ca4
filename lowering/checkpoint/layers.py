"""The linear layers of a graph that a checkpoint holds as codes, and what is refused of them in any layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler.errors import TargetError
from qcompiler.frontend import build_on_meta
from qcompiler.ir import (
    Graph,
    Site,
    is_expert,
    is_op,
    is_quantized_weight,
    quantized_tables,
    quantized_value,
    routers,
    stored_names,
)
from qcompiler.numerics import QuantSpec
from qcompiler.protocol import Support
from qcompiler.storage import SOURCE_ONLY

__all__ = [
    "Layer",
    "build_source",
    "check_layers",
    "check_rows",
    "common_parent",
    "fused_layers",
    "input_tensors",
    "integer_support",
    "planned_layers",
    "refuse_groups",
    "written_layers",
]

_ONLINE = (torch.ops.qcompiler.hadamard.default,)
_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer.

    Attributes:
        name: the module's path.
        rows, columns: of its weight ``[out, in]``.
        weight: the format of the weight.
        activation: the format of the input; None where it stays float.
        stored: the name its parts have in the graph's store, ahead of ``_codes``, ``_scale``, ``_zero_point`` and
            ``_factor``; empty where nothing is quantized yet.
        input_scale, input_zero_point: stored tensors, 0-D, of a static activation; in NVFP4 the first is the factor.
        first_row: where its rows begin in what is stored; None: all of that is its own.
        mixture: the module that holds the experts which it is one of; empty for a layer of no mixture.
        is_table: an embedding, whose rows are chosen instead.
    """

    name: str
    rows: int
    columns: int
    weight: QuantSpec
    activation: QuantSpec | None
    stored: str = ""
    input_scale: str | None = None
    input_zero_point: str | None = None
    first_row: int | None = None
    mixture: str = ""
    is_table: bool = False

    def rows_of(self, part: Tensor) -> Tensor:
        """Its own rows of codes, scales or zero points; a number that scales a whole tensor is everybody's."""
        if self.first_row is None or part.dim() == 0:
            return part
        side = self.weight.group_size or 1 if self.weight.granularity == "per_block" else 1
        height = 1 if part.shape[-1] == self.columns else side  # of a row of scales
        return part[self.first_row // height : -(-(self.first_row + self.rows) // height)]

    @property
    def group(self) -> int | None:
        """Input channels that share a scale; None where all do."""
        size = self.weight.group_of(self.columns)
        return size if self.weight.granularity == "per_group" and size < self.columns else None

    def __str__(self) -> str:
        return f"{self.weight}, activation {self.activation or 'float'}"

    @property
    def groups(self) -> int:
        """Scales per output channel."""
        return 1 if self.group is None else -(-self.columns // self.group)


def planned_layers(graph: Graph) -> list[Layer]:
    """The layers that are to be quantized, as the schemes of a graph say."""
    found = []
    for site in graph.sites():
        scheme = graph.schemes.get(site.name)
        if scheme is not None and scheme.weight is not None:
            found.append(Layer(site.name, site.out_features, site.in_features, scheme.weight, scheme.activation))
    return found


def written_layers(graph: Graph) -> list[Layer]:
    """The layers that are quantized, and embeddings."""
    layers = [_written(graph, site) for site in graph.sites() if is_quantized_weight(site.nodes[0].args[1])]
    return layers + [
        Layer(table.name, table.rows, table.columns, table.spec, None, table.weight, is_table=True)
        for table in quantized_tables(graph)
        if table.spec is not None
    ]


def _written(graph: Graph, site: Site) -> Layer:
    scheme = graph.schemes[site.name]
    weight = site.nodes[0].args[1]
    assert scheme.weight is not None
    assert isinstance(weight, fx.Node)
    stored = stored_names(weight)[0].removesuffix("_codes")
    rounded = site.nodes[0].args[0]
    activation = scheme.activation if quantized_value(rounded) is not None else None
    shape = (site.out_features, site.in_features)
    return Layer(site.name, *shape, scheme.weight, activation, stored, *input_tensors(rounded))


def input_tensors(rounded: Any) -> tuple[str | None, str | None]:
    """The stored scale (in NVFP4 the factor) and zero point of a rounded activation; None for what is not stored."""
    if quantized_value(rounded) is None:
        return None, None
    is_fp4 = is_op(rounded, torch.ops.qcompiler.fp4_dequantize.default)
    parts = (rounded.args[2], None) if is_fp4 else rounded.args[1:3]
    scale, zero = (str(part.target) if isinstance(part, fx.Node) and part.op == "get_attr" else None for part in parts)
    return scale, zero


def build_source(graph: Graph) -> nn.Module:
    """The model that a graph was captured from, on meta.

    Raises:
        TargetError: for a graph that did not come from a Hugging Face directory.
    """
    config, companions = graph.provenance.get("config"), graph.provenance.get("companions")
    if not isinstance(config, dict) or not companions:
        raise TargetError(
            "a checkpoint is made of a model from a Hugging Face directory",
            where="checkpoint",
            got="a graph without config.json",
            remedy="capture the model's directory, or lower to another target",
        )
    plain = {key: value for key, value in config.items() if key not in SOURCE_ONLY}
    model, _ = build_on_meta(Path(str(companions)), plain, trust_remote_code=False)
    return model


def check_layers(graph: Graph, layers: Sequence[Layer], model: nn.Module) -> None:
    """Refuses what no checkpoint holds, or no engine runs, whatever the layout.

    Raises:
        TargetError: for values that are rotated at run time, layers that are no linear layers of the model, and
            different formats of layers that read one value.
    """
    for node in graph.fx.nodes:
        if is_op(node, *_ONLINE):
            raise TargetError(
                "the graph rotates values at run time, which no engine does for a checkpoint",
                where=f"checkpoint: {node.name}",
                got="hadamard",
                remedy="use Rotate() without online rotations, or another recipe",
            )
    experts = {site.name for site in graph.sites() if is_expert(site)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for layer in layers:
        if layer.name not in linear and layer.name not in experts:
            raise TargetError(
                "a layer that is to be quantized is no linear layer of the model as transformers builds it",
                where=f"checkpoint: {layer.name}",
                got=_kind(model, layer.name),
                expected="Linear",
                remedy=f"leave it in float with an override, {layer.name!r}: None, or use another target",
            )
    _check_fused(graph, {layer.name: layer for layer in layers})


def _kind(model: nn.Module, name: str) -> str:
    return next((type(module).__name__ for path, module in model.named_modules() if path == name), "no module")


def fused_layers(graph: Graph) -> list[list[str]]:
    """Linear layers that read one value, such as q, k and v: engines make one of them, whatever they are called.

    What chooses among experts is none of them, nor is a layer with one output channel, which gates what others compute.
    """
    apart = routers(graph) | {site.name for site in graph.sites() if site.out_features == 1}
    readers: dict[fx.Node, list[str]] = {}
    for site in graph.sites():
        for value in site.inputs:
            unrounded = quantized_value(value)
            names = readers.setdefault(value if unrounded is None else unrounded, [])
            if site.name not in apart and site.name not in names:
                names.append(site.name)
    return [names for names in readers.values() if len(names) > 1]


def _check_fused(graph: Graph, layers: Mapping[str, Layer]) -> None:
    for names in fused_layers(graph):
        formats = {name: str(layers.get(name, "float")) for name in names}
        first = names[0]
        other = next((name for name in names if formats[name] != formats[first]), None)
        if other is not None:
            raise TargetError(
                "linear layers that read one value have different formats, and engines make one layer of them",
                where=f"checkpoint: {', '.join(names)}",
                got=f"{first}: {formats[first]}; {other}: {formats[other]}",
                expected="one format for all of them",
                remedy="let the overrides name all of them, or none",
            )


def check_rows(layer: Layer, multiple: int, library: str, unit: str = "words") -> None:
    """Refuses a layer whose output channels do not fill the words (or bytes) that a layout packs them in.

    Raises:
        TargetError: if so.
    """
    if layer.rows % multiple:
        raise TargetError(
            f"the output channels of a layer do not fill whole {unit}, which {library} checkpoints pack them in",
            where=f"checkpoint: {layer.name}",
            got=f"{layer.rows} output channels",
            expected=f"a multiple of {multiple}",
            remedy="leave it in float with an override, or write format=compressed-tensors",
        )


def refuse_groups(group: int | None, width: int) -> Support | None:
    """The refusal of groups that do not divide a width, with the size that would be taken; None where they do."""
    if width % (group or width) == 0:
        return None
    fitting = next((size for size in reversed(_GROUPS) if width % size == 0 and size < (group or width)), None)
    return Support(
        "refused",
        f"groups of {group} do not divide {width} input channels",
        f"choose groups of {fitting}" if fitting else "leave the layer in float with an override",
    )


def integer_support(weight: QuantSpec, width: int) -> Support:
    """What vLLM makes of integer weights whose inputs stay float, in any layout that holds them."""
    group = weight.group_of(width)
    if group not in (*_GROUPS, width):
        return Support("writes-only", f"groups of {group}: vLLM has kernels for 32, 64, 128 and whole channels")
    return Support("fused")


def common_parent(names: Sequence[str]) -> str:
    """The path of the innermost module that is around all of some."""
    parents = [name.split(".")[:-1] for name in names]
    same = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return ".".join(same)
