"""Attention in 8-bit floats: codes of queries, keys, values and weights of the softmax into one kernel.

Keys and values are the codes of a cache with one calibrated scale each. Queries are rounded with the attention's scale
taken in and 1 for a scale of their own: E4M3 has the same relative error from 2^-6 to 448, wherever queries lie in
between, and nothing about them was calibrated. Weights of the softmax are at most 1, so that their scale is 1/448.

Source: TRT_QuantizedAttention of NVIDIA's ONNX parser (onnx-tensorrt, docs/TRT_custom_ops.md); the kernels were seen
with TensorRT for RTX 1.7: heads of up to 256 channels, a multiple of 8, more than one of them, and either one token at
once or at least 32 keys in all.
"""

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.ir import Graph, is_op
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument, tensor_arguments
from qcompiler.lowering.tensorrt.dialect.blocks import added_mask, float_attention, has_kernel
from qcompiler.lowering.tensorrt.dialect.floats4 import DOMAIN

__all__ = ["FLOAT8_ATTENTION_BUILDERS", "LEAST_KEYS", "float8_attentions", "has_float8_kernel"]

LEAST_KEYS = 32
"""Fewer keys are taken where there is one query alone."""

_canonical = torch.ops.qcompiler
_FLOAT, _FLOAT8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
_LARGEST = 448.0
_CHANNELS = 8


def has_float8_kernel(node: fx.Node) -> bool:
    """Whether a node is an attention of a shape that there are kernels for."""
    if not is_op(node, _canonical.attention.default) or argument(node, 7, "softcap") is not None:
        return False
    q, k, v = tensor_arguments(node, 3)
    heads, channels = q.meta["shape"][1], q.meta["shape"][-1]
    return has_kernel(q, k, v) and heads > 1 and channels % _CHANNELS == 0


def float8_attentions(graph: Graph) -> list[fx.Node]:
    """The attentions of a graph that are written so: of a shape that there are kernels for, on caches of FP8 codes."""
    return [node for node in graph.fx.nodes if _takes(node)]


def _takes(node: fx.Node) -> bool:
    return has_float8_kernel(node) and all(_is_float8(part) for part in tensor_arguments(node, 3)[1:])


def _is_float8(node: fx.Node) -> bool:
    """Whether a node gives E4M3 codes of a cache with one stored scale."""
    if not is_op(node, _canonical.dequantize.default):
        return False
    codes, scale = node.args[:2]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    return codes.meta["dtype"] == torch.float8_e4m3fn and scale.op == "get_attr" and not scale.meta["shape"]


def _attention(e: Emitter, node: fx.Node) -> ir.Value:
    if not _takes(node):
        return float_attention(e, node)
    q, k, v = tensor_arguments(node, 3)
    mask, scale, causal = node.args[3:6]
    assert isinstance(scale, float)
    queries = e.op("Mul", e.value(q, e.working), e.const(scale, e.working))
    one = e.const(1.0, e.working)
    codes = e.op("QuantizeLinear", queries, one, dtype=_FLOAT8, output_dtype=int(_FLOAT8))
    rounded = e.op("DequantizeLinear", codes, one, dtype=e.working)
    bias = added_mask(e, q, k, mask, causal=bool(causal), window=argument(node, 6, "window"), aligned_to_end=True)
    inputs = (rounded, e.value(k, e.working), e.value(v, e.working), bias, e.const(1 / _LARGEST, _FLOAT))
    name = f"{node.name}/Attention"
    kinds = {"normalization_quantize_to_type": int(_FLOAT8), "scale": 1.0}
    (result,) = e.ops("TRT_QuantizedAttention", *inputs, dtypes=(e.working,), name=name, domain=DOMAIN, **kinds)
    e.attentions[node.name] = [name]
    return result


FLOAT8_ATTENTION_BUILDERS: Builders = {_canonical.attention.default: _attention}
