"""The layout of compressed-tensors, which vLLM, SGLang and transformers read.

Source: compressed-tensors 0.20 (its compressors); what engines have kernels for, vLLM 0.32.
"""

from typing import Any

import torch
from torch import Tensor

from qcompiler.lowering.checkpoint.contents import Contents, Layer, pack_words
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Support

__all__ = ["READER", "add_layer", "extra_files", "quantization_config", "supports"]

READER = "transformers"

_MARLIN_GROUPS = (32, 64, 128)


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None:
        return Support("refused", "rounded inputs of float weights have no form", "quantize the weight too")
    for spec in (weight, activation):
        if spec is not None and (spec.codebook or spec.dtype == "float8_e5m2" or spec.clip != 1):
            what = "a codebook" if spec.codebook else "a clipped range" if spec.clip != 1 else spec.dtype
            return Support("refused", f"{what} has no form in compressed-tensors", "choose w4a16, w8a8 or fp8")
    if weight.group_size is not None and weight.granularity == "per_group" and width % weight.group_of(width):
        return Support(
            "refused",
            f"groups of {weight.group_size} do not divide {width} input channels",
            f"choose groups of {_largest_group(width)}",
        )
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
    if weight.granularity in ("per_group", "per_block") or weight.bits < 8:
        return Support("writes-only", f"{weight} weights with {activation} inputs: no kernel in vLLM")
    return Support("fused")


def _weights_alone(weight: QuantSpec, width: int) -> Support:
    if weight.is_float:
        if weight.granularity == "per_group":
            return Support("writes-only", f"{weight}: vLLM takes a scale per tensor, channel or block")
        return Support("fused")
    group = weight.group_of(width)
    if group not in (*_MARLIN_GROUPS, width):
        return Support("writes-only", f"groups of {group}: vLLM has kernels for 32, 64, 128 and whole channels")
    return Support("fused")


def _largest_group(width: int) -> int:
    return next((group for group in (128, 64, 32) if width % group == 0), width)


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
    else:
        codes = contents.dtype(layer, "codes")
        contents.add(layer, "weight", ["codes"], _same, codes, (rows, columns))
        _add_scale(contents, layer)
    if layer.input_scale is not None:
        if spec.is_fp4:
            contents.add(layer, "input_global_scale", [layer.input_scale], _inverse, "float32", (1,))
            return
        contents.add(layer, "input_scale", [layer.input_scale], _flat, "float32", (1,))
    if layer.input_zero_point is not None:
        contents.add(layer, "input_zero_point", [layer.input_zero_point], _signed, "int8", (1,))


def _add_packed(contents: Contents, layer: Layer) -> None:
    spec, rows, columns = layer.weight, layer.rows, layer.columns
    middle = 1 << (spec.bits - 1) if spec.symmetric else 0
    words = -(-columns * spec.bits // 32)

    def packed(codes: Tensor) -> Tensor:
        return pack_words((codes + middle).to(torch.uint8), spec.bits)

    contents.add(layer, "weight_packed", ["codes"], packed, "int32", (rows, words))
    contents.store.set(f"{layer.name}.weight_shape", torch.tensor([rows, columns]))
    groups = _add_scale(contents, layer)
    if not spec.symmetric:

        def packed_zeros(zeros: Tensor) -> Tensor:
            return pack_words(zeros.reshape(rows, groups).T.contiguous(), spec.bits).T.contiguous()

        shape = (-(-rows * spec.bits // 32), groups)
        contents.add(layer, "weight_zero_point", ["zero_point"], packed_zeros, "int32", shape)


def _add_scale(contents: Contents, layer: Layer) -> int:
    """The scales as a matrix, or as one number; the number of their columns."""
    spec, rows, columns = layer.weight, layer.rows, layer.columns
    groups, shape = 1, (rows, 1)
    if spec.granularity == "per_tensor":
        shape = (1,)  # type: ignore[assignment]
    elif spec.granularity == "per_block":
        assert spec.group_size is not None
        shape = (-(-rows // spec.group_size), -(-columns // spec.group_size))
    elif spec.granularity == "per_group":
        groups = columns // spec.group_of(columns)
        shape = (rows, groups)
    dtype = contents.dtype(layer, "scale")
    contents.add(layer, "weight_scale", ["scale"], lambda scale: scale.reshape(shape), dtype, shape)
    return groups


def quantization_config(contents: Contents) -> dict[str, Any] | None:
    """What ``config.json`` says, made and so checked by the library's own classes."""
    if not contents.layers:
        return None
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    groups: dict[tuple[QuantSpec, QuantSpec | None], list[Layer]] = {}
    for layer in contents.layers:
        groups.setdefault((layer.weight, layer.activation), []).append(layer)
    layouts = {layout_of(*key) for key in groups}
    schemes = {}
    for number, ((weight, activation), layers) in enumerate(groups.items()):
        columns = max(layer.columns for layer in layers)
        schemes[f"group_{number}"] = QuantizationScheme(
            targets=["Linear"] if len(groups) == 1 else [layer.name for layer in layers],
            weights=_arguments(weight, columns),
            input_activations=None if activation is None else _arguments(activation, columns),
            format=layout_of(weight, activation),
        )
    config = QuantizationConfig(
        config_groups=schemes,
        ignore=contents.ignored,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed",
    )
    found: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
    return found


def _arguments(spec: QuantSpec, columns: int) -> dict[str, Any]:
    strategies = {"per_tensor": "tensor", "per_channel": "channel", "per_block": "block", "per_token": "token"}
    found: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
        "symmetric": spec.symmetric,
        "strategy": strategies.get(spec.granularity, "group"),
        "dynamic": spec.dynamic,
    }
    if spec.granularity == "per_block":
        found["block_structure"] = [spec.group_size, spec.group_size]
    elif spec.granularity == "per_group":
        found["group_size"] = spec.group_of(columns)
    if spec.is_fp4:
        found["scale_dtype"] = "torch.float8_e4m3fn" if spec.has_factor else "torch.uint8"
        if spec.has_factor:
            found["strategy"] = "tensor_group"
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(1)


def _inverse(factor: Tensor) -> Tensor:
    return 1 / factor.float().reshape(1)


def _signed(zero_point: Tensor) -> Tensor:
    return (zero_point.to(torch.int16) - 128).to(torch.int8).reshape(1)


def _nibbles(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | codes[:, 1::2] << 4


def extra_files(contents: Contents) -> dict[str, Any]:
    """None: readers look into ``config.json``."""
    return {}
