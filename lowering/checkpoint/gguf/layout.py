"""Which schemes blocks of GGUF hold, and layers as such blocks.

Blocks are of 32 weights. A scale of a larger group, or of a whole row, stands in each of its blocks: that is exact, and
costs the bits of the smaller group.
"""

import torch
from torch import Tensor

from qcompiler.errors import TargetError
from qcompiler.lowering.checkpoint.contents import Contents, rounded_to_half
from qcompiler.lowering.checkpoint.gguf import blocks
from qcompiler.lowering.checkpoint.gguf.blocks import BLOCK
from qcompiler.lowering.checkpoint.layers import Layer
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Support

__all__ = ["add_layer", "block_type", "supports", "type_of"]

_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "MXFP4": 17}
"""Of a block, by the name of its type."""


def block_type(weight: QuantSpec) -> str | None:
    """The type of block that holds a format of weights exactly (Q4_1: as far as float16 holds its minimum)."""
    if weight.codebook or (weight.is_fp4 and weight.has_factor):
        return None
    if weight.is_fp4:
        return "MXFP4"
    if weight.is_float or weight.bits not in (4, 8):
        return None
    if weight.bits == 8:
        return "Q8_0" if weight.symmetric else None
    return "Q4_0" if weight.symmetric else "Q4_1"


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight = scheme.weight
    if weight is None or scheme.activation is not None:
        return Support(
            "refused", "GGUF rounds weights, and llama.cpp rounds inputs by a rule of its own", "choose w8a16"
        )
    if block_type(weight) is None:
        return Support("refused", f"no block of GGUF holds {weight}", "choose w8a16, w4a16 or w4a16-asym")
    if width % BLOCK:
        return Support("refused", f"blocks of {BLOCK} do not divide {width} input channels")
    if weight.granularity == "per_group" and weight.group_of(width) % BLOCK:
        group = weight.group_of(width)
        return Support("refused", f"blocks of {BLOCK} do not divide groups of {group}", f"choose groups of {BLOCK}")
    return Support("fused")


def add_layer(contents: Contents, layer: Layer) -> None:
    """Adds the blocks of a layer, as ``<layer>.weight``: uint8 ``[out, bytes of a row]``."""
    kind = block_type(layer.weight)
    assert kind is not None
    per_row = layer.columns // BLOCK

    def spread(values: Tensor) -> Tensor:
        """``[rows, blocks]``, of numbers per group, row or tensor."""
        if layer.weight.granularity == "per_tensor":
            return values.reshape(1, 1).expand(layer.rows, per_row)
        shared = (layer.group or layer.columns) // BLOCK
        return values.reshape(layer.rows, layer.groups).repeat_interleave(shared, dim=1)[:, :per_row]

    def halves(scale: Tensor) -> Tensor:
        return rounded_to_half(scale.float(), f"checkpoint: {layer.name}")

    def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if kind == "MXFP4":
            return blocks.mxfp4(codes, spread(scale.view(torch.uint8)))
        if kind == "Q4_1":
            assert zero_point is not None
            minimum = -zero_point.float() * halves(scale).float()
            return blocks.q4_1(codes, spread(halves(scale)), spread(minimum.to(torch.float16)))
        return (blocks.q8_0 if kind == "Q8_0" else blocks.q4_0)(codes, spread(halves(scale)))

    parts = ["codes", "scale", *(["zero_point"] if kind == "Q4_1" else [])]
    contents.add(layer, "weight", parts, pack, "uint8", (layer.rows, per_row * _BYTES[kind]))
    _note(contents, layer, kind)


def _note(contents: Contents, layer: Layer, kind: str) -> None:
    bits = 8 * _BYTES[kind] / BLOCK
    if (layer.group or layer.columns) != BLOCK:
        contents.note(f"scales of more than {BLOCK} weights stand in each block of {BLOCK}: {bits} bits per weight")
    if kind != "MXFP4" and contents.dtype(layer, "scale") == "float32":
        contents.note("scales are rounded to float16, which this layout has: the native artifact's are float32")
    if kind == "Q4_1":
        contents.note(
            "Q4_1 has minima, -zero_point * scale, instead of zero points, rounded to float16: weights are off by up "
            "to 2^-11 of the minimum of their block"
        )


def type_of(contents: Contents, name: str) -> str:
    """The type that a tensor of a checkpoint has in GGUF, by the name that ``gguf`` gives it."""
    layer = next((layer for layer in contents.layers if f"{layer.name}.weight" == name), None)
    if layer is not None:
        kind = block_type(layer.weight)
        assert kind is not None
        return kind
    info = contents.store.info(name)
    if len(info.shape) < 2:
        return "F32"  # as llama.cpp adds and multiplies vectors
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if info.dtype not in kinds:
        raise TargetError(
            "GGUF has no such tensor",
            where=f"checkpoint: {name}",
            got=info.dtype,
            expected=", ".join(kinds),
            remedy="write format=compressed-tensors",
        )
    return kinds[info.dtype]
