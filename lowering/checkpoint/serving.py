"""Which engines take a checkpoint, by its layout and the formats of its layers, and the commands that serve it.

Source: what the engines say they load: vLLM 0.32, SGLang 0.5.23, TensorRT-LLM 1.2 (``QuantAlgo``, and its reader of
compressed-tensors), llama.cpp.
"""

from collections.abc import Sequence

from qcompiler.lowering.checkpoint.layers import Layer
from qcompiler.numerics import QuantSpec

__all__ = ["are_experts_run", "serving_commands"]


def serving_commands(layout: str, layers: Sequence[Layer], *, is_fused: bool) -> dict[str, str]:
    """The command of each engine that loads a checkpoint in the directory ``PATH``, by the engine's name.

    Args:
        layout: as the target's option ``format`` has it.
        layers: those that are quantized.
        is_fused: whether an engine has kernels for all of them.
    """
    if not is_fused or not are_experts_run(layout, layers):
        return {}
    if layout == "gguf":
        return {"llama.cpp": "llama-server -m PATH/model.gguf"}
    if any(layer.is_table for layer in layers):
        return {"vLLM": "vllm serve PATH"}
    has_many_forms = layout == "compressed-tensors"
    found = {}
    if layout != "modelopt" or all(layer.weight.is_float for layer in layers):
        found["vLLM"] = "vllm serve PATH"
        if not has_many_forms or all(map(_sglang_takes, layers)):
            found["SGLang"] = "python -m sglang.launch_server --model-path PATH"
    if not has_many_forms or all(map(_tensorrt_llm_takes, layers)):
        found["TensorRT-LLM"] = "trtllm-serve PATH"
    return found


def are_experts_run(layout: str, layers: Sequence[Layer]) -> bool:
    """Whether vLLM has a kernel for mixtures of experts in the formats of those that are quantized."""
    return all(_runs_expert(layout, layer.weight, layer.activation) for layer in layers if layer.mixture)


def _runs_expert(layout: str, weight: QuantSpec, activation: QuantSpec | None) -> bool:
    if weight.is_fp4:
        return True
    if layout == "modelopt":
        return weight.is_float and weight.granularity in ("per_tensor", "per_block")
    if layout == "awq":
        return weight.granularity == "per_group"
    if layout == "compressed-tensors" and (weight.is_float or activation is not None):
        return activation is not None and (weight.is_float or activation.granularity == "per_token")
    return True


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
