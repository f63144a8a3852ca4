"""The reference arithmetic: schemes, rounding and its inverse, 4-bit floats, Hadamard matrices.

In: tensors and a `QuantSpec`. Out: codes, scales and what they stand for, as every target must reproduce them.
"""

from qcompiler.numerics.arithmetic import (
    dequantize,
    expand_groups,
    fake_quantize,
    gram_error,
    quantize,
    round_codes,
    round_scale,
    sqnr_db,
)
from qcompiler.numerics.hadamard import (
    block_order,
    factors_of,
    hadamard_matrix,
    multiply,
)
from qcompiler.numerics.packing import pack_bits, unpack_bits
from qcompiler.numerics.scales import gram_qparams, min_max_qparams, mse_qparams, range_qparams, scale_factor
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec

__all__ = [
    "QuantSpec",
    "Scheme",
    "block_order",
    "dequantize",
    "expand_groups",
    "factors_of",
    "fake_quantize",
    "gram_error",
    "gram_qparams",
    "hadamard_matrix",
    "min_max_qparams",
    "mse_qparams",
    "multiply",
    "pack_bits",
    "quantize",
    "range_qparams",
    "round_codes",
    "round_scale",
    "scale_factor",
    "sqnr_db",
    "unpack_bits",
]
