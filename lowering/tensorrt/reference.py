"""TensorRT's own operators, for `onnx.reference`: what ONNX Runtime has no kernel for is evaluated there."""

from typing import Any

import ml_dtypes
import numpy as np
from onnx.reference.op_run import OpRun

from qcompiler.lowering.tensorrt.dialect.floats4 import DOMAIN

__all__ = ["OPERATORS", "dynamic_quantize", "quantized_attention"]

_LARGEST_CODE, _LARGEST_SCALE, _SMALLEST_SCALE = 6.0, 448.0, 2.0**-9


def dynamic_quantize(x: Any, factor: Any, block: int) -> tuple[Any, Any]:
    """E2M1 codes of blocks of the last axis, and their E4M3 scales relative to a scale of the tensor."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    wanted = np.abs(blocks).max(-1) / np.float32(_LARGEST_CODE) / factor
    scales = np.clip(wanted, _SMALLEST_SCALE, _LARGEST_SCALE).astype(ml_dtypes.float8_e4m3fn)
    whole = (scales.astype(np.float32) * factor)[..., None]
    codes = np.clip(blocks / whole, -_LARGEST_CODE, _LARGEST_CODE).astype(ml_dtypes.float4_e2m1fn)
    return codes.reshape(x.shape), scales


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801 - it goes by the operator's name
    """`dynamic_quantize`."""

    op_domain = DOMAIN

    def _run(self, x: Any, factor: Any, axis: int, block_size: int, scale_type: int) -> tuple[Any, Any]:
        return dynamic_quantize(x, factor, block_size)


def quantized_attention(q: Any, k: Any, v: Any, mask: Any, weight_scale: Any, scale: float) -> Any:
    """Attention, in float32, whose softmax is rounded to E4M3 with a scale.

    Args:
        q: ``[B, H, S, D]``.
        k, v: ``[B, G, T, D]``, of groups of ``H / G`` heads.
        mask: is added to the logits; None for none.
        weight_scale: of the codes of the softmax.
        scale: of the logits.
    """
    queries, keys, values = (part.astype(np.float32) for part in (q, k, v))
    keys, values = (np.repeat(part, q.shape[1] // k.shape[1], axis=1) for part in (keys, values))
    logits = queries @ keys.swapaxes(-1, -2) * np.float32(scale)
    logits = logits if mask is None else logits + mask.astype(np.float32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True) / np.float32(weight_scale)
    rounded = weights.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(weight_scale)
    return (rounded @ values).astype(q.dtype)


class TRT_QuantizedAttention(OpRun):  # noqa: N801 - as above
    """`quantized_attention`."""

    op_domain = DOMAIN

    def _run(
        self,
        q: Any,
        k: Any,
        v: Any,
        mask: Any,
        weight_scale: Any,
        normalization_quantize_to_type: int,
        scale: float,
    ) -> tuple[Any]:
        return (quantized_attention(q, k, v, mask, weight_scale, scale),)


OPERATORS = (TRT_FP4DynamicQuantize, TRT_QuantizedAttention)
"""Classes that `onnx.reference.ReferenceEvaluator` takes as ``new_ops``."""
