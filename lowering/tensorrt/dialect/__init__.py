"""The ONNX that TensorRT's builder fuses: its own forms of linear layers, attention, norms and caches."""

from qcompiler.ir import Graph
from qcompiler.lowering.onnx.dialect import WORKING, Dialect
from qcompiler.lowering.tensorrt.dialect.activations import ACTIVATION_BUILDERS, packed_ports
from qcompiler.lowering.tensorrt.dialect.blocks import BLOCK_BUILDERS
from qcompiler.lowering.tensorrt.dialect.experts import EXPERT_BUILDERS
from qcompiler.lowering.tensorrt.dialect.float8_attention import (
    FLOAT8_ATTENTION_BUILDERS,
    LEAST_KEYS,
    float8_attentions,
    has_float8_kernel,
)
from qcompiler.lowering.tensorrt.dialect.floats4 import DOMAIN, FLOAT4_BUILDERS
from qcompiler.lowering.tensorrt.dialect.linear import LINEAR_BUILDERS

__all__ = ["LEAST_KEYS", "OPSET", "float8_attentions", "has_float8_kernel", "tensorrt_dialect"]

OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding."""


def tensorrt_dialect(graph: Graph, float_dtype: str, attention: str = "float") -> Dialect:
    """How a graph is written for TensorRT, in ``float16`` or ``float32``, attention in ``float`` or ``fp8``."""
    builders = {**ACTIVATION_BUILDERS, **BLOCK_BUILDERS, **EXPERT_BUILDERS, **FLOAT4_BUILDERS, **LINEAR_BUILDERS}
    if attention == "fp8":
        builders |= FLOAT8_ATTENTION_BUILDERS
    return Dialect(OPSET, WORKING[float_dtype], builders=builders, domains={DOMAIN: 1}, ports=packed_ports(graph))
