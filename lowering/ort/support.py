"""What ONNX Runtime's own operators make of a scheme, a cache or a table, said before anything is calibrated.

Source: the schemas and kernels of ONNX Runtime 1.32 on a CPU, which were run.
"""

from qcompiler.ir import CacheFormat
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Support

__all__ = ["block_of", "is_of_own_cache", "stored_bits", "support_of", "support_of_cache", "support_of_table"]

_STORED = {2: 2, 3: 4, 4: 4, 8: 8}
_SMALLEST, _LARGEST = 16, 256
_WHOLE_ROW = 128


def stored_bits(dtype: str) -> int | None:
    """Bits that integer codes take in a product's weight; None for others."""
    digits = dtype.removeprefix("u").removeprefix("int")
    return _STORED.get(int(digits)) if digits.isdecimal() else None


def block_of(group: int | None, width: int) -> int | None:
    """The channels that share a scale in what is written: a power of two from 16 to 256 that divides ``group``.

    One scale for all of a row becomes equal blocks, of 128 channels where the row has as many. None where no such power
    divides the group.
    """
    if group is None or group >= width:
        block = _WHOLE_ROW
        while block >= 2 * _SMALLEST and block // 2 >= width:
            block //= 2
        return block
    block = min(group & -group, _LARGEST)
    return block if block >= _SMALLEST else None


def support_of(scheme: Scheme, width: int, float_dtype: str) -> Support:
    """What becomes of a linear layer of ``width`` input channels."""
    weight = scheme.weight
    portable = OnnxTarget(23, "float16" if float_dtype == "float16" else "float32").supports(scheme, width)
    if weight is None or scheme.activation is not None or portable.status == "refused":
        return portable
    if weight.codebook or weight.is_float or weight.is_fp4:
        return portable
    if stored_bits(weight.dtype) is None or block_of(weight.group_size, width) is None:
        return portable
    widened = weight.bits == 3
    return Support("fused", "3-bit codes are stored in 4 bits: exact, but larger than they need be" if widened else "")


def is_of_own_cache(spec: CacheFormat) -> bool:
    """Whether attention itself reads and writes codes of this format."""
    return spec.scales == "static" and spec.symmetric and not spec.is_float


def support_of_cache(spec: CacheFormat) -> Support:
    """What becomes of a key-value cache."""
    if is_of_own_cache(spec):
        return Support("fused")
    support = OnnxTarget().supports_cache(spec)
    reason = f"{support.reason}; GroupQueryAttention takes int8 and int4 of calibrated scales, without zero points"
    return Support(support.status, f"{reason} (kv-int8-static, kv-int4-static), and onnxruntime-genai no others")


def support_of_table(spec: QuantSpec, width: int) -> Support:
    """What becomes of an embedding table."""
    if spec.is_float or spec.is_fp4 or stored_bits(spec.dtype) not in (4, 8):
        return Support("refused", "tables of integers of 3, 4 or 8 bits alone")
    if block_of(spec.group_size, width) is None:
        return Support("refused", f"groups of {spec.group_size}: a power of two from {_SMALLEST} on has to divide them")
    return Support("fused")
