"""What the builder makes of a scheme, by compute capability: each answer was seen in the layers of an engine.

Source: TensorRT for RTX 1.7.1.116, ahead-of-time builds for SM 80, 86, 89 and 120.
"""

from collections.abc import Mapping

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Support

__all__ = ["check_float8_attention", "check_float8_caches", "equal_blocks", "support_of", "support_of_cache"]

_INT4_FROM, _FP8_FROM, _FP4_FROM = 80, 89, 120
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 8


def equal_blocks(width: int) -> int | None:
    """The blocks that one scale per channel is written as, since INT4 is fused in blocks smaller than the width alone.

    Returns:
        A power of two of at most 128 that divides ``width`` into two blocks or more; None if there is none.
    """
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK:
        if width % block == 0 and block < width:
            return block
        block //= 2
    return None


def support_of(scheme: Scheme, width: int, capability: int, float_dtype: str = "float16") -> Support:
    """What becomes of a linear layer of ``width`` input channels, multiplied in ``float_dtype`` where not in codes."""
    weight, activation = scheme.weight, scheme.activation
    for spec in (weight, activation):
        found = None if spec is None else _refused(spec, capability)
        if found is not None:
            return found
    if weight is None:
        return Support("fused") if activation is None else Support("runs", "float weights, inputs rounded in float")
    if activation is None:
        found = _weight(weight, width)
        if found.status == "fused" and weight.bits == 8 and not weight.is_float and float_dtype == "bfloat16":
            reason = "INT8 weights alone in bfloat16: those of layers that read one input are dequantized anew"
            return Support("runs", reason)
        return found
    return _both(weight, activation, width)


def support_of_cache(spec: CacheFormat, capability: int) -> Support:
    """What becomes of a key-value cache."""
    if spec.is_float and capability < _FP8_FROM:
        return Support("refused", f"FP8 needs SM {_FP8_FROM}", "choose an int8 cache (kv-int8)")
    kind = "FP8" if spec.is_float else "INT4" if spec.bits == 4 else "INT8"
    return Support("runs", f"{kind} at inputs and outputs, dequantized ahead of attention")


def check_float8_attention(float_dtype: str, capability: int) -> None:
    """Refuses attention in FP8 where there are no kernels for it.

    Raises:
        TargetError: that says why.
    """
    if capability < _FP8_FROM:
        raise TargetError(
            "this GPU has no attention in FP8",
            where="TensorRTTarget.attention",
            got=f"SM {capability}",
            expected=f"SM {_FP8_FROM} or above",
            remedy="leave attention=fp8 out",
        )
    if float_dtype == "float32":
        raise TargetError(
            "attention in FP8 gives 16 bits",
            where="TensorRTTarget.attention",
            got="float=float32",
            remedy="leave out float=float32, or attention=fp8",
        )


def check_float8_caches(formats: Mapping[str, CacheFormat | None]) -> None:
    """Refuses attention in FP8 on caches that are not FP8 codes with one calibrated scale each.

    Raises:
        TargetError: that names the first, or says that there are none.
    """
    remedy = "add kv-fp8-static to the recipe, or leave attention=fp8 out"
    expected = "FP8 codes with one calibrated scale for the keys and one for the values of a layer"
    if not formats:
        raise TargetError("attention in FP8 reads a cache, and this model has none", remedy="leave attention=fp8 out")
    for name, spec in formats.items():
        if spec is None or not spec.is_float or spec.scales != "static" or spec.per_head:
            got = "floats" if spec is None else str(spec)
            raise TargetError(
                "attention in FP8 cannot read this cache", where=name, got=got, expected=expected, remedy=remedy
            )


def _refused(spec: QuantSpec, capability: int) -> Support | None:
    if spec.codebook:
        return Support(
            "refused",
            "codebooks: the builder makes four bytes of each code, and no kernel",
            "choose w4a16, or the targets kernels and onnx",
        )
    if spec.dtype == "float8_e5m2":
        return Support("refused", "TensorRT has no E5M2 floats", "choose E4M3")
    if spec.is_fp4:
        needs, kind, remedy = _FP4_FROM, "4-bit floats need", "choose w4a16, or sm=120"
    elif spec.is_float:
        needs, kind, remedy = _FP8_FROM, "FP8 needs", "choose w8a8 or w8a16, or sm=89"
    elif spec.bits < 8:
        needs, kind, remedy = _INT4_FROM, "INT4 needs", "choose w8a16, or sm=80"
    else:
        return None
    return None if capability >= needs else Support("refused", f"{kind} SM {needs}", remedy)


def _weight(spec: QuantSpec, width: int) -> Support:
    if spec.is_fp4:
        return Support("runs", "4-bit float weights alone: dequantized anew in every run")
    is_grouped = spec.group_size is not None and spec.group_size < width
    if spec.bits == 8:
        if is_grouped:
            kind = "FP8" if spec.is_float else "INT8"
            return Support(
                "runs", f"{kind} weights in groups: dequantized anew in every run; by channel they are fused"
            )
        return Support("fused")
    if is_grouped:
        assert spec.group_size is not None
        if width % spec.group_size:
            return Support(
                "refused", f"groups of {spec.group_size} do not divide {width} channels", "choose a size that does"
            )
    elif equal_blocks(width) is None:
        return Support("runs", f"one scale for {width} channels, which no equal blocks divide: dequantized anew")
    return Support("fused", _widened(spec))


def _both(weight: QuantSpec, activation: QuantSpec, width: int) -> Support:
    if weight.is_fp4 or activation.is_fp4:
        if _is_nvfp4(weight) and _is_nvfp4(activation):
            return Support("fused")
        return Support("runs", "no product of these 4-bit floats: dequantized anew, inputs rounded in float")
    if activation.granularity == "per_group" and width % activation.group_of(width):
        return Support(
            "refused",
            f"inputs in groups of {activation.group_size}, which do not divide {width} channels",
            "choose ranges per token (-dynamic)",
        )
    alone = _weight(weight, width)
    if alone.status == "refused":
        return alone
    is_grouped = weight.group_size is not None and weight.group_size < width
    one_kind = weight.bits == activation.bits == 8 and weight.is_float == activation.is_float
    if one_kind and not is_grouped and weight.symmetric and activation.granularity != "per_group":
        return Support("fused")
    reason = "inputs are rounded, the product is one of floats"
    return Support(alone.status, f"{alone.reason}; {reason}" if alone.reason else reason)


def _is_nvfp4(spec: QuantSpec) -> bool:
    return spec.is_fp4 and spec.group_size == 16


def _widened(spec: QuantSpec) -> str:
    return f"{spec.bits}-bit codes are stored in 4 bits: exact, but larger than they need be" if spec.bits < 4 else ""
