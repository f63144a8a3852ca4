"""The ONNX that TensorRT's builder fuses: its own forms of linear layers, attention, norms and caches."""

from qcompiler.ir import Graph
from qcompiler.lowering.onnx.dialect import WORKING, Dialect
from qcompiler.lowering.tensorrt.dialect.activations import ACTIVATION_BUILDERS, packed_ports
from qcompiler.lowering.tensorrt.dialect.blocks import BLOCK_BUILDERS
from qcompiler.lowering.tensorrt.dialect.experts import EXPERT_BUILDERS
from qcompiler.lowering.tensorrt.dialect.floats4 import DOMAIN, FLOAT4_BUILDERS
from qcompiler.lowering.tensorrt.dialect.linear import LINEAR_BUILDERS

__all__ = ["OPSET", "tensorrt_dialect"]

OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding."""


def tensorrt_dialect(graph: Graph, float_dtype: str) -> Dialect:
    """How a graph is written for TensorRT, in ``float16`` or ``float32``."""
    builders = {**ACTIVATION_BUILDERS, **BLOCK_BUILDERS, **EXPERT_BUILDERS, **FLOAT4_BUILDERS, **LINEAR_BUILDERS}
    return Dialect(OPSET, WORKING[float_dtype], builders=builders, domains={DOMAIN: 1}, ports=packed_ports(graph))
