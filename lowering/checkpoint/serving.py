"""Which engines take a checkpoint, by its layout and the formats of its layers, and the commands that serve it.

Source: what the engines say they load: vLLM 0.32, SGLang 0.5.23, TensorRT-LLM 1.2 (``QuantAlgo``, and its reader of
compressed-tensors), llama.cpp.
"""

from collections.abc import Sequence

from qcompiler.lowering.checkpoint.layers import Layer

__all__ = ["serving_commands"]


def serving_commands(layout: str, layers: Sequence[Layer], *, is_fused: bool) -> dict[str, str]:
    """The command of each engine that loads a checkpoint in the directory ``PATH``, by the engine's name.

    Args:
        layout: as the target's option ``format`` has it.
        layers: those that are quantized.
        is_fused: whether an engine has kernels for all of them.
    """
    if not is_fused:
        return {}
    if layout == "gguf":
        return {"llama.cpp": "llama-server -m PATH/model.gguf"}
    has_many_forms = layout == "compressed-tensors"
    found = {}
    if layout != "modelopt" or all(layer.weight.is_float for layer in layers):
        found["vLLM"] = "vllm serve PATH"
        if not has_many_forms or all(map(_sglang_takes, layers)):
            found["SGLang"] = "python -m sglang.launch_server --model-path PATH"
    if not has_many_forms or all(map(_tensorrt_llm_takes, layers)):
        found["TensorRT-LLM"] = "trtllm-serve PATH"
    return found


def _sglang_takes(layer: Layer) -> bool:
    """Of compressed-tensors: integers of 4 and 8 bits, 8-bit floats, and NVFP4."""
    weight = layer.weight
    return weight.has_factor if weight.is_fp4 else weight.bits in (4, 8)


def _tensorrt_llm_takes(layer: Layer) -> bool:
    """Of compressed-tensors: 8-bit floats with a scale per channel and token, NVFP4, weights in MXFP4."""
    weight, activation = layer.weight, layer.activation
    if weight.is_fp4:
        return weight.has_factor is (activation is not None)
    is_per_channel = weight.is_float and weight.granularity == "per_channel"
    return is_per_channel and activation is not None and activation.granularity == "per_token"
