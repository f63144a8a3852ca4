"""The layout of NVIDIA's ModelOpt (unified Hugging Face export), which TensorRT-LLM, vLLM and SGLang read.

Source: ModelOpt's export to Hugging Face directories; vLLM 0.32 takes all of these but integers. Where layers differ,
the algorithm of the whole is ``MIXED_PRECISION``, and ``quantized_layers`` names each. Engines round the inputs of
``FP8_PB_WO`` in groups of 128, though its name speaks of weights alone; vLLM finds the experts of a mixture that have
it under ``MIXED_PRECISION`` alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import qcompiler
from qcompiler.errors import TargetError
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.lowering.checkpoint.layers import Layer, check_rows, refuse_groups
from qcompiler.lowering.checkpoint.layout import Layout
from qcompiler.numerics import QuantSpec, Scheme, pack_bits
from qcompiler.protocol import Support

__all__ = ["LAYOUT", "supports"]

_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_TAKEN = "fp8-tensor, fp8-dynamic, fp8-block-dyngroup, nvfp4, nvfp4a16, w8a8-actsym or w4a16"
_SIDE = 128
_GROUPS_OF_INPUTS = QuantSpec("float8_e4m3fn", "per_group", _SIDE, dynamic=True)


def _algorithm(weight: QuantSpec, activation: QuantSpec | None) -> str | None:
    """The name that ModelOpt has for a format; None where it has none."""
    if weight.has_factor:
        if activation is None:
            return "W4A16_NVFP4"
        return "NVFP4" if replace(activation, dynamic=False) == weight else None
    if weight.dtype == "float8_e4m3fn" and activation is not None and activation.dtype == weight.dtype:
        if weight.granularity == "per_tensor" and activation.granularity == "per_tensor" and not activation.dynamic:
            return "FP8"
        if weight.granularity == "per_channel" and activation.granularity == "per_token" and activation.clip == 1:
            return "FP8_PER_CHANNEL_PER_TOKEN"
        if (weight.granularity, weight.group_size) == ("per_block", _SIDE) and activation == _GROUPS_OF_INPUTS:
            return "FP8_PB_WO"
    if weight.dtype == "int8" and weight.granularity == "per_channel" and weight.symmetric:
        is_static = activation == QuantSpec("int8", "per_tensor", None)
        return "W8A8_SQ_PER_CHANNEL" if is_static else None
    if weight.dtype == "int4" and weight.granularity == "per_group" and activation is None:
        return "W4A16_AWQ" if weight.symmetric and not weight.codebook else None
    return None


def supports(scheme: Scheme, width: int) -> Support:
    """What becomes of a layer."""
    weight = scheme.weight
    algorithm = None if weight is None else _algorithm(weight, scheme.activation)
    if weight is None or algorithm is None:
        return Support("refused", "ModelOpt has no algorithm of this format", f"choose {_TAKEN}")
    if weight.is_fp4 and width % (weight.group_size or 1):
        remedy = "leave the layer in float with an override"
        return Support("refused", f"blocks of {weight.group_size} do not divide {width} input channels", remedy)
    if algorithm == "FP8_PB_WO" and width % _SIDE:
        return Support("refused", f"blocks of {_SIDE} do not divide {width} input channels", "choose fp8-dynamic")
    if refusal := refuse_groups(weight.group_size, width):
        return refusal
    if not weight.is_float:
        return Support("fused", "in TensorRT-LLM; vLLM takes no integers in this layout")
    if weight.is_fp4:
        return Support("fused", "on Blackwell; elsewhere vLLM dequantizes the weight as it multiplies")
    return Support("fused")


def check_layers(layers: Sequence[Layer]) -> None:
    """Refuses output channels that do not fill bytes.

    Raises:
        TargetError: that names the layer.
    """
    for layer in layers:
        if layer.weight.dtype == "int4":
            check_rows(layer, 2, "ModelOpt", "bytes")


def add_layer(contents: Contents, layer: Layer) -> None:
    """Adds the tensors of a layer."""
    spec, rows, columns = layer.weight, layer.rows, layer.columns
    if spec.has_factor:
        assert spec.group_size is not None
        contents.add(layer, "weight", ["codes"], _along_in, "uint8", (rows, columns // 2))
        shape: tuple[int, ...] = (rows, columns // spec.group_size)
        contents.add(layer, "weight_scale", ["scale"], lambda scale: scale, "float8_e4m3fn", shape)
        contents.add(layer, "weight_scale_2", ["factor"], _number, "float32", ())
    elif spec.bits == 8:
        contents.add(layer, "weight", ["codes"], lambda codes: codes, spec.stored_dtype, (rows, columns))
        blocks = (-(-rows // _SIDE), 1, columns // _SIDE, 1)
        shape = {"per_tensor": (), "per_channel": (rows,), "per_block": blocks}[spec.granularity]
        contents.add(layer, "weight_scale", ["scale"], lambda s: s.float().reshape(shape), "float32", shape)
    else:
        contents.add(layer, "weight", ["codes"], _along_out, "uint8", (rows // 2, columns))
        groups = (rows, layer.groups)
        contents.add(layer, "weight_scale", ["scale"], lambda s: s.float().reshape(groups), "float32", groups)
    if layer.input_scale is not None:
        contents.add(layer, "input_scale", [layer.input_scale], _number, "float32", ())


def add_caches(contents: Contents) -> None:
    """Adds the scales of caches, on the layers that keys and values come from.

    Raises:
        TargetError: where nothing else is quantized, which has no algorithm in ModelOpt.
    """
    if contents.caches and not contents.layers:
        raise TargetError(
            "a ModelOpt checkpoint with float weights alone has no algorithm, and so no place for a quantized cache",
            where="checkpoint",
            got="a quantized cache, and no quantized layer",
            remedy="quantize weights too, or write format=compressed-tensors",
        )
    for cache in contents.caches:
        contents.add_cache_scale(cache, f"{cache.source}.{cache.letter}_scale", ())


def _number(value: Tensor) -> Tensor:
    return value.float().reshape(())


def _along_in(codes: Tensor) -> Tensor:
    return pack_bits(codes, 4)


def _along_out(codes: Tensor) -> Tensor:
    """int8 ``[out, in]`` → uint8 ``[out / 2, in]``: two's complement, the even row in the low nibble."""
    return pack_bits(codes.T.contiguous(), 4).T.contiguous()


def _fields(contents: Contents) -> dict[str, Any]:
    """What both files say."""
    first, *others = (_of_layer(layer) for layer in contents.layers)
    cache = "FP8" if contents.caches else None
    has_blocks = any(layer.mixture and layer.weight.granularity == "per_block" for layer in contents.layers)
    if has_blocks or any(fields != first for fields in others):
        layers = {layer.name: _of_layer(layer) for layer in contents.layers}
        return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": cache, "quantized_layers": layers}
    return {"kv_cache_quant_algo": cache, **first}


def _of_layer(layer: Layer) -> dict[str, Any]:
    algorithm = _algorithm(layer.weight, layer.activation)
    fields: dict[str, Any] = {"quant_algo": algorithm}
    if layer.weight.group_size is not None:
        fields["group_size"] = layer.weight.group_size
    if algorithm == "W4A16_AWQ":  # scales of channels are folded into the layers ahead
        fields |= {"has_zero_point": False, "pre_quant_scale": False}
    return fields


def _producer() -> dict[str, str]:
    """Readers know the layout by this name; the version says who wrote it."""
    return {"name": "modelopt", "version": f"qcompiler {qcompiler.__version__}"}


def quantization_config(contents: Contents) -> dict[str, Any] | None:
    """What ``config.json`` says."""
    if not contents.layers:
        return None
    alike: dict[tuple[QuantSpec, QuantSpec | None], list[str]] = {}
    for layer in contents.layers:
        alike.setdefault((layer.weight, layer.activation), []).append(layer.name)
    groups = {}
    for index, ((weight, activation), names) in enumerate(alike.items()):
        group = {"targets": names if len(alike) > 1 else ["Linear"], "weights": _arguments(weight, is_input=False)}
        if activation is not None:
            group["input_activations"] = _arguments(activation, is_input=True)
        groups[f"group_{index}"] = group
    return {
        "quant_method": "modelopt",
        **_fields(contents),
        "ignore": contents.ignored,
        "config_groups": groups,
        "kv_cache_scheme": _CACHE if contents.caches else None,
        "producer": _producer(),
    }


def _arguments(spec: QuantSpec, *, is_input: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dynamic": spec.dynamic,
        "num_bits": spec.bits,
        "type": "float" if spec.is_float else "int",
    }
    if spec.group_size is not None:
        found["group_size"] = spec.group_size
    if spec.granularity in ("per_channel", "per_token"):
        found["strategy"] = "token" if is_input else "channel"
    return found


def extra_files(contents: Contents) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    if not contents.layers:
        return {}
    quantization = {**_fields(contents), "exclude_modules": contents.ignored}
    return {"hf_quant_config.json": {"producer": _producer(), "quantization": quantization}}


LAYOUT = Layout(
    supports=supports,
    add_layer=add_layer,
    quantization_config=quantization_config,
    add_caches=add_caches,
    extra_files=extra_files,
    check_layers=check_layers,
)
