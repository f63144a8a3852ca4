"""The layout of ``quant_method: fp8``, in which DeepSeek and others publish: 8-bit floats with a scale for each block.

Of a weight ``[out, in]``: ``weight`` float8 (E4M3) and ``weight_scale_inv`` ``[out / 128, in / 128]``, which is
multiplied by, whatever its name says; float32, or a power of two in one byte (``scale_fmt: ue8m0``). Without
``weight_block_size`` there is one scale, called ``weight_scale`` by some. A static input has an ``activation_scale``
or ``input_scale``; a dynamic one has a scale for each token and each group as long as a block.

Source: `FineGrainedFP8Config` of transformers and the ``fp8`` method of vLLM.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints.caches import take_cache_scales
from qcompiler.frontend.checkpoints.contents import (
    CHECK_SETTINGS,
    FLOATS,
    USE_ORIGINAL,
    Checkpoint,
    Layer,
    names_in,
    positive_number,
    powers_of_two,
)
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["read"]

_FLOAT8, _POWERS = "float8_e4m3fn", ("float8_e8m0fnu", "uint8")
_SCALES, _INPUT_SCALES = ("weight_scale_inv", "weight_scale"), ("activation_scale", "input_scale")
_SCHEMES, _FORMATS = ("dynamic", "static"), ("float", "ue8m0")


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint; see `qcompiler.frontend.checkpoints`."""
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise InputError(
            "not a size of blocks",
            where=f"{where}: weight_block_size",
            got=block,
            expected=[128, 128],
            remedy=CHECK_SETTINGS,
        )
    for key, known, usual in (("activation_scheme", _SCHEMES, "dynamic"), ("scale_fmt", _FORMATS, "float")):
        if settings.get(key) is not None and settings.get(key, usual) not in known:
            raise UnsupportedModelError(
                "a form of fp8 that is not read",
                where=f"{where}: {key}",
                got=settings[key],
                expected=" or ".join(known),
                remedy=USE_ORIGINAL,
            )
    spec = _spec(block, where)
    kept = names_in(settings, "modules_to_not_convert", where) + names_in(settings, "ignored_layers", where)
    modules = dict.fromkeys(checkpoint.modules(*_SCALES))
    for module in checkpoint.modules("weight"):
        if checkpoint.stored.info(f"{module}.weight").dtype == _FLOAT8:
            modules.setdefault(module)
    for module in modules:
        if module in kept:
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=f"{module}.weight",
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, module, spec, settings)
    take_cache_scales(checkpoint, is_fp8=False, said=None)


def _is_block(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def _spec(block: list[int] | None, where: str) -> QuantSpec:
    if block is None:
        return QuantSpec(_FLOAT8, "per_tensor", None)
    rows, columns = block
    if rows not in (1, columns):
        raise UnsupportedModelError(
            "blocks that are no squares are not read",
            where=f"{where}: weight_block_size",
            got=block,
            expected=[128, 128],
            remedy=USE_ORIGINAL,
        )
    return QuantSpec(_FLOAT8, "per_block" if rows == columns else "per_group", columns)


def _add(checkpoint: Checkpoint, module: str, spec: QuantSpec, settings: Mapping[str, Any]) -> None:
    rows, columns = checkpoint.shape(module, "weight", (_FLOAT8,), 2)
    part = next((part for part in _SCALES if checkpoint.has(module, part)), _SCALES[0])
    shape: tuple[int, ...] = ()
    shapes: list[tuple[int, ...]] = [(), (1,)]
    if spec.group_size is not None:
        side = spec.group_size
        shape = (rows if spec.granularity == "per_group" else math.ceil(rows / side), math.ceil(columns / side))
        shapes = [shape]
    scale = checkpoint.take(module, part, (*FLOATS, *_POWERS), shapes)
    stored = checkpoint.stored.info(scale).dtype

    def scales(tensor: Tensor) -> Tensor:
        return (powers_of_two(tensor.view(torch.uint8)) if stored in _POWERS else tensor).reshape(shape)

    dtype = "float32" if stored in _POWERS else stored
    checkpoint.part(module, "codes", [f"{module}.weight"], lambda t: t, spec.stored_dtype, (rows, columns))
    checkpoint.part(module, "scale", [scale], scales, dtype, shape)
    is_static = settings.get("activation_scheme") == "static"
    if is_static and spec.granularity == "per_tensor":
        given = next((part for part in _INPUT_SCALES if checkpoint.has(module, part)), _INPUT_SCALES[0])
        number = positive_number(checkpoint, module, given)
        checkpoint.add(Layer(module, rows, columns, Scheme(spec, spec), input_scale=number))
        return
    activation, lost = None, ""
    if is_static:
        lost = "inputs stay in float: this layout does not tell what their ranges are"
    elif spec.group_size is None:
        lost = "inputs stay in float: this layout does not tell whether tokens or tensors share a scale"
    elif settings.get("scale_fmt") == "ue8m0":
        lost = "inputs stay in float, since no operator takes powers of two for scales as this layout has it"
    else:
        activation = QuantSpec(_FLOAT8, "per_group", spec.group_size, dynamic=True)
    if lost:
        checkpoint.lost.setdefault(lost, []).append(module)
    checkpoint.add(Layer(module, rows, columns, Scheme(spec, activation)))
