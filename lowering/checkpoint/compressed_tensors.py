"""The layout of compressed-tensors, which vLLM, SGLang and transformers read.

Source: compressed-tensors 0.20 (its compressors); what engines have kernels for, vLLM 0.32.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.lowering.checkpoint.contents import Contents, pack_words
from qcompiler.lowering.checkpoint.layers import Layer, integer_support, refuse_groups
from qcompiler.lowering.checkpoint.layout import Layout
from qcompiler.numerics import QuantSpec, Scheme, pack_bits
from qcompiler.protocol import Support

__all__ = ["LAYOUT", "supports"]


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None:
        return Support("refused", "rounded inputs of float weights have no form", "quantize the weight too")
    is_fp4 = weight.is_fp4 or (activation is not None and activation.is_fp4)
    if is_fp4 and activation is not None and replace(activation, dynamic=False) != weight:
        return Support("refused", f"{weight} weights with {activation} inputs have no form", "choose nvfp4 or mxfp4")
    for spec in (weight, activation):
        if spec is not None and (spec.codebook or spec.dtype == "float8_e5m2" or spec.clip != 1):
            what = "a codebook" if spec.codebook else "a clipped range" if spec.clip != 1 else spec.dtype
            return Support("refused", f"{what} has no form in compressed-tensors", "choose w4a16, w8a8 or fp8")
    if weight.is_fp4 and width % (weight.group_size or 1):
        remedy = "leave the layer in float with an override"
        return Support("refused", f"blocks of {weight.group_size} do not divide {width} input channels", remedy)
    if weight.granularity == "per_group" and (refusal := refuse_groups(weight.group_of(width), width)):
        return refusal
    is_grouped = activation is not None and not is_fp4 and activation.granularity == "per_group"
    if activation is not None and is_grouped and width % activation.group_of(width):
        reason = f"inputs in groups of {activation.group_size}, which do not divide {width} channels"
        return Support("refused", reason, "choose one range per token (-dynamic)")
    if weight.granularity == "per_block" and weight.group_size != 128:
        return Support("refused", "blocks are of 128 by 128", "choose fp8-block")
    if weight.is_fp4:
        return Support("fused", "on Blackwell; elsewhere vLLM dequantizes the weight as it multiplies")
    if activation is None:
        return _weights_alone(weight, width)
    if weight.is_float is not activation.is_float:
        return Support("writes-only", f"vLLM multiplies no {weight.dtype} weights with {activation.dtype} inputs")
    if activation.dynamic and activation.granularity == "per_tensor":
        return Support("writes-only", "dynamic ranges of whole tensors: engines take one per token")
    in_blocks = weight.granularity == "per_block"
    if in_blocks and is_grouped:
        return Support("fused")
    if in_blocks or is_grouped or weight.granularity == "per_group" or weight.bits < 8 or not weight.symmetric:
        return Support("writes-only", f"{weight} weights with {activation} inputs: no kernel in vLLM")
    return Support("fused")


def supports_table(spec: QuantSpec, width: int) -> Support:
    """What becomes of an embedding: engines look rows up in packed symmetric integers."""
    found = supports(Scheme(spec), width)
    if found.status == "refused":
        return found
    if spec.is_float or not spec.symmetric or spec.bits not in (2, 4, 8):
        return Support("writes-only", f"embeddings of {spec}: vLLM takes symmetric integers")
    if width % (32 // spec.bits):
        return Support("writes-only", f"rows of {width} channels: vLLM takes those that fill whole words")
    return found


def _weights_alone(weight: QuantSpec, width: int) -> Support:
    if weight.is_float:
        if weight.granularity == "per_group":
            return Support("writes-only", f"{weight}: vLLM takes a scale per tensor, channel or block")
        return Support("fused")
    return integer_support(weight, width)


def layout_of(weight: QuantSpec, activation: QuantSpec | None) -> str:
    """The name of the compressor that a layer's tensors are made for."""
    if weight.is_fp4:
        return "nvfp4-pack-quantized" if weight.has_factor else "mxfp4-pack-quantized"
    if weight.is_float:
        return "float-quantized"
    return "int-quantized" if weight.bits == 8 and activation is not None else "pack-quantized"


def add_layer(contents: Contents, layer: Layer) -> None:
    """Adds the tensors of a layer."""
    spec, rows, columns = layer.weight, layer.rows, layer.columns
    layout = layout_of(spec, layer.activation)
    if layout == "pack-quantized":
        _add_packed(contents, layer)
    elif spec.is_fp4:
        contents.add(layer, "weight_packed", ["codes"], _nibbles, "uint8", (rows, columns // 2))
        scale = contents.dtype(layer, "scale")
        contents.add(layer, "weight_scale", ["scale"], _same, scale, (rows, columns // spec.group_of(columns)))
        if spec.has_factor:
            contents.add(layer, "weight_global_scale", ["factor"], _inverse, "float32", (1,))
    elif spec.symmetric:
        contents.add(layer, "weight", ["codes"], _same, contents.dtype(layer, "codes"), (rows, columns))
        _add_scale(contents, layer, _scale_shape(layer))
    else:
        shape = _scale_shape(layer)
        contents.add(layer, "weight", ["codes"], _signed, "int8", (rows, columns))
        _add_scale(contents, layer, shape)
        contents.add(layer, "weight_zero_point", ["zero_point"], lambda z: _signed(z).reshape(shape), "int8", shape)
    if layer.input_scale is not None and spec.is_fp4:
        contents.add(layer, "input_global_scale", [layer.input_scale], _inverse, "float32", (1,))
    elif layer.input_scale is not None:
        contents.add(layer, "input_scale", [layer.input_scale], lambda scale: scale.float().reshape(1), "float32", (1,))
    if layer.input_zero_point is not None:
        zero = [layer.input_zero_point]
        contents.add(layer, "input_zero_point", zero, lambda z: _signed(z).reshape(1), "int8", (1,))


def _add_packed(contents: Contents, layer: Layer) -> None:
    """Of whole tensors, the scale is repeated for each output channel: engines know no other form."""
    spec, rows, columns = layer.weight, layer.rows, layer.columns
    middle = 1 << (spec.bits - 1) if spec.symmetric else 0
    words = -(-columns * spec.bits // 32)

    def packed(codes: Tensor) -> Tensor:
        return pack_words((codes.to(torch.int16) + middle).to(torch.uint8), spec.bits)

    def packed_zeros(zeros: Tensor) -> Tensor:
        return pack_words(_per_row(zeros, layer).T.contiguous(), spec.bits).T.contiguous()

    contents.add(layer, "weight_packed", ["codes"], packed, "int32", (rows, words))
    contents.store.set(f"{layer.name}.weight_shape", torch.tensor([rows, columns]))
    _add_scale(contents, layer, (rows, layer.groups))
    if not spec.symmetric:
        shape = (-(-rows * spec.bits // 32), layer.groups)
        contents.add(layer, "weight_zero_point", ["zero_point"], packed_zeros, "int32", shape)


def _scale_shape(layer: Layer) -> tuple[int, ...]:
    if layer.weight.granularity == "per_tensor":
        return (1,)
    if layer.weight.granularity == "per_block":
        side = layer.weight.group_size
        assert side is not None
        return (-(-layer.rows // side), -(-layer.columns // side))
    return (layer.rows, layer.groups)


def _add_scale(contents: Contents, layer: Layer, shape: tuple[int, ...]) -> None:
    def shaped(scale: Tensor) -> Tensor:
        return _per_row(scale, layer) if shape == (layer.rows, layer.groups) else scale.reshape(shape)

    contents.add(layer, "weight_scale", ["scale"], shaped, contents.dtype(layer, "scale"), shape)


def _per_row(values: Tensor, layer: Layer) -> Tensor:
    """One per tensor, row or group → ``[out, groups]``."""
    shape = (layer.rows, layer.groups)
    return values.expand(shape).contiguous() if values.dim() == 0 else values.reshape(shape)


def add_caches(contents: Contents) -> None:
    """Adds the scales of caches, on the modules of attention."""
    from compressed_tensors.quantization import is_cached_attention_module

    for cache in contents.caches:
        shape = (1,) if cache.heads is None else (cache.heads, 1, 1)
        contents.add_cache_scale(cache, f"{cache.attention}.{cache.letter}_scale", shape)
        if not is_cached_attention_module(cache.module):
            contents.note(
                f"compressed-tensors finds no cache in {type(cache.module).__name__}: "
                "transformers does not round keys and values, and engines may not either"
            )


def quantization_config(contents: Contents) -> dict[str, Any] | None:
    """What ``config.json`` says, made and so checked by the library's own classes."""
    if not contents.layers and not contents.caches:
        return None
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for layer in contents.layers:
        weight, activation = layer.weight, layer.activation
        fields = {
            "weights": _arguments(weight, layer),
            "input_activations": None if activation is None else _input_arguments(activation),
            "format": layout_of(weight, activation),
        }
        groups.setdefault(json.dumps(fields), (fields, []))[1].append(layer.name)
    class_names = ["Linear"]  # and by name what is of another class, in vLLM the head, too
    class_names += [layer.name for layer in contents.layers if layer.is_table or layer.name == contents.head]
    tables = {layer.name for layer in contents.layers if layer.is_table}
    layouts = {str(fields["format"]) for fields, _ in groups.values()}
    config = QuantizationConfig(
        config_groups={
            f"group_{number}": QuantizationScheme(
                targets=[
                    *(class_names if len(groups) == 1 else names),
                    *([] if tables.isdisjoint(names) else ["Embedding"]),  # many models of vLLM give tables no name
                ],
                **fields,
            )
            for number, (fields, names) in enumerate(groups.values())
        },
        ignore=[*contents.ignored, *(contents.float_embeddings if tables else ())],
        kv_cache_scheme=QuantizationArgs(**_cache_arguments(contents)) if contents.caches else None,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision" if layouts else "dense",
        quantization_status="compressed",
    )
    found: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
    return found


def _cache_arguments(contents: Contents) -> dict[str, Any]:
    strategy = "tensor" if contents.caches[0].heads is None else "attn_head"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}


def _arguments(spec: QuantSpec, layer: Layer) -> dict[str, Any]:
    """Of a weight."""
    found = _common(spec)
    if spec.is_fp4:
        return found
    if spec.granularity == "per_block":
        return {**found, "strategy": "block", "block_structure": [spec.group_size, spec.group_size]}
    if layer.group is not None:
        return {**found, "strategy": "group", "group_size": layer.group}
    is_one = spec.granularity == "per_tensor" and layout_of(spec, layer.activation) != "pack-quantized"
    return {**found, "strategy": "tensor" if is_one else "channel"}


def _input_arguments(spec: QuantSpec) -> dict[str, Any]:
    found = _common(spec)
    if spec.has_factor:
        return {**found, "dynamic": "local"}  # the scales of groups; the factor of the tensor is stored
    if spec.is_fp4:
        return found
    if spec.granularity == "per_group":
        return {**found, "strategy": "group", "group_size": spec.group_size}
    return {**found, "strategy": "token" if spec.granularity == "per_token" else "tensor"}


def _common(spec: QuantSpec) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
        "symmetric": spec.symmetric,
        "dynamic": spec.dynamic,
    }
    if spec.is_fp4:
        found["strategy"] = "tensor_group" if spec.has_factor else "group"
        found["group_size"] = spec.group_size
        found["scale_dtype"] = "torch.float8_e4m3fn" if spec.has_factor else "torch.uint8"
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _inverse(factor: Tensor) -> Tensor:
    return 1 / factor.float().reshape(1)


def _signed(codes: Tensor) -> Tensor:
    """uint8 → int8, the same order of numbers."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _nibbles(codes: Tensor) -> Tensor:
    return pack_bits(codes, 4)


LAYOUT = Layout(
    supports=supports,
    add_layer=add_layer,
    supports_table=supports_table,
    quantization_config=quantization_config,
    add_caches=add_caches,
)
