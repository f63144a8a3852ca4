"""What compressed-tensors says of a layer: its group in ``config_groups``, and the formats of weight and input."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.checkpoints.contents import CHECK_SETTINGS, USE_ORIGINAL, names_in
from qcompiler.numerics import QuantSpec

__all__ = ["MXFP8", "Arguments", "Group", "activation_spec", "group_of", "is_ignored", "read_groups", "weight_spec"]

_KEYS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
MXFP8 = "mxfp8-quantized"
"""The layout whose scales are powers of two, of weights and of inputs."""
_MX_GROUP = 32
_FP4_GROUPS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
_HELD_BITS = (2, 3, 4, 8)  # integers that codes have types for


@dataclass(frozen=True)
class Arguments:
    """What is said of the codes of one tensor.

    Attributes:
        bits: of a code.
        is_float: whether codes are floating point numbers.
        symmetric: no zero point.
        strategy: ``tensor``, ``channel``, ``group``, ``block``, ``token``, ``tensor_group`` or ``attn_head``.
        group_size: of the last axis; None without groups.
        block: rows and columns of a block; None without blocks.
        dynamic: False, True, or ``local``: of groups, but relative to a stored scale.
    """

    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool | str

    @classmethod
    def read(cls, fields: object, where: str) -> "Arguments":
        """Raises:
        InputError: for settings that contradict themselves.
        UnsupportedModelError: for a key or a value that is not known, and may change what codes mean.
        """
        if not isinstance(fields, Mapping):
            raise InputError("the format of a tensor is an object", where=where, got=fields, remedy=CHECK_SETTINGS)
        if unknown := sorted(set(map(str, fields)) - _KEYS):
            raise UnsupportedModelError(
                "the format of a tensor has a key that is not known: a newer version wrote it",
                where=where,
                got=unknown[0],
                expected=", ".join(sorted(_KEYS)),
                remedy=USE_ORIGINAL,
            )
        bits, kind, size = fields.get("num_bits", 8), fields.get("type", "int"), fields.get("group_size")
        strategy = fields.get("strategy")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        block = fields.get("block_structure")
        if isinstance(block, str):  # an older spelling: 128x128
            block = [int(side) for side in block.split("x") if side.isdigit()]
        problems = [
            ("num_bits", bits, type(bits) is int and 2 <= bits <= 8),
            ("type", kind, kind in ("int", "float")),
            ("strategy", strategy, strategy in _STRATEGIES),
            ("group_size", size, size is None or (type(size) is int and (size > 0 or size == -1))),
            ("group_size", size, strategy not in ("group", "tensor_group") or (size or 0) > 0),
            ("block_structure", block, strategy != "block" or (isinstance(block, list) and len(block) == 2)),
            ("dynamic", fields.get("dynamic"), fields.get("dynamic", False) in (True, False, "local")),
        ]
        for key, value, is_known in problems:
            if not is_known:
                raise UnsupportedModelError(
                    "the format of a tensor is not read", where=f"{where}: {key}", got=value, remedy=USE_ORIGINAL
                )
        return cls(
            bits,
            kind == "float",
            bool(fields.get("symmetric", True)),
            strategy,
            size if strategy in ("group", "tensor_group") else None,
            (block[0], block[1]) if strategy == "block" and block else None,
            fields.get("dynamic", False),
        )

    def __str__(self) -> str:
        kind = "float" if self.is_float else "int"
        return f"{kind}{self.bits} {self.strategy}{' dynamic' if self.dynamic else ''}"


@dataclass(frozen=True)
class Group:
    """One of ``config_groups``.

    Attributes:
        targets: names, patterns and classes of layers.
        layout: the name of the compressor.
        weight: of the weight.
        activation: of the input; None where it stays float.
    """

    targets: tuple[str, ...]
    layout: str
    weight: Arguments
    activation: Arguments | None


def read_groups(settings: Mapping[str, Any], where: str) -> list[Group]:
    """Reads ``config_groups``.

    Raises:
        InputError, UnsupportedModelError: see `Arguments.read`.
    """
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(
            "config_groups is an object", where=where, got=groups, expected="formats by name", remedy=CHECK_SETTINGS
        )
    found = []
    for name, fields in groups.items():
        place = f"{where}: config_groups.{name}"
        if not isinstance(fields, Mapping) or not names_in(fields, "targets", place):
            raise UnsupportedModelError(
                "a group of layers is not spelled out",
                where=place,
                got=fields,
                expected="an object with targets",
                remedy=USE_ORIGINAL,
            )
        if fields.get("output_activations") is not None:
            raise UnsupportedModelError(
                "rounded outputs of layers are not read",
                where=place,
                got=fields["output_activations"],
                remedy=USE_ORIGINAL,
            )
        if fields.get("weights") is None:
            raise UnsupportedModelError(
                "rounded inputs of float weights are not read", where=place, remedy=USE_ORIGINAL
            )
        layout, activation = fields.get("format") or settings.get("format"), fields.get("input_activations")
        found.append(
            Group(
                tuple(fields["targets"]),
                str(layout),
                Arguments.read(fields["weights"], f"{place}.weights"),
                None if activation is None else Arguments.read(activation, f"{place}.input_activations"),
            )
        )
    return found


def group_of(module: str, groups: Sequence[Group], where: str) -> Group | None:
    """The group of a layer: one that names it, else one whose pattern fits, else that of its class.

    What is of the class of embeddings is known by names alone, and where no group is of linear layers.
    """
    tests = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and _fits(target, module, where),
        lambda target: target == "Linear",
        lambda target: target == "Embedding",
    )
    return next((group for test in tests for group in groups if any(test(target) for target in group.targets)), None)


def is_ignored(module: str, settings: Mapping[str, Any], where: str) -> bool:
    """Whether the settings leave a layer in float."""
    patterns = names_in(settings, "ignore", where)
    return any(
        pattern == module or (pattern.startswith("re:") and _fits(pattern, module, where)) for pattern in patterns
    )


def _fits(pattern: str, module: str, where: str) -> bool:
    try:
        return re.match(pattern.removeprefix("re:"), module) is not None
    except re.error as error:
        raise InputError(
            "a pattern cannot be read", where=where, got=f"{pattern}: {error}", remedy=CHECK_SETTINGS
        ) from error


def weight_spec(group: Group, where: str) -> QuantSpec:
    """The format of a weight.

    Raises:
        UnsupportedModelError: for one that the layout does not hold, or that nothing here computes with.
    """
    one, layout = group.weight, group.layout
    if layout in _FP4_GROUPS:
        is_nv = layout.startswith("nv")
        if not (one.is_float and one.bits == 4 and one.symmetric and one.group_size == _FP4_GROUPS[layout]):
            raise _unsupported(one, layout, where)
        return QuantSpec("float4_e2m1", "per_group", one.group_size, scale_dtype=_fp4_scales(is_nv))
    if layout == MXFP8:
        if not (one.is_float and one.bits == 8 and one.symmetric and one.group_size == _MX_GROUP):
            raise _unsupported(one, layout, where)
        return QuantSpec("float8_e4m3fn", "per_group", _MX_GROUP)
    is_float8 = layout in ("float-quantized", "naive-quantized") and one.is_float and one.bits == 8 and one.symmetric
    is_plain = layout in ("int-quantized", "naive-quantized") and not one.is_float and one.strategy != "block"
    is_packed = layout == "pack-quantized" and not one.is_float and one.strategy in ("channel", "group")
    is_square = one.block is None or one.block[0] == one.block[1]
    if one.dynamic or not (is_float8 or is_plain or is_packed) or not is_square:
        raise _unsupported(one, layout, where)
    if one.strategy not in ("tensor", "channel", "group", "block"):
        raise _unsupported(one, layout, where)
    granularity: Any = f"per_{one.strategy}"
    bits = one.bits if layout == "pack-quantized" and one.bits in _HELD_BITS else 8
    return QuantSpec(
        "float8_e4m3fn" if is_float8 else f"int{bits}",
        granularity,
        one.group_size if one.block is None else one.block[0],
        one.symmetric,
    )


def activation_spec(group: Group) -> QuantSpec | None:
    """The format of an input; None for one that nothing here rounds to."""
    one = group.activation
    assert one is not None
    if one.is_float and one.bits == 4:
        is_nv = group.layout.startswith("nv")
        fits = one.group_size == _FP4_GROUPS.get(group.layout) and one.dynamic == ("local" if is_nv else True)
        if not fits and not (is_nv and one.dynamic is False):
            return None
        return QuantSpec("float4_e2m1", "per_group", one.group_size, scale_dtype=_fp4_scales(is_nv), dynamic=not is_nv)
    if one.strategy == "group" and one.dynamic is True and one.bits == 8 and one.symmetric:
        return QuantSpec(
            "float8_e4m3fn" if one.is_float else "int8", "per_group", one.group_size, one.symmetric, dynamic=True
        )
    if one.dynamic not in (True, False) or one.strategy not in ("tensor", "token"):
        return None
    if one.bits != 8 and not (one.bits == 4 and not one.is_float and one.dynamic):
        return None
    if (one.is_float and not one.symmetric) or (one.strategy == "token" and not one.dynamic):
        return None
    return QuantSpec(
        "float8_e4m3fn" if one.is_float else f"int{one.bits}",
        "per_token" if one.strategy == "token" else "per_tensor",
        None,
        one.symmetric,
        dynamic=bool(one.dynamic),
    )


def _fp4_scales(is_nv: bool) -> str:
    return "float8_e4m3fn" if is_nv else "float8_e8m0fnu"


def _unsupported(one: Arguments, layout: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a format of compressed-tensors that is not read", where=where, got=f"{one} in {layout}", remedy=USE_ORIGINAL
    )
