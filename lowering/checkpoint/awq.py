"""The layout of AWQ (``gemm``), which vLLM, SGLang, TensorRT-LLM and gptqmodel read.

Weights lie transposed, unsigned, packed along the output channels in an order of their own. Source: AutoAWQ's gemm
linear module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import TargetError
from qcompiler.lowering.checkpoint.contents import Contents, pack_words
from qcompiler.lowering.checkpoint.layers import Layer, check_rows, integer_support, refuse_groups
from qcompiler.lowering.checkpoint.layout import Layout
from qcompiler.numerics import Scheme
from qcompiler.protocol import Support

__all__ = ["LAYOUT", "supports"]

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight output channels in a word, lowest bits first


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight = scheme.weight
    if weight is None or scheme.activation is not None:
        return Support("refused", "AWQ checkpoints round weights, and leave inputs in float", "choose w4a16")
    if weight.is_float or weight.codebook or weight.bits != 4:
        return Support("refused", "AWQ checkpoints hold integers of 4 bits", "choose w4a16")
    if weight.granularity == "per_tensor":
        return Support("refused", "AWQ checkpoints have a scale per group or channel", "leave out -tensor")
    return refuse_groups(weight.group_of(width), width) or integer_support(weight, width)


def check_layers(layers: Sequence[Layer]) -> None:
    """Refuses layers whose output channels do not fill words, and groups of several sizes.

    Raises:
        TargetError: that names the layer.
    """
    size = _group_size(layers)
    for layer in layers:
        check_rows(layer, 8, "AWQ")
        if (layer.group or layer.columns) != (size or layer.columns):
            raise TargetError(
                "an AWQ checkpoint has one size of groups for all its layers",
                where=f"checkpoint: {layer.name}",
                got=f"groups of {layer.group or layer.columns}",
                expected=f"groups of {size}, as others have",
                remedy="give all layers one group size, or write format=compressed-tensors",
            )


def _group_size(layers: Sequence[Layer]) -> int | None:
    """Of all layers; None where all of them have one scale per output channel."""
    return next((layer.group for layer in layers if layer.group is not None), None)


def add_layer(contents: Contents, layer: Layer) -> None:
    """Adds the tensors of a layer."""
    rows, columns, groups = layer.rows, layer.columns, layer.groups
    middle = 8 if layer.weight.symmetric else 0

    def packed(codes: Tensor) -> Tensor:
        return _pack((codes.to(torch.int16) + middle).to(torch.uint8).T)

    def zeros(zero_point: Tensor) -> Tensor:
        return _pack(zero_point.reshape(rows, groups).T)

    contents.add(layer, "qweight", ["codes"], packed, "int32", (columns, rows // 8))
    contents.add_half_scales(layer)
    if layer.weight.symmetric:
        contents.store.set(f"{layer.name}.qzeros", _pack(torch.full((groups, rows), 8, dtype=torch.uint8)))
    else:
        contents.add(layer, "qzeros", ["zero_point"], zeros, "int32", (groups, rows // 8))


def _pack(values: Tensor) -> Tensor:
    """uint8 ``[n, out]`` → int32 ``[n, out / 8]``."""
    return pack_words(values.unflatten(-1, (-1, 8))[..., _ORDER].flatten(-2).contiguous(), 4)


def quantization_config(contents: Contents) -> dict[str, Any] | None:
    """What ``config.json`` says."""
    if not contents.layers:
        return None
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": _group_size(contents.layers) or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": contents.ignored_modules or None,
    }


LAYOUT = Layout(
    supports=supports,
    add_layer=add_layer,
    quantization_config=quantization_config,
    check_layers=check_layers,
)
