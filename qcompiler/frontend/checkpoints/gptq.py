"""The layout of GPTQ: weights transposed, unsigned, packed along the input channels.

Of a weight ``[out, in]``: ``qweight`` int32 ``[in * bits / 32, out]``, ``qzeros`` int32 ``[groups, out * bits / 32]``,
``scales`` ``[groups, out]``, ``g_idx`` int32 ``[in]``, the group of each input channel; the lowest bits come first, and
a code may lie in two words. A weight is ``(code - zero) * scale``. The first version of the format stores zeros less
one, ``gptq_v2`` as they are. Under ``desc_act`` groups are no neighbours: channels are put in order of their groups.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints.contents import (
    CHECK_SETTINGS,
    FLOATS,
    USE_ORIGINAL,
    Checkpoint,
    Layer,
    group_order,
    unpack_words,
)
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["read"]

_BITS = (2, 3, 4, 8)
_LAYOUTS = ("gptq", "gptq_v2")
_WORDS = ("int32",)


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint; see `qcompiler.frontend.checkpoints`."""
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    layout = "marlin" if settings.get("is_marlin_format") else layout
    if layout not in _LAYOUTS:
        raise UnsupportedModelError(
            "a layout of GPTQ that is not read",
            where=where,
            got=layout,
            expected=" or ".join(_LAYOUTS),
            remedy=USE_ORIGINAL,
        )
    for module in checkpoint.modules("qweight"):
        fields = _fields(module, settings, where)
        if fields is None:
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=f"{module}.qweight",
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, module, *fields, is_first=layout == "gptq")


def _fields(module: str, settings: Mapping[str, Any], where: str) -> tuple[int, int, bool] | None:
    """Bits, group size and whether zero points are in the middle, of one module; None where it stays in float."""
    own: Mapping[str, Any] = {}
    overrides = settings.get("dynamic") or {}
    if not isinstance(overrides, Mapping):
        raise InputError("overrides are an object", where=f"{where}: dynamic", got=overrides, remedy=CHECK_SETTINGS)
    for pattern, fields in overrides.items():
        try:
            matches = re.match(re.sub(r"^[+-]:", "", pattern), module)
        except re.error as error:
            raise InputError(
                "a pattern cannot be read", where=f"{where}: dynamic", got=f"{pattern}: {error}", remedy=CHECK_SETTINGS
            ) from error
        if matches and pattern.startswith("-:"):
            return None
        if matches:
            own = fields if isinstance(fields, Mapping) else {}
            break
    found = {"sym": True, "group_size": 128, **settings, **own}
    bits, group = found.get("bits"), found["group_size"]
    if type(bits) is not int or bits not in _BITS:
        raise UnsupportedModelError(
            "GPTQ with a number of bits that is not read",
            where=f"{where}, for {module}.qweight",
            got=bits,
            expected=", ".join(map(str, _BITS)),
            remedy=USE_ORIGINAL,
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise InputError(
            "not a group size",
            where=f"{where}, for {module}",
            got=group,
            expected="-1, 32, 64, 128, ...",
            remedy=CHECK_SETTINGS,
        )
    return bits, group, bool(found["sym"])


def _add(
    checkpoint: Checkpoint, module: str, bits: int, group_size: int, is_symmetric: bool, *, is_first: bool
) -> None:
    words, rows = checkpoint.shape(module, "qweight", _WORDS, 2)
    has_groups = checkpoint.has(module, "g_idx")
    columns = words * 32 // bits
    if has_groups:
        (columns,) = checkpoint.shape(module, "g_idx", ("int32", "int64"), 1)
    group = columns if group_size == -1 else min(group_size, max(columns, 1))
    groups = math.ceil(columns / group) if group else 0
    qweight = checkpoint.take(module, "qweight", _WORDS, [(math.ceil(columns * bits / 32), rows)])
    scales = checkpoint.take(module, "scales", FLOATS, [(groups, rows)])
    qzeros = checkpoint.take(module, "qzeros", _WORDS, [(groups, math.ceil(rows * bits / 32))])
    zeros = _zeros(checkpoint.stored.read(qzeros), bits, rows, qzeros, is_first=is_first)
    middle = 1 << (bits - 1)
    is_middle = bool((zeros == middle).all())
    if is_symmetric and not is_middle:
        raise WeightError(
            "zero points contradict the settings, which say that they lie in the middle",
            where=qzeros,
            got=f"{int(zeros.min())} to {int(zeros.max())}",
            expected=f"{middle} (sym)",
            remedy="check sym and checkpoint_format in the quantization settings",
        )
    order, is_even = None, True
    if has_groups:
        g_idx = f"{module}.g_idx"
        order, is_even = group_order(checkpoint.stored.read(g_idx), group, groups, g_idx)
    if not is_even:
        _add_uneven(checkpoint, module, bits, columns, zeros)
        return
    spec = QuantSpec(
        dtype=f"int{bits}",
        granularity="per_channel" if group_size == -1 else "per_group",
        group_size=None if group_size == -1 else group_size,
        symmetric=is_middle,
    )

    def codes(words: Tensor) -> Tensor:
        found = unpack_words(words.T, bits, columns)
        if order is not None:
            found = found[:, order]
        return (found.to(torch.int16) - middle).to(torch.int8) if is_middle else found

    shape = (rows,) if group_size == -1 else (rows, groups)
    scale_dtype = checkpoint.stored.info(scales).dtype
    checkpoint.part(module, "codes", [qweight], codes, spec.stored_dtype, (rows, columns))
    checkpoint.part(module, "scale", [scales], lambda t: t.T.reshape(shape), scale_dtype, shape)
    if not is_middle:

        def zero_point(words: Tensor) -> Tensor:
            return _zeros(words, bits, rows, qzeros, is_first=is_first).T.reshape(shape)

        checkpoint.part(module, "zero_point", [qzeros], zero_point, spec.stored_dtype, shape)
    checkpoint.add(Layer(module, rows, columns, Scheme(spec), order))


def _zeros(words: Tensor, bits: int, rows: int, where: str, *, is_first: bool) -> Tensor:
    """The zero points, uint8 ``[groups, out]``.

    Raises:
        WeightError: for a stored -1 in the first version of the format: programs read it as 0 or as 2^bits.
    """
    stored = unpack_words(words, bits, rows)
    if not is_first:
        return stored
    if bool((stored == (1 << bits) - 1).any()):
        raise WeightError(
            "a zero point of 0 in the first version of GPTQ, which programs read in different ways",
            where=where,
            got=f"{(1 << bits) - 1}, stored less one",
            expected=f"0 to {(1 << bits) - 2}",
            remedy="save the checkpoint as gptq_v2 with the library that made it",
        )
    return stored + 1


def _add_uneven(checkpoint: Checkpoint, module: str, bits: int, columns: int, zeros: Tensor) -> None:
    """A layer whose groups have different sizes: its float weight."""
    rows = zeros.shape[1]

    def weight(words: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
        codes, place = unpack_words(words.T, bits, columns).float(), g_idx.long()
        return (codes - zeros.T[:, place].float()) * scales.T.float()[:, place]

    names = [f"{module}.{part}" for part in ("qweight", "scales", "g_idx")]
    checkpoint.add_float(module, names, weight, (rows, columns))
    note = "groups of different sizes have no form here (g_idx), and are taken as float weights"
    checkpoint.notes.setdefault(note, []).append(module)
