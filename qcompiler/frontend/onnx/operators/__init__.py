"""ONNX operators as torch operators, a small function each; by domain and name."""

from qcompiler.frontend.onnx.call import Operators
from qcompiler.frontend.onnx.operators.attention import ATTENTION, CONTRIB_ATTENTION
from qcompiler.frontend.onnx.operators.convolutions import CONVOLUTIONS
from qcompiler.frontend.onnx.operators.elementwise import CONTRIB_ELEMENTWISE, ELEMENTWISE
from qcompiler.frontend.onnx.operators.norms import CONTRIB_NORMS, NORMS
from qcompiler.frontend.onnx.operators.places import PLACES
from qcompiler.frontend.onnx.operators.products import CONTRIB_PRODUCTS, PRODUCTS
from qcompiler.frontend.onnx.operators.quantized import CONTRIB_QUANTIZED, QUANTIZED
from qcompiler.frontend.onnx.operators.reductions import REDUCTIONS
from qcompiler.frontend.onnx.operators.shapes import SHAPES

__all__ = ["OPERATORS"]

OPERATORS: dict[str, Operators] = {
    "": {
        **ELEMENTWISE,
        **SHAPES,
        **PLACES,
        **REDUCTIONS,
        **PRODUCTS,
        **CONVOLUTIONS,
        **NORMS,
        **ATTENTION,
        **QUANTIZED,
        # ONNX Runtime takes these in the standard domain, too, and exporters put them there
        "SimplifiedLayerNormalization": CONTRIB_NORMS["SimplifiedLayerNormalization"],
    },
    "com.microsoft": {
        **CONTRIB_ELEMENTWISE,
        **CONTRIB_NORMS,
        **CONTRIB_PRODUCTS,
        **CONTRIB_ATTENTION,
        **CONTRIB_QUANTIZED,
    },
}
