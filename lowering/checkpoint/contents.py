"""What of a graph goes into a checkpoint: its quantized layers, and its float tensors under the model's own names."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompiler.errors import TargetError
from qcompiler.frontend import SourceNames
from qcompiler.ir import Graph, is_quantized_weight, quantized_caches, quantized_tables, stored_names
from qcompiler.lowering.checkpoint.caches import CacheScale, cache_scales
from qcompiler.lowering.checkpoint.experts import in_source, mixtures, place_in_stack
from qcompiler.lowering.checkpoint.layers import Layer, input_tensors
from qcompiler.numerics import pack_bits
from qcompiler.storage import WeightStore

__all__ = ["Contents", "pack_words", "rounded_to_half"]

_AS_IN_THE_MODEL = SourceNames({}, {})
_LARGEST_ERROR = 2.0**-10  # of a scale; numbers that float16 holds to all its bits have half of that


class Contents:
    """What is written: tensors by name, each computed when it is written, so that one at a time is in memory.

    Args:
        graph: one that came from a Hugging Face directory.
        model: that it was captured from, on meta.
        layers: its quantized layers, which leave their float weights to the layout.
        sources: what checkpoints call its tensors; by default as the model does.
        ties_codes: whether an output head that has the codes of the embedding is left out.

    Attributes:
        store: the tensors of the checkpoint.
        layers: the quantized layers; a layout adds their tensors.
        caches: the scales of its quantized caches; a layout adds them.
        ignored: the paths of linear layers that stay float.
        float_embeddings: the paths of embeddings that do.
        head: the path of the output head; empty where the model has none.
        ties: whether the output head is the embedding.
        notes: sentences on what is not exactly as in the graph, for the report.

    Raises:
        TargetError: for a graph that is no checkpoint with other numbers: one that computes something besides.
    """

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        layers: Sequence[Layer],
        sources: SourceNames = _AS_IN_THE_MODEL,
        *,
        ties_codes: bool = False,
    ) -> None:
        self._graph, self._sources = graph, sources
        self.store = WeightStore()
        self.layers = in_source(layers, sources)
        self.caches = cache_scales(graph, model)
        self.notes: list[str] = []
        quantized = {layer.name for layer in layers}
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        left = [name for name in linear if name not in quantized]
        if sources.experts:  # what chooses among experts, and they themselves, are no linear layers of the model
            left += [site.name for site in graph.sites() if site.name not in quantized and site.name not in linear]
        self.ignored = [name for item in left for name in self._source_paths(item)]
        embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        self.float_embeddings = [
            self._source_name(f"{name}.weight").removesuffix(".weight") for name in embeddings if name not in quantized
        ]
        self._mixtures = mixtures(sources)
        self._add_floats(model, quantized)
        self.ties = self._is_tied(model)
        self._drop_tied(model)
        self.head, was_tied = self._find_head(model)
        has_table = any(layer.is_table for layer in layers)
        if ties_codes and self._has_codes_of_table(layers):
            self.layers = [layer for layer in self.layers if layer.name != self.head]
            self.ties = True
        if was_tied and has_table and self.head not in quantized:
            self.note("the embedding is quantized, and so no longer the output head, which stays as it was")
        elif self._has_codes_of_table(layers) and not self.ties:
            self.note("embedding and output head have the same codes, twice: engines multiply with no table of codes")
        elif was_tied and self.head in quantized and not has_table:
            self.note("the output head is quantized, and so no longer the embedding, which stays as it was")

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
            f"{layer.name}.{name}",
            tuple(stored),
            lambda *tensors: function(*(layer.rows_of(tensor) for tensor in tensors)),
            dtype=dtype,
            shape=shape,
            store=self._graph.weights,
        )

    def add_cache_scale(self, cache: CacheScale, name: str, shape: Sequence[int]) -> None:
        """The scale of a cache in float32."""
        stored, size = (cache.stored,), tuple(shape)
        self.store.derive(
            name,
            stored,
            lambda scale: scale.float().reshape(size),
            dtype="float32",
            shape=size,
            store=self._graph.weights,
        )

    def add_half_scales(self, layer: Layer) -> None:
        """The scales of a layer as ``scales``, float16 ``[groups, out]``.

        Raises:
            TargetError: when they are written, if float16 cannot hold one.
        """

        def halved(scale: Tensor) -> Tensor:
            values = scale.reshape(layer.rows, layer.groups).T.float()
            return rounded_to_half(values, f"checkpoint: {layer.name}").contiguous()

        self.add(layer, "scales", ["scale"], halved, "float16", (layer.groups, layer.rows))
        if self.dtype(layer, "scale") == "float32":
            self.note("scales are rounded to float16, which this layout has: the native artifact's are float32")

    @property
    def ignored_modules(self) -> list[str]:
        """As ``ignored``, experts by the module that holds all of their mixture: engines make one layer of it."""
        return list(dict.fromkeys(self._mixtures.get(name, name) for name in self.ignored))

    def dtype(self, layer: Layer, part: str) -> str:
        """The dtype a part of a layer is stored in."""
        return self._graph.weights.info(f"{layer.stored}_{part}").dtype

    def read(self, layer: Layer, part: str) -> Tensor:
        """A small part of a layer, such as its factor."""
        return self._graph.weights.read(f"{layer.stored}_{part}")

    def note(self, sentence: str) -> None:
        """Says something once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _add_floats(self, model: nn.Module, quantized: set[str]) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        saved, buffers = set(model.state_dict()), dict(model.named_buffers())
        shifted = self._shifted(saved)
        known_parts = self._parts() | {name for name, _ in shifted.values()} | self._expert_weights()
        added = sorted(set(self._graph.weight_names()) - saved - known_parts - set(buffers))
        if added:
            raise TargetError(
                "the graph has a tensor that the model has no place for",
                where=f"checkpoint: {added[0]}",
                got=", ".join(added[:4]),
                expected="the parameters of the model, rewritten",
                remedy="leave out the pass that added it, if one did, or use another target",
            )
        wide = 0
        for name in sorted(saved):
            if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
                continue
            if name in self._sources.experts:
                self._add_float_experts(name, quantized)
                continue
            if name in shifted:
                wide += self._add_shifted(name, *shifted[name])
                continue
            known = name if name in self._graph.weights else self._tied_name(name, parameters)
            if known is not None:
                written = self._source_name(name)
                if name in self._graph.provenance.get("transposed", ()):
                    self._add_transposed(written, name)
                else:
                    self.store.alias(written, known, self._graph.weights)
                wide += name in parameters and self.store.info(written).dtype == "float32"
            elif name in parameters:
                raise TargetError(
                    "a parameter of the model is not among the tensors of the graph",
                    where=f"checkpoint: {name}",
                    got=f"{len(self._graph.weights)} tensors",
                    expected="every parameter, as engines look for them all",
                    remedy="lower the result of compile itself, not the native artifact read back",
                )
        usual = self._graph.provenance["config"].get("dtype") or self._graph.provenance["config"].get("torch_dtype")
        if wide and usual in ("bfloat16", "float16"):
            self.note(
                f"{wide} vectors (norms, biases) are float32, as they were rewritten; engines round them to {usual}"
            )

    def _shifted(self, saved: set[str]) -> dict[str, tuple[str, float]]:
        """By the model's name, what the graph has in a tensor's place: another, which is the tensor and a number."""
        read = set(self._graph.weight_names())
        known = self._graph.provenance.get("shifted", {})
        return {
            item["source"]: (name, item["added"])
            for name, item in known.items()
            if name in read and item["source"] in saved and item["source"] not in read
        }

    def _add_shifted(self, name: str, shifted: str, number: float) -> bool:
        """Adds what a shifted tensor came from; whether it is float32 because a pass has rewritten it."""
        weights = self._graph.weights
        if name in weights and torch.equal(weights.read(name).float() + number, weights.read(shifted).float()):
            self.store.alias(self._source_name(name), name, weights)
            return False
        shape = weights.info(shifted).shape
        self.store.derive(
            self._source_name(name),
            (shifted,),
            lambda tensor: tensor.float() - number,
            dtype="float32",
            shape=shape,
            store=weights,
        )
        return True

    def _add_transposed(self, written: str, name: str) -> None:
        """Adds a matrix that the model has as ``[in, out]``."""
        info = self._graph.weights.info(name)
        turned: Callable[[Tensor], Tensor] = lambda matrix: matrix.T.contiguous()  # noqa: E731
        shape = (info.shape[1], info.shape[0])
        self.store.derive(written, (name,), turned, dtype=info.dtype, shape=shape, store=self._graph.weights)

    def _source_name(self, name: str) -> str:
        return self._sources.renamed.get(name, name)

    def _source_paths(self, layer: str) -> list[str]:
        """The modules of the source that a layer is."""
        stack, number = place_in_stack(layer)
        if stack in self._sources.experts:
            return [part.name.removesuffix(".weight") for part in self._sources.experts[stack][number]]
        return [self._source_name(f"{layer}.weight").removesuffix(".weight")]

    def _expert_weights(self) -> set[str]:
        experts = self._sources.experts.items()
        return {f"{stack}.{number}.weight" for stack, parts in experts for number in range(len(parts))}

    def _add_float_experts(self, stack: str, quantized: set[str]) -> None:
        """Adds the matrices of those experts that stay float."""
        for number, parts in enumerate(self._sources.experts[stack]):
            weight = f"{stack}.{number}.weight"
            if f"{stack}.{number}" in quantized:
                continue
            info = self._graph.weights.info(weight)
            for part in parts:
                first, rows = int(part.first * info.shape[0]), int(part.rows * info.shape[0])
                self.store.derive(
                    part.name,
                    (weight,),
                    lambda tensor, first=first, rows=rows: tensor[first : first + rows].clone(),
                    dtype=info.dtype,
                    shape=(rows, *info.shape[1:]),
                    store=self._graph.weights,
                )

    def _parts(self) -> set[str]:
        """The stored tensors that quantized weights, rounded inputs and caches are computed from."""
        found = {name for cache in quantized_caches(self._graph) for name in cache.stored_names}
        found.update(name for table in quantized_tables(self._graph) for name in table.parts)
        for node in (node for site in self._graph.sites() for node in site.nodes):
            weight = node.args[1]
            if isinstance(weight, fx.Node) and is_quantized_weight(weight):
                found.update(stored_names(weight))
            found.update(name for name in input_tensors(node.args[0]) if name is not None)
        return found

    def _tied_name(self, name: str, parameters: dict[str, nn.Parameter]) -> str | None:
        """Another name that a parameter of the model has."""
        same = (other for other, value in parameters.items() if value is parameters.get(name))
        return next((other for other in same if other in self._graph.weights), None)

    def _drop_tied(self, model: nn.Module) -> None:
        """Leaves out what is the same tensor as another, as transformers does: engines look for the source of a tie."""
        for pair in getattr(model, "all_tied_weights_keys", {}).items():
            name, source = (self._source_name(item) for item in pair)
            if name in self.store and source in self.store and name in self.store.tied(source):
                self.store.remove(name)

    def _find_head(self, model: Any) -> tuple[str, bool]:
        """The path of the output head, and whether the model has it in common with the embedding."""
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        path = next((path for path, module in model.named_modules() if module is head), "")
        return path, head is not None and table is not None and head.weight is table.weight

    def _has_codes_of_table(self, layers: Sequence[Layer]) -> bool:
        """Whether the output head multiplies with the codes of the embedding."""
        tables = {f"{layer.stored}_codes" for layer in layers if layer.is_table}
        head = next((layer for layer in layers if layer.name == self.head), None)
        return head is not None and not tables.isdisjoint(self._graph.weights.tied(f"{head.stored}_codes"))

    def _is_tied(self, model: Any) -> bool:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or table is None:
            return False
        names = {id(module): path for path, module in model.named_modules()}
        first, second = (self._source_name(f"{names[id(module)]}.weight") for module in (head, table))
        return first in self.store and second in self.store and first in (*self.store.tied(second), second)


def rounded_to_half(values: Tensor, where: str) -> Tensor:
    """Scales in float16.

    Args:
        values: float32.
        where: they belong, for the message.

    Raises:
        TargetError: if float16 does not hold one of them.
    """
    rounded = values.to(torch.float16)
    worst = ((rounded.float() - values).abs() / values.abs().clamp(min=torch.finfo(torch.float32).tiny)).max()
    if not bool(worst <= _LARGEST_ERROR):  # not a number where infinite
        raise TargetError(
            "float16, in which this layout has its scales, does not hold those of a layer",
            where=where,
            got=f"scales from {float(values.abs().min()):.3g} to {float(values.abs().max()):.3g}",
            expected="numbers from 6.1e-05 to 65504",
            remedy="write format=compressed-tensors, or leave this layer in float with an override",
        )
    return rounded


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
