"""Schemes: what a layer's weight and input are rounded to, and the grammar of their names."""

import re
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.errors import RecipeError, did_you_mean
from qcompiler.numerics.spec import (
    ACTIVATION_DTYPES,
    DEFAULT_GROUP,
    EXAMPLES,
    FP4,
    FP4_SCHEME,
    INT_BITS,
    KIND,
    Granularity,
    QuantSpec,
)

__all__ = ["Scheme"]

_SCHEME = re.compile(
    r"(w(?P<w>\d+)a(?P<a>4|8|16)|fp8)"
    r"(?P<options>(-(g\d+|channel|tensor|block|lut|sym|asym|actsym|actasym|dynamic|dyntensor|dyngroup|clip\d+|e5m2))*)"
)

_SHARED: dict[str, Granularity] = {"dynamic": "per_token", "dyngroup": "per_group"}
"""What elements of an activation share a scale, where not all of them do."""


@dataclass(frozen=True)
class Scheme:
    """What is quantized at one site: its weight and its input activation. ``None`` means left in float.

    Raises:
        RecipeError: for a format that weights or activations cannot take.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight.dynamic:
            raise RecipeError("weights have static ranges", got=self.weight, expected="per tensor, channel or group")
        spec = self.activation
        if spec is not None and spec.dtype not in ACTIVATION_DTYPES:
            raise RecipeError("no format for activations", got=spec.dtype, expected=", ".join(ACTIVATION_DTYPES))
        if spec is not None and spec.dtype == "int4" and not spec.dynamic:
            raise RecipeError(
                "four bits cannot cover a range that was chosen ahead", got=spec, expected="a dynamic range, per token"
            )
        if spec is not None and spec.is_fp4:
            if spec.dynamic is spec.has_factor:
                raise RecipeError(
                    "the factor of NVFP4 activations is calibrated, and MXFP4 has none",
                    got=spec,
                    expected="dynamic exactly where scales are float8_e8m0fnu",
                )
        elif spec is not None and spec.granularity not in ("per_tensor", "per_token") and not spec.dynamic:
            raise RecipeError(
                "activations share scales otherwise", got=spec, expected="per tensor or token, or dynamic groups"
            )

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        group_size: int | None = None,
        symmetric: bool | None = None,
        scale_dtype: str | None = None,
    ) -> "Scheme":
        """Reads a scheme name such as ``w4a16``, ``w3a16-channel``, ``w4a16-g128-asym``, ``w8a8`` or ``fp8-dynamic``.

        Of the weight: without a group in the name, ``group_size`` decides (``-1``: per channel); without that, up to
        four bits take groups of 128 and eight bits one scale per output channel. ``-lut`` takes a codebook per output
        channel instead, of two to four bits: ``w3a16-lut``.

        Of the activation: ``w8a8`` takes one calibrated range per tensor, with a zero point (``-actsym``: without);
        ``fp8`` the same without. ``-dynamic`` takes one range per token, symmetric, at run time; ``-dyntensor`` one per
        tensor, ``-dyngroup`` one per token and 128 channels. ``w4a4`` is always dynamic, per token where the name does
        not say. ``-clip90`` covers 90 percent of a dynamic range. ``fp8`` is E4M3 for weight and activation;
        ``fp8-e5m2`` E5M2; ``fp8-block`` takes weights in blocks of 128 by 128.

        ``nvfp4`` and ``mxfp4`` are 4-bit floats for weight and activation, ``nvfp4a16`` and ``mxfp4a16`` for the weight
        alone; groups and scales are those of the format. ``-floor`` (the default) and ``-ceil`` say how
        ``mxfp4`` takes exponents.

        Args:
            name: the scheme.
            group_size: of weights, where the name gives none.
            symmetric: of weights, where the name does not say.
            scale_dtype: of weights.

        Raises:
            RecipeError: for a name that is not a scheme, or one that says two things at once.
        """
        fp4 = FP4_SCHEME.fullmatch(str(name))
        if fp4 is not None and not (fp4["format"] == "nvfp4" and fp4["exponent"]):
            return cls._parse_fp4(fp4)
        match = _SCHEME.fullmatch(str(name))
        if match is None or (match["w"] is not None and f"int{match['w']}" not in INT_BITS):
            raise RecipeError(
                "unknown scheme",
                got=name,
                expected="w2a16, w3a16, w4a16 or w8a16, with -g<size>, -channel, -tensor, -sym or -asym behind it, "
                "or up to w4a16 with -lut (a codebook); "
                "w8a8, w4a8 or w4a4, with -dynamic, -dyntensor, -dyngroup, -actsym, -actasym or -clip<percent>; "
                "fp8, with -dynamic, -dyngroup, -block or -e5m2; nvfp4, nvfp4a16, mxfp4, mxfp4a16",
                remedy=did_you_mean(name, EXAMPLES),
            )
        options = match["options"].split("-")[1:]
        chosen: dict[str, str] = {}
        for option in options:
            kind = "clip" if option.startswith("clip") else KIND.get(option, "granularity")
            if kind in chosen:
                raise RecipeError("a scheme name that says two things at once", got=name)
            chosen[kind] = option
        is_float = match["w"] is None
        if match["a"] == "4":
            chosen.setdefault("dynamic", "dynamic")
        in_groups = chosen.get("dynamic") == "dyngroup"
        activation_kinds = {"activation sign", "dynamic", "clip"}.intersection(chosen)
        if (
            (match["a"] == "16" and activation_kinds)
            or (match["a"] == "4" and match["w"] == "8")
            or ("clip" in chosen and ("dynamic" not in chosen or in_groups))
            or (in_groups and (match["a"] == "4" or chosen.get("activation sign") == "actasym"))
            or (not is_float and "float" in chosen)
            or (chosen.get("granularity") == "lut" and (match["a"] != "16" or "sign" in chosen))
            or (is_float and {"sign", "activation sign"}.intersection(chosen))
        ):
            raise RecipeError("a scheme name with an option that has no meaning there", got=name)
        float_dtype = "float8_e5m2" if "float" in chosen else "float8_e4m3fn"
        dtype = float_dtype if is_float else f"int{match['w']}"
        granularity: Granularity = "per_channel" if dtype not in ("int2", "int3", "int4") else "per_group"
        size: int | None = DEFAULT_GROUP
        if group_size is not None:
            granularity, size = ("per_channel", None) if group_size == -1 else ("per_group", group_size)
        where = chosen.get("granularity")
        if where in ("channel", "tensor", "lut"):
            granularity = "per_tensor" if where == "tensor" else "per_channel"
        elif where == "block":
            granularity, size = "per_block", DEFAULT_GROUP
        elif where is not None:
            granularity, size = "per_group", int(where[1:])
        is_symmetric = True if symmetric is None else symmetric
        weight = QuantSpec(
            dtype=dtype,
            granularity=granularity,
            group_size=size if granularity in ("per_group", "per_block") else None,
            symmetric=chosen["sign"] == "sym" if "sign" in chosen else is_symmetric,
            scale_dtype=scale_dtype,
            codebook=where == "lut",
        )
        if match["a"] == "16":
            return cls(weight)
        dynamic = chosen.get("dynamic")
        shared: Granularity = _SHARED.get(dynamic or "", "per_tensor")
        sign = chosen.get("activation sign", "actsym" if is_float or shared != "per_tensor" else "actasym")
        activation = QuantSpec(
            dtype=dtype if is_float else f"int{match['a']}",
            granularity=shared,
            group_size=DEFAULT_GROUP if shared == "per_group" else None,
            symmetric=sign == "actsym",
            dynamic=dynamic is not None,
            clip=int(chosen["clip"].removeprefix("clip")) / 100 if "clip" in chosen else 1.0,
        )
        return cls(weight, activation)

    @classmethod
    def _parse_fp4(cls, match: re.Match[str]) -> "Scheme":
        is_nv = match["format"] == "nvfp4"
        weight = QuantSpec(
            dtype=FP4,
            group_size=16 if is_nv else 32,
            scale_dtype="float8_e4m3fn" if is_nv else "float8_e8m0fnu",
            exponent="ceil" if match["exponent"] == "ceil" else "floor",
        )
        return cls(weight) if match["weight_only"] else cls(weight, replace(weight, dynamic=not is_nv))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is `from_dict`."""
        return {
            "weight": None if self.weight is None else self.weight.to_dict(),
            "activation": None if self.activation is None else self.activation.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Scheme":
        """Rebuilds a scheme from `to_dict`; one written before there were activations in it has none."""
        weight, activation = fields["weight"], fields.get("activation")
        return cls(
            weight=None if weight is None else QuantSpec(**weight),
            activation=None if activation is None else QuantSpec(**activation),
        )

    def __str__(self) -> str:
        parts = [] if self.weight is None else [str(self.weight)]
        parts += [] if self.activation is None else [f"activation {self.activation}"]
        return ", ".join(parts) or "float"
