"""How a tensor is quantized (`QuantSpec`) and what is quantized at one linear layer (`Scheme`)."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from qcompiler.errors import RecipeError

__all__ = [
    "ACTIVATION_DTYPES",
    "DEFAULT_GROUP",
    "EXAMPLES",
    "FP4",
    "FP4_SCHEME",
    "INT_BITS",
    "KIND",
    "Granularity",
    "QuantSpec",
]

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_block", "per_token"]

INT_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}
FP4 = "float4_e2m1"
_FLOAT_MAX = {"float8_e4m3fn": 448, "float8_e5m2": 57344, FP4: 6}
_DTYPES = (*INT_BITS, *_FLOAT_MAX)
_CODEBOOK_DTYPES = ("int2", "int3", "int4")
ACTIVATION_DTYPES = ("int8", "int4", *_FLOAT_MAX)
_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FP4_SCALE_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.float8_e8m0fnu}
DEFAULT_GROUP = 128
FP4_SCHEME = re.compile(r"(?P<format>nvfp4|mxfp4)(?P<weight_only>a16)?(-(?P<exponent>floor|ceil))?")
EXAMPLES = (
    *("w2a16", "w3a16", "w4a16", "w8a16", "w4a16-channel", "w3a16-lut", "w4a16-lut", "w8a8", "w8a8-dynamic"),
    *("w4a8-dynamic", "w4a4", "fp8", "fp8-dynamic", "fp8-block", "fp8-e5m2", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16"),
)
"""Names to compare a misspelt one with."""
KIND = {
    "channel": "granularity",
    "tensor": "granularity",
    "block": "granularity",
    "sym": "sign",
    "asym": "sign",
    "actsym": "activation sign",
}
KIND |= {"actasym": "activation sign", "e5m2": "float"}
KIND |= dict.fromkeys(("dynamic", "dyntensor", "dyngroup"), "dynamic")


@dataclass(frozen=True)
class QuantSpec:
    """The number format of one quantized tensor.

    Attributes:
        dtype: ``int2``, ``int3``, ``int4``, ``int8``, ``float8_e4m3fn`` or ``float8_e5m2`` (arXiv 2209.05433), or
            ``float4_e2m1`` (`qcompiler.numerics.fp4`).
            Symmetric integer codes are signed, in ``[-2^(b-1), 2^(b-1) - 1]``; asymmetric ones are unsigned, in ``[0,
            2^b - 1]``, with a zero point of the same type. Float codes are symmetric; what lies beyond the largest
            finite one (448, 57344, 6) is clamped to it.
        granularity: how many elements share a scale. ``per_group`` groups run along the last axis (a linear layer's
            input channels); the last group is short where the size does not divide the width. ``per_block`` is for
            8-bit float weights: squares of ``group_size`` rows and columns, those at the end smaller. ``per_token`` is
            for activations: one scale per slice of the last axis, and always dynamic. Activations in groups have one
            scale per token and group; they are symmetric, of eight bits, and dynamic as well.
        group_size: elements per group, or along a side of a block; given exactly when there are groups or blocks.
        symmetric: no zero point.
        scale_dtype: the dtype scales are stored in (``float32``, ``float16`` or ``bfloat16``); ``None`` means the dtype
            of the tensor that is quantized (float32 in blocks). Scales are rounded to it *before* codes are computed.
            4-bit floats have scales per group, in ``float8_e4m3fn`` with a float32 factor per tensor (NVFP4) or in
            ``float8_e8m0fnu`` (MXFP4).
        dynamic: for activations: the range is taken from the values themselves at run time; nothing is calibrated.
            (In NVFP4 the scales of groups always are, and the factor is calibrated: it is not dynamic.)
        exponent: how E8M0 scales are chosen: ``floor``, the rule of the OCP specification, or ``ceil``, the smallest
            power of two at which nothing is clamped (`fp4.block_scale`).
        clip: of a dynamic range: the share of it that codes cover, in (0, 1]; values beyond are clamped.
        codebook: codes are places in a table of ``2^b`` values that every output channel has of its own, instead of
            steps of a grid; two to four bits. The table, and values kept apart from it, are stored in ``scale_dtype``.

    Raises:
        RecipeError: for a combination that means nothing.
    """

    dtype: str = "int4"
    granularity: Granularity = "per_group"
    group_size: int | None = DEFAULT_GROUP
    symmetric: bool = True
    scale_dtype: str | None = None
    dynamic: bool = False
    codebook: bool = False
    clip: float = 1.0
    exponent: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise RecipeError("unknown quantized dtype", got=self.dtype, expected=", ".join(_DTYPES))
        if self.granularity not in get_args(Granularity):
            raise RecipeError("unknown granularity", got=self.granularity, expected=", ".join(get_args(Granularity)))
        if self.is_float and not self.symmetric:
            raise RecipeError("float codes have no zero point", got=f"{self.dtype}, asymmetric", expected="symmetric")
        if self.granularity == "per_block" and (not self.is_float or self.is_fp4):
            raise RecipeError("blocks are for 8-bit floats", got=self.dtype, expected="float8_e4m3fn or float8_e5m2")
        if (self.group_size is not None) != (self.granularity in ("per_group", "per_block")):
            raise RecipeError(
                "group_size goes with granularity per_group or per_block, and only with them",
                got=f"granularity={self.granularity}, group_size={self.group_size}",
            )
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError("group_size must be positive", got=self.group_size, expected="16, 32, 64, 128, ...")
        if self.exponent not in ("floor", "ceil"):
            raise RecipeError("unknown rule for exponents", got=self.exponent, expected="floor or ceil")
        if self.is_fp4:
            if self.granularity != "per_group" or self.scale_dtype not in _FP4_SCALE_DTYPES:
                raise RecipeError(
                    "4-bit floats have one scale per group, in eight bits",
                    got=f"{self.granularity}, scale_dtype={self.scale_dtype}",
                    expected="per_group, " + " or ".join(_FP4_SCALE_DTYPES),
                )
        elif self.scale_dtype is not None and self.scale_dtype not in _SCALE_DTYPES:
            raise RecipeError("unknown scale dtype", got=self.scale_dtype, expected=", ".join(_SCALE_DTYPES))
        if self.codebook and (self.dtype not in _CODEBOOK_DTYPES or self.granularity != "per_channel"):
            raise RecipeError(
                "a codebook has two to four bits, and one table per output channel",
                got=f"{self.dtype} {self.granularity}",
                expected=", ".join(f"{dtype} per_channel" for dtype in _CODEBOOK_DTYPES),
            )
        if self.codebook and not self.symmetric:
            raise RecipeError("a codebook has no zero point", got=f"{self.dtype}, asymmetric", expected="symmetric")
        if self.granularity == "per_token":
            object.__setattr__(self, "dynamic", True)
        if not 0 < self.clip <= 1 or (self.clip != 1 and not self.dynamic):
            raise RecipeError("a dynamic range is clipped to a share of it", got=self.clip, expected="in (0, 1]")
        is_plain_group = self.granularity == "per_group" and self.bits == 8 and self.symmetric and self.clip == 1
        if self.dynamic and self.granularity not in ("per_token", "per_tensor") and not (self.is_fp4 or is_plain_group):
            raise RecipeError(
                "dynamic ranges are per tensor or per token, or per group of symmetric codes of eight bits",
                got=self,
                expected="per_tensor or per_token",
            )

    @property
    def is_float(self) -> bool:
        """Whether codes are floating point numbers."""
        return self.dtype in _FLOAT_MAX

    @property
    def is_fp4(self) -> bool:
        """Whether codes are floating point numbers of four bits."""
        return self.dtype == FP4

    @property
    def has_factor(self) -> bool:
        """Whether scales are relative to a factor of the whole tensor (NVFP4)."""
        return self.is_fp4 and self.scale_dtype == "float8_e4m3fn"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 4 if self.is_fp4 else 8 if self.is_float else INT_BITS[self.dtype]

    @property
    def quant_min(self) -> int:
        """Smallest code, inclusive; a codebook's codes are no steps of a grid.

        Raises:
            RecipeError: for a codebook.
        """
        self._require_grid()
        if self.is_float:
            return -_FLOAT_MAX[self.dtype]
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """Largest code, inclusive; as `quant_min`."""
        self._require_grid()
        if self.is_float:
            return _FLOAT_MAX[self.dtype]
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def _require_grid(self) -> None:
        if self.codebook:
            raise RecipeError(
                "this format has a codebook, and the pass at work rounds to a grid of even steps",
                got=self,
                expected="a scheme without -lut",
                remedy="use SqueezeLLM(), or another scheme",
            )

    @property
    def code_dtype(self) -> torch.dtype:
        """The torch dtype that holds unpacked codes, one per element."""
        if self.is_fp4:
            return torch.uint8
        if self.is_float:
            found: torch.dtype = getattr(torch, self.dtype)
            return found
        return torch.int8 if self.symmetric and not self.codebook else torch.uint8

    @property
    def stored_dtype(self) -> str:
        """The dtype of codes and zero points in a weight store: ``int4``, ``uint4``, ``float8_e4m3fn``, ..."""
        if self.is_fp4:
            return "uint4"
        is_signed = self.symmetric and not self.codebook
        return self.dtype if self.is_float or is_signed else f"u{self.dtype}"

    def narrow_bits(self) -> tuple[int, ...]:
        """What ``quantize`` is told besides the dtype that holds the codes: their bits, where that has more."""
        return (self.bits,) if self.bits < 8 else ()

    def range_options(self, width: int) -> tuple[Any, ...]:
        """What ``choose_qparams`` is told of an activation of ``width`` channels besides the values themselves.

        Dtype and axis; bits and the share that is covered, where not all; and the block, where there are groups.
        """
        if self.granularity == "per_group":
            return (self.code_dtype, -1, self.bits, self.clip, self.group_of(width))
        along = -1 if self.granularity == "per_token" else None
        return (self.code_dtype, along, *((self.bits, self.clip) if self.clip != 1 else self.narrow_bits()))

    def input_place(self, width: int) -> tuple[int, int]:
        """Axis and block of an activation of ``width`` channels, as ``quantize`` and ``dequantize`` take them."""
        if self.granularity == "per_tensor":
            return 0, 0
        return -1, width if self.granularity == "per_token" else self.group_of(width)

    def scale_torch_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype scales are stored in, for a tensor of ``weight_dtype`` (one that is no scale dtype: float32)."""
        if self.is_fp4:
            return _FP4_SCALE_DTYPES[str(self.scale_dtype)]
        if self.scale_dtype is not None:
            return _SCALE_DTYPES[self.scale_dtype]
        if self.granularity == "per_block":
            return torch.float32
        return weight_dtype if weight_dtype in _SCALE_DTYPES.values() else torch.float32

    def place(self, width: int) -> tuple[int, int]:
        """Axis and block of a weight of ``width`` input channels, as ``dequantize`` takes them."""
        if self.granularity == "per_block":
            return 1, self.group_size or 0
        return (1, self.group_of(width)) if self.granularity == "per_group" else (0, 0)

    def group_of(self, width: int) -> int:
        """Elements along the last axis (of length ``width``) that share one scale."""
        return min(self.group_size, width) if self.group_size is not None else width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is ``QuantSpec(**d)``."""
        return {
            "dtype": self.dtype,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_dtype": self.scale_dtype,
            "dynamic": self.dynamic,
            "codebook": self.codebook,
            "clip": self.clip,
            "exponent": self.exponent,
        }

    def __str__(self) -> str:
        if self.codebook:
            return f"{self.dtype} codebook {self.granularity}"
        where = f"g{self.group_size}" if self.granularity == "per_group" else self.granularity
        if self.granularity == "per_block":
            where = f"{self.group_size}x{self.group_size} blocks"
        sign = "" if self.is_float else " symmetric" if self.symmetric else " asymmetric"
        if self.is_fp4:
            scales = "E4M3 scales" if self.has_factor else f"E8M0 scales ({self.exponent})"
            return f"{self.dtype} {where} {scales}{' dynamic' if self.dynamic else ''}"
        clip = f" clipped to {self.clip:g}" if self.clip != 1 else ""
        return f"{self.dtype} {where}{sign}{' dynamic' if self.dynamic else ''}{clip}"
