"""What of a graph goes into a checkpoint: its quantized layers, and its float tensors under the model's own names."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler.errors import TargetError
from qcompiler.frontend import build_on_meta
from qcompiler.ir import Graph, Site, is_op, quantized_value, stored_names
from qcompiler.numerics import QuantSpec, pack_bits
from qcompiler.storage import WeightStore

__all__ = ["Contents", "Layer", "pack_words"]

_ONLINE = (torch.ops.qcompiler.hadamard.default,)


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer.

    Attributes:
        name: the module's path.
        rows, columns: of its weight ``[out, in]``.
        weight: the format of the weight.
        activation: the format of the input; None where it stays float.
        stored: the name its parts have in the graph's store, ahead of ``_codes``, ``_scale``, ``_zero_point`` and
            ``_factor``.
        input_scale, input_zero_point: stored tensors, 0-D, of a static activation; in NVFP4 the first is the factor.
    """

    name: str
    rows: int
    columns: int
    weight: QuantSpec
    activation: QuantSpec | None
    stored: str
    input_scale: str | None = None
    input_zero_point: str | None = None


class Contents:
    """What is written: tensors by name, each computed when it is written, so that one at a time is in memory.

    Args:
        graph: a compiled one that came from a Hugging Face directory.

    Attributes:
        store: the tensors of the checkpoint.
        layers: its quantized layers; a layout adds their tensors.
        ignored: the paths of linear layers that stay float.
        ties: whether the output head is the embedding.

    Raises:
        TargetError: for a graph that is no checkpoint with other numbers: one that computes something besides.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.store = WeightStore()
        config = graph.provenance.get("config")
        companions = graph.provenance.get("companions")
        if not isinstance(config, dict) or not companions:
            raise TargetError(
                "a checkpoint is made of a model from a Hugging Face directory",
                where="checkpoint",
                got="a graph without config.json",
                remedy="capture the model's directory, or lower to another target",
            )
        for node in graph.fx.nodes:
            if is_op(node, *_ONLINE):
                raise TargetError(
                    "the graph rotates values at run time, which no engine does for a checkpoint",
                    where=f"checkpoint: {node.name}",
                    got="hadamard",
                    remedy="use Rotate() without online rotations, or another recipe",
                )
        model, _ = build_on_meta(Path(str(companions)), config, trust_remote_code=False)
        self.layers = [_layer(graph, site) for site in graph.sites() if _is_quantized(site)]
        quantized = {layer.name for layer in self.layers}
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        unknown = quantized.difference(linear)
        if unknown:
            raise TargetError(
                "a quantized layer is no linear layer of the model as transformers builds it",
                where=f"checkpoint: {min(unknown)}",
                expected="layers that checkpoints hold one by one: experts stored together are not written yet",
                remedy="leave these layers in float with an override, or use another target",
            )
        self.ignored = [name for name in linear if name not in quantized]
        self._add_floats(model, quantized)
        self.ties = self._is_tied(model)

    def add(
        self,
        layer: Layer,
        name: str,
        parts: Sequence[str],
        function: Callable[..., Tensor],
        dtype: str,
        shape: Sequence[int],
    ) -> None:
        """A tensor of a layer, computed from its parts in the graph's store.

        Args:
            layer: whose it is.
            name: behind the layer's path and a dot.
            parts: such as ``codes`` and ``scale``; or whole names of the graph's store.
            function: of these as they are read (codes one per element, int8 or uint8).
            dtype, shape: of the result.
        """
        stored = [part if part in self._graph.weights else f"{layer.stored}_{part}" for part in parts]
        self.store.derive(
            f"{layer.name}.{name}", tuple(stored), function, dtype=dtype, shape=shape, store=self._graph.weights
        )

    def dtype(self, layer: Layer, part: str) -> str:
        """The dtype a part of a layer is stored in."""
        return self._graph.weights.info(f"{layer.stored}_{part}").dtype

    def _add_floats(self, model: nn.Module, quantized: set[str]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        saved, used = set(model.state_dict()), set(self._graph.weight_names())
        parts = {name for site in self._graph.sites() for name in _stored_by(site)}
        added = sorted(name for name in used - saved - parts if name not in dict(model.named_buffers()))
        if added:
            raise TargetError(
                "the graph has a tensor that the model has no place for",
                where=f"checkpoint: {added[0]}",
                got=", ".join(added[:4]),
                remedy="leave out the pass that added it, or use another target",
            )
        for name in sorted(saved):
            if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
                continue
            known = name if name in self._graph.weights else self._tied_name(name, parameters)
            if known is not None:
                self.store.alias(name, known, self._graph.weights)

    def _tied_name(self, name: str, parameters: dict[str, nn.Parameter]) -> str | None:
        """Another name that a parameter of the model has."""
        same = (other for other, value in parameters.items() if value is parameters.get(name))
        return next((other for other in same if other in self._graph.weights), None)

    def _is_tied(self, model: Any) -> bool:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or table is None:
            return False
        names = {id(module): path for path, module in model.named_modules()}
        first, second = f"{names[id(head)]}.weight", f"{names[id(table)]}.weight"
        return first in self.store and second in self.store and first in (*self.store.tied(second), second)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes as a dense stream of bits in 32-bit words, along the last axis; the first in the lowest bits.

    Args:
        codes: uint8 ``[..., width]``.
        bits: 2 to 8.

    Returns:
        int32 ``[..., ceil(width * bits / 32)]``.
    """
    packed = pack_bits(codes, bits)
    width = math.ceil(codes.shape[-1] * bits / 32) * 4
    return nn.functional.pad(packed, (0, width - packed.shape[-1])).contiguous().view(torch.int32)


def _is_quantized(site: Site) -> bool:
    weight = site.nodes[0].args[1]
    return isinstance(weight, fx.Node) and weight.op != "get_attr"


def _stored_by(site: Site) -> Iterator[str]:
    """What of the store only a layer's quantization reads."""
    if _is_quantized(site):
        weight = site.nodes[0].args[1]
        assert isinstance(weight, fx.Node)
        yield from stored_names(weight)
    for node in site.nodes:
        if quantized_value(node.args[0]) is not None:
            yield from _input_names(node.args[0])


def _input_names(rounded: Any) -> list[str]:
    """Scale and zero point (or factor) of an activation, where they are stored."""
    codes = rounded.args[0]
    parts = [part for node in (rounded, codes) for part in node.all_input_nodes if part.op == "get_attr"]
    scales = [part for node in codes.all_input_nodes for part in node.all_input_nodes if part.op == "get_attr"]
    return list(dict.fromkeys(str(part.target) for part in (*parts, *scales)))


def _layer(graph: Graph, site: Site) -> Layer:
    scheme = graph.schemes[site.name]
    assert scheme.weight is not None
    weight = site.nodes[0].args[1]
    assert isinstance(weight, fx.Node)
    stored = stored_names(weight)[0].removesuffix("_codes")
    rounded = site.nodes[0].args[0]
    names = _input_names(rounded) if quantized_value(rounded) is not None else []
    activation = scheme.activation if quantized_value(rounded) is not None else None
    scale = next((name for name in names if not name.endswith("_zero_point")), None)
    zero = next((name for name in names if name.endswith("_zero_point")), None)
    return Layer(site.name, site.out_features, site.in_features, scheme.weight, activation, stored, scale, zero)
