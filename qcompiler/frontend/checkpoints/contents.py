"""A quantized checkpoint as it is read: which tensors make up which layer. Codes are read when they are wanted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, WeightError
from qcompiler.numerics import QuantSpec, Scheme, unpack_bits
from qcompiler.storage import WeightStore

__all__ = [
    "CHECK_SETTINGS",
    "FLOATS",
    "PARTS",
    "USE_ORIGINAL",
    "Checkpoint",
    "Layer",
    "group_order",
    "names_in",
    "positive_number",
    "powers_of_two",
    "unpack_nibbles",
    "unpack_words",
]

FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes of scales."""
PARTS = ("codes", "scale", "zero_point", "factor")
"""What a quantized weight is stored as; the last two where the format has them."""

CHECK_SETTINGS = "check that the quantization settings belong to these weights"
USE_ORIGINAL = "use the original model"
"""Remedies: of what contradicts itself, and of what is not read."""

_canonical = torch.ops.qcompiler


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer of a checkpoint.

    Attributes:
        name: the module's path, as stored.
        rows, columns: of its weight ``[out, in]``.
        scheme: the formats of weight and input.
        order: int64 ``[in]``: which column of the weight each column of the codes is; None where they are in order.
        input_scale, input_zero_point: of a static input, one number each; of NVFP4 the first is the factor.
        input_multiplier: float32 ``[in]``, which the input is multiplied by ahead of all else.
    """

    name: str
    rows: int
    columns: int
    scheme: Scheme
    order: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_multiplier: Tensor | None = None

    @property
    def weight(self) -> str:
        """The name of its float weight; its parts in `Checkpoint.parts` have it ahead of ``_codes`` and ``_scale``."""
        return f"{self.name}.weight"


@dataclass
class Checkpoint:
    """What a reader finds in the tensors of a quantized checkpoint.

    Attributes:
        stored: the tensors as they lie in the files.
        method: the name of the layout.
        parts: codes, scales, zero points and factors of layers, by names and in forms of `Graph.set_stored_weight`.
        layers: by the name of the float weight.
        versions: the same by what stands for the float weight in any store (`WeightStore.version`).
        floats: the tensors of the unquantized model, under its stored names; filled by `finish`.
        cache_scales: of keys and of values, float32, by the module they lie in and ``key`` or ``value``.
        notes: sentences for the report, with the layers that each is about.
        lost: what the checkpoint says and a graph cannot do, the same way.
    """

    stored: WeightStore
    method: str
    parts: WeightStore = field(default_factory=WeightStore)
    layers: dict[str, Layer] = field(default_factory=dict)
    versions: dict[object, Layer] = field(default_factory=dict)
    floats: WeightStore = field(default_factory=WeightStore)
    cache_scales: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, list[str]] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def modules(self, *suffixes: str) -> list[str]:
        """The paths of modules that have a tensor of one of these names, in the order of the files."""
        found = (name.rpartition(".") for name in self.stored.names())
        return list(dict.fromkeys(path for path, _, last in found if last in suffixes))

    def has(self, module: str, part: str) -> bool:
        """Whether a module has a tensor of that name."""
        return f"{module}.{part}" in self.stored

    def take(self, module: str, part: str, dtypes: Sequence[str], shapes: Sequence[Sequence[int]] | None = None) -> str:
        """The name of a module's tensor, which belongs to its quantization from now on.

        Raises:
            WeightError: if it is missing, or of another dtype or shape.
        """
        name = f"{module}.{part}"
        if name not in self.stored:
            raise WeightError(
                "a quantized layer lacks a tensor",
                where=name,
                got="nothing of that name",
                expected=" or ".join(dtypes),
                remedy=CHECK_SETTINGS,
            )
        info = self.stored.info(name)
        if info.dtype not in dtypes:
            raise WeightError(
                "a tensor of a quantized layer is not of the dtype that the format has there",
                where=name,
                got=info.dtype,
                expected=" or ".join(dtypes),
                remedy=CHECK_SETTINGS,
            )
        if shapes is not None and tuple(info.shape) not in [tuple(shape) for shape in shapes]:
            raise WeightError(
                "a tensor of a quantized layer has not the shape that the settings imply",
                where=name,
                got=tuple(info.shape),
                expected=" or ".join(str(tuple(shape)) for shape in shapes),
                remedy="check that the quantization settings (bits, group size) belong to these weights",
            )
        self._taken.add(name)
        return name

    def shape(self, module: str, part: str, dtypes: Sequence[str], dimensions: int) -> tuple[int, ...]:
        """The shape of a module's tensor, taken.

        Raises:
            WeightError: besides what `take` says, for another number of dimensions.
        """
        name = self.take(module, part, dtypes)
        shape = tuple(self.stored.info(name).shape)
        if len(shape) != dimensions:
            raise WeightError(
                "a tensor of a quantized layer has not the shape that the settings imply",
                where=name,
                got=shape,
                expected=f"{dimensions} dimensions",
                remedy=CHECK_SETTINGS,
            )
        return shape

    def number(self, module: str, part: str, dtypes: Sequence[str]) -> Tensor:
        """The one number that a module's tensor holds, read and taken; 0-D."""
        return self.stored.read(self.take(module, part, dtypes, ((), (1,)))).reshape(())

    def part(
        self,
        layer: str,
        part: str,
        sources: Sequence[str],
        function: Callable[..., Tensor],
        dtype: str,
        shape: Sequence[int],
    ) -> None:
        """Defines a part of a layer (its path) as a function of stored tensors."""
        name = f"{layer}.weight_{part}"
        self.parts.derive(name, tuple(sources), function, dtype=dtype, shape=shape, store=self.stored)

    def add(self, layer: Layer) -> None:
        """Adds a layer whose parts are defined; its float weight is computed from them when it is read."""
        spec = layer.scheme.weight
        assert spec is not None
        self.layers[layer.weight] = layer
        there = [part for part in PARTS if f"{layer.weight}_{part}" in self.parts]
        names = tuple(f"{layer.weight}_{part}" for part in there)

        def weight(*tensors: Tensor) -> Tensor:
            return _dequantized(dict(zip(there, tensors, strict=True)), spec, layer)

        shape = (layer.rows, layer.columns)
        self.floats.derive(layer.weight, names, weight, dtype="float32", shape=shape, store=self.parts)
        self.versions[self.floats.version(layer.weight)] = layer

    def add_float(
        self, module: str, sources: Sequence[str], function: Callable[..., Tensor], shape: Sequence[int]
    ) -> None:
        """Adds a layer that no format here has the codes of, as a float weight computed from stored tensors."""
        name = f"{module}.weight"
        self.floats.derive(name, tuple(sources), function, dtype="float32", shape=shape, store=self.stored)

    def take_over(self, name: str) -> None:
        """Counts a stored tensor among those of quantized layers, by its whole name."""
        self._taken.add(name)

    def finish(self) -> None:
        """Takes over the tensors that belong to no quantized layer."""
        for name in self.stored.names():
            if name not in self._taken:
                self.floats.alias(name, name, self.stored)


def _dequantized(parts: Mapping[str, Tensor], spec: QuantSpec, layer: Layer) -> Tensor:
    """The float32 weight of a layer, its columns in order."""
    codes, scale = parts["codes"], parts["scale"]
    weight: Any
    if spec.is_fp4:
        weight = _canonical.fp4_dequantize(codes, scale, parts.get("factor"), spec.group_of(layer.columns))
    else:
        zero = parts.get("zero_point")
        weight = _canonical.dequantize(codes, scale.float(), zero, *spec.place(layer.columns), torch.float32)
    if layer.input_multiplier is not None:
        weight = weight * layer.input_multiplier
    if layer.order is None:
        return weight  # type: ignore[no-any-return]
    return torch.empty_like(weight).index_copy(1, layer.order, weight)


def positive_number(checkpoint: Checkpoint, module: str, part: str) -> Tensor:
    """The scale that a module's tensor holds, float32 0-D, read and taken.

    Raises:
        WeightError: if it is not positive; and as `Checkpoint.take`.
    """
    found = checkpoint.number(module, part, FLOATS).float()
    if not float(found) > 0:
        raise WeightError("a scale is not positive", where=f"{module}.{part}", got=float(found), remedy=CHECK_SETTINGS)
    return found


def powers_of_two(exponents: Tensor) -> Tensor:
    """uint8, the bytes of E8M0 → float32."""
    return torch.exp2(exponents.double() - 127).float()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 ``[rows, in / 2]`` → ``[rows, in]``, the first of two in the low bits."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def names_in(settings: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of names among the settings; none where there is none.

    Raises:
        InputError: if it is something else.
    """
    found = settings.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise InputError("a list of names is wanted", where=f"{where}: {key}", got=found, remedy=CHECK_SETTINGS)
    return found


def unpack_words(words: Tensor, bits: int, width: int) -> Tensor:
    """Unsigned codes from 32-bit words along the last axis, the first in the lowest bits, none between two words lost.

    Args:
        words: int32 ``[..., ceil(width * bits / 32)]``.
        bits: 2 to 8.
        width: codes in each row.

    Returns:
        uint8 ``[..., width]``.
    """
    return unpack_bits(words.contiguous().view(torch.uint8), bits, width, signed=False)


def group_order(g_idx: Tensor, group: int, groups: int, where: str) -> tuple[Tensor | None, bool]:
    """How columns have to be put for groups to be consecutive.

    Args:
        g_idx: int ``[in]``, the group of each column.
        group: columns in a group; the last may be short.
        groups: how many there are.
        where: the name of the tensor.

    Returns:
        int64 ``[in]``, the columns in order of their groups, or None where they are so already; and whether that gives
        groups of that size.

    Raises:
        WeightError: if a column belongs to no group.
    """
    if len(g_idx) and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise WeightError(
            "a column belongs to a group that does not exist",
            where=where,
            got=f"{int(g_idx.min())} to {int(g_idx.max())}",
            expected=f"0 to {groups - 1}",
            remedy=CHECK_SETTINGS,
        )
    wanted = torch.arange(len(g_idx)) // group
    if torch.equal(g_idx.long(), wanted):
        return None, True
    order = torch.argsort(g_idx.long(), stable=True)
    return order, torch.equal(g_idx.long()[order], wanted)
