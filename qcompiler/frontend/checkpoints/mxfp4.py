"""The layout of ``quant_method: mxfp4``, in which GPT-OSS is published: experts in 4-bit floats, all in one tensor.

Of a stack of matrices, each ``[out, in]``: ``<name>_blocks`` uint8 ``[experts, out, in / 32, 16]``, two codes to a
byte, the first low, and ``<name>_scales`` uint8 ``[experts, out, in / 32]``, the bytes of E8M0. The model has these
matrices transposed, ``[experts, in, out]``.

Source: the integration of MXFP4 in transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import WeightError
from qcompiler.frontend.checkpoints.contents import CHECK_SETTINGS, Checkpoint, Layer, names_in, unpack_nibbles
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.storage import stack

__all__ = ["read"]

_GROUP, _BYTES = 32, 16
_SPEC = QuantSpec("float4_e2m1", "per_group", _GROUP, scale_dtype="float8_e8m0fnu")
_BLOCKS, _SCALES = "_blocks", "_scales"


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint, one for each expert; see `qcompiler.frontend.checkpoints`."""
    kept = names_in(settings, "modules_to_not_convert", where)
    stacks = [name for name in checkpoint.stored.names() if name.endswith((_BLOCKS, _SCALES))]
    for name in dict.fromkeys(name.removesuffix(_BLOCKS).removesuffix(_SCALES) for name in stacks):
        if name in kept:
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=f"{name}{_BLOCKS}",
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, name)


def _add(checkpoint: Checkpoint, name: str) -> None:
    module, _, last = name.rpartition(".")
    experts, rows, groups, _ = checkpoint.shape(module, f"{last}{_BLOCKS}", ("uint8",), 4)
    blocks = checkpoint.take(module, f"{last}{_BLOCKS}", ("uint8",), [(experts, rows, groups, _BYTES)])
    scales = checkpoint.take(module, f"{last}{_SCALES}", ("uint8",), [(experts, rows, groups)])
    columns, parts, floats = groups * _GROUP, checkpoint.parts, checkpoint.floats
    for source in (blocks, scales):
        parts.alias(source, source, checkpoint.stored)
    transposed = [f"{name}.{expert}" for expert in range(experts)]
    for expert, path in enumerate(transposed):
        layer = Layer(path, rows, columns, Scheme(_SPEC))
        for part, source, function, dtype, shape in (
            ("codes", blocks, _codes, _SPEC.stored_dtype, (rows, columns)),
            ("scale", scales, _same, "uint8", (rows, groups)),
        ):
            key = f"{layer.weight}_{part}"
            parts.slice(key, source, expert)
            parts.derive(key, (key,), function, dtype=dtype, shape=shape)
        checkpoint.add(layer)
        floats.derive(path, (layer.weight,), torch.t, dtype="float32", shape=(columns, rows), rearranges=True)
        floats.remove(layer.weight)
    shape_of_all = (experts, columns, rows)
    floats.derive(name, tuple(transposed), stack, dtype="float32", shape=shape_of_all, rearranges=True)
    for source in (blocks, scales):
        parts.remove(source)
    for path in transposed:
        floats.remove(path)


def _codes(blocks: Tensor) -> Tensor:
    """uint8 ``[out, groups, 16]`` → ``[out, in]``."""
    return unpack_nibbles(blocks).flatten(1)


def _same(tensor: Tensor) -> Tensor:
    return tensor
