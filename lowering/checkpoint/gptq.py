"""The layout of GPTQ (v1), which vLLM, SGLang, TensorRT-LLM and gptqmodel read.

Weights lie transposed, unsigned, packed along the input channels; zero points are stored less one, as the first tools
did. Source: GPTQModel's linear modules; vLLM takes symmetric codes of 4 and 8 bits.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompiler.lowering.checkpoint.contents import Contents, pack_words
from qcompiler.lowering.checkpoint.layers import Layer, check_rows, integer_support, refuse_groups
from qcompiler.lowering.checkpoint.layout import Layout
from qcompiler.numerics import Scheme
from qcompiler.protocol import Support

__all__ = ["LAYOUT", "supports"]


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight = scheme.weight
    if weight is None or scheme.activation is not None:
        return Support("refused", "GPTQ checkpoints round weights, and leave inputs in float", "choose w4a16 or w8a16")
    if weight.is_float or weight.codebook or weight.bits not in (4, 8) or not weight.symmetric:
        return Support("refused", "GPTQ checkpoints hold symmetric integers of 4 or 8 bits", "choose w4a16 or w8a16")
    if weight.granularity == "per_tensor":
        return Support("refused", "GPTQ checkpoints have a scale per group or channel", "leave out -tensor")
    if refusal := refuse_groups(weight.group_of(width), width):
        return refusal
    if width % 32:
        return Support("refused", f"{width} input channels do not fill whole words", "write format=compressed-tensors")
    return integer_support(weight, width)


def check_layers(layers: Sequence[Layer]) -> None:
    """Refuses layers whose output channels do not fill words of zero points.

    Raises:
        TargetError: that names the layer.
    """
    for layer in layers:
        check_rows(layer, 32 // layer.weight.bits, "GPTQ")


def add_layer(contents: Contents, layer: Layer) -> None:
    """Adds the tensors of a layer."""
    bits, rows, columns = layer.weight.bits, layer.rows, layer.columns
    middle, per_word = 1 << (bits - 1), 32 // bits

    def packed(codes: Tensor) -> Tensor:
        return pack_words((codes.to(torch.int16) + middle).to(torch.uint8), bits).T.contiguous()

    contents.add(layer, "qweight", ["codes"], packed, "int32", (columns // per_word, rows))
    contents.add_half_scales(layer)
    zeros = torch.full((layer.groups, rows), middle - 1, dtype=torch.uint8)
    contents.store.set(f"{layer.name}.qzeros", pack_words(zeros, bits))
    contents.store.set(f"{layer.name}.g_idx", torch.arange(columns, dtype=torch.int32) // (layer.group or columns))


def quantization_config(contents: Contents) -> dict[str, Any] | None:
    """What ``config.json`` says: the format of the first layer, and of others where they differ."""
    if not contents.layers:
        return None
    first, *others = (_fields(layer) for layer in contents.layers)
    found = {
        "quant_method": "gptq",
        **first,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": any(layer.name == contents.head for layer in contents.layers),
    }
    different = {
        f"+:{_pattern(layer.mixture or layer.name)}": fields
        for layer, fields in zip(contents.layers[1:], others, strict=True)
        if fields != first
    }
    different |= {f"-:{_pattern(name)}": {} for name in contents.ignored_modules if name != contents.head}
    return {**found, "dynamic": different} if different else found


def _pattern(module: str) -> str:
    """What matches a module, and all in it: vLLM asks for the experts of a mixture by the module that holds them."""
    return rf"^{re.escape(module)}(\.|$)"


def extra_files(contents: Contents) -> dict[str, Any]:
    """``quantize_config.json``, which older readers look for."""
    found = quantization_config(contents)
    return {} if found is None else {"quantize_config.json": found}


def _fields(layer: Layer) -> dict[str, Any]:
    return {"bits": layer.weight.bits, "group_size": layer.group or -1}


LAYOUT = Layout(
    supports=supports,
    add_layer=add_layer,
    quantization_config=quantization_config,
    extra_files=extra_files,
    check_layers=check_layers,
)
