"""The layout of AWQ (``gemm``): 4-bit weights transposed, unsigned, packed along the output channels.

Of a weight ``[out, in]``: ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]``, ``scales``
``[groups, out]``. Of the eight channels in a word, the lowest four bits have the first, and so on: 0, 2, 4, 6, 1, 3, 5,
7. A weight is ``(code - zero) * scale``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints.contents import CHECK_SETTINGS, FLOATS, USE_ORIGINAL, Checkpoint, Layer, names_in
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["read"]

_WORDS = ("int32",)
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""For each of eight output channels, which four bits of the word it is in, counted from the lowest."""
_MIDDLE = 8


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint; see `qcompiler.frontend.checkpoints`."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    version = settings.get("version", "gemm")
    if bits != 4 or type(bits) is not int:
        raise UnsupportedModelError(
            "AWQ with a number of bits that is not read", where=where, got=bits, expected=4, remedy=USE_ORIGINAL
        )
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnsupportedModelError(
            "a layout of AWQ that is not read", where=where, got=version, expected="gemm", remedy=USE_ORIGINAL
        )
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise InputError(
            "not a group size", where=where, got=group_size, expected="-1, 32, 64, 128, ...", remedy=CHECK_SETTINGS
        )
    kept = names_in(settings, "modules_to_not_convert", where)
    for module in checkpoint.modules("qweight"):
        if any(name in (module, *module.split(".")) for name in kept):
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=f"{module}.qweight",
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, module, group_size)


def _add(checkpoint: Checkpoint, module: str, group_size: int) -> None:
    columns, words = checkpoint.shape(module, "qweight", _WORDS, 2)
    rows = words * 8
    group = columns if group_size == -1 else min(group_size, max(columns, 1))
    groups = math.ceil(columns / group) if group else 0
    qweight = f"{module}.qweight"
    scales = checkpoint.take(module, "scales", FLOATS, [(groups, rows)])
    qzeros = checkpoint.take(module, "qzeros", _WORDS, [(groups, words)])
    is_middle = bool((_unpack(checkpoint.stored.read(qzeros)) == _MIDDLE).all())
    spec = QuantSpec(
        dtype="int4",
        granularity="per_channel" if group_size == -1 else "per_group",
        group_size=None if group_size == -1 else group_size,
        symmetric=is_middle,
    )

    def codes(words: Tensor) -> Tensor:
        found = _unpack(words).T
        return (found.to(torch.int8) - _MIDDLE if is_middle else found).contiguous()

    shape = (rows,) if group_size == -1 else (rows, groups)
    scale_dtype = checkpoint.stored.info(scales).dtype
    checkpoint.part(module, "codes", [qweight], codes, spec.stored_dtype, (rows, columns))
    checkpoint.part(module, "scale", [scales], lambda t: t.T.reshape(shape), scale_dtype, shape)
    if not is_middle:
        zero_point = [qzeros], lambda t: _unpack(t).T.reshape(shape), spec.stored_dtype, shape
        checkpoint.part(module, "zero_point", *zero_point)
    checkpoint.add(Layer(module, rows, columns, Scheme(spec)))


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[n, out / 8]`` → uint8 ``[n, out]``."""
    shifts = torch.tensor([4 * nibble for nibble in _NIBBLES], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)
