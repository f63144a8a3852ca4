"""`Dialect`: the ONNX that one engine reads best; the same graph, written with other operators."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.lowering.onnx.builders.caches import CACHE_BUILDERS
from qcompiler.lowering.onnx.builders.canonical import CANONICAL_BUILDERS
from qcompiler.lowering.onnx.builders.codebooks import CODEBOOK_BUILDERS
from qcompiler.lowering.onnx.builders.convolutions import CONVOLUTION_BUILDERS
from qcompiler.lowering.onnx.builders.elementwise import ELEMENTWISE_BUILDERS
from qcompiler.lowering.onnx.builders.experts import EXPERT_BUILDERS
from qcompiler.lowering.onnx.builders.products import PRODUCT_BUILDERS
from qcompiler.lowering.onnx.builders.shapes import SHAPE_BUILDERS
from qcompiler.lowering.onnx.emitter import Builders, Ports
from qcompiler.lowering.onnx.target import OPSETS, OnnxTarget

__all__ = ["BUILDERS", "WORKING", "Dialect", "portable"]

BUILDERS: Builders = {
    **CANONICAL_BUILDERS,
    **CACHE_BUILDERS,
    **CODEBOOK_BUILDERS,
    **CONVOLUTION_BUILDERS,
    **EXPERT_BUILDERS,
    **ELEMENTWISE_BUILDERS,
    **PRODUCT_BUILDERS,
    **SHAPE_BUILDERS,
}
"""By operator: its portable form."""

WORKING = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Dialect:
    """How a graph is written.

    Attributes:
        opset: the ONNX operator set.
        working: the dtype of weights and activations.
        unsigned_products: whether int8 weights are stored as uint8 where ONNX Runtime makes an integer product of them.
        builders: by operator, what differs from the portable form.
        domains: further operator sets, by domain.
        ports: dtype and shape of inputs and outputs, by name, where not as their own.
    """

    opset: int
    working: ir.DataType
    unsigned_products: bool = False
    builders: Builders = field(default_factory=dict)
    domains: Mapping[str, int] = field(default_factory=dict)
    ports: Ports = field(default_factory=dict)

    @property
    def ir_version(self) -> int:
        """The ONNX IR version that goes with the operator set."""
        return OPSETS[self.opset]


def portable(target: OnnxTarget) -> Dialect:
    """Standard operators that every runtime has, in the forms that ONNX Runtime fuses."""
    return Dialect(target.opset, WORKING[target.float_dtype], unsigned_products=target.int8_weights == "uint8")
