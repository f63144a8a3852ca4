"""The layouts of compressed-tensors.

| layout | tensors of a weight ``[out, in]`` |
|---|---|
| ``pack-quantized`` | ``weight_packed`` int32 ``[out, in * bits / 32]``, ``weight_scale``, ``weight_shape`` |
| ``int-quantized`` | ``weight`` int8, ``weight_scale`` ``[out, 1]`` or ``[1]`` |
| ``float-quantized`` | ``weight`` float8 (E4M3), ``weight_scale`` the same, or one per block |
| ``nvfp4-pack-quantized`` | ``weight_packed`` uint8 ``[out, in / 2]``, ``weight_scale`` E4M3, ``weight_global_scale`` |
| ``mxfp8-quantized`` | ``weight`` float8 (E4M3), ``weight_scale`` ``[out, in / 32]``, the bytes of E8M0 |
| ``mxfp4-pack-quantized`` | the same in groups of 32, ``weight_scale`` the bytes of E8M0 |

Packed codes begin in the lowest bits; integers are stored plus ``2^(bits - 1)``. Asymmetric ones have zero points of
the same form, packed along the output channels (``weight_zero_point``). Scales of NVFP4 are to be divided by the
global one.

Static inputs have an ``input_scale`` (``input_zero_point``), those of NVFP4 an ``input_global_scale``.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints.caches import take_cache_scales
from qcompiler.frontend.checkpoints.contents import (
    CHECK_SETTINGS,
    FLOATS,
    USE_ORIGINAL,
    Checkpoint,
    Layer,
    group_order,
    positive_number,
    powers_of_two,
    unpack_nibbles,
    unpack_words,
)
from qcompiler.frontend.checkpoints.ct_schemes import (
    MXFP8,
    Arguments,
    Group,
    activation_spec,
    group_of,
    is_ignored,
    read_groups,
    weight_spec,
)
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["read"]

_CODES = ("int8", "float8_e4m3fn")


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint; see `qcompiler.frontend.checkpoints`."""
    version = str(settings.get("version") or "0")
    if int((re.match(r"\d+", version) or ["1"])[0]) > 0:
        raise UnsupportedModelError(
            "a newer version of compressed-tensors wrote this",
            where=where,
            got=version,
            expected="0.x",
            remedy=USE_ORIGINAL,
        )
    for key in ("transform_config", "sparsity_config"):
        if settings.get(key) and settings[key] != {"format": "dense"}:
            raise UnsupportedModelError(
                "this part of compressed-tensors is not read", where=f"{where}: {key}", remedy=USE_ORIGINAL
            )
    groups = read_groups(settings, where)
    stored = checkpoint.stored
    modules = dict.fromkeys(checkpoint.modules("weight_packed", "weight_scale"))
    for module in checkpoint.modules("weight"):
        if stored.info(f"{module}.weight").dtype in _CODES:
            modules.setdefault(module)
    for module in modules:
        group = group_of(module, groups, where)
        if group is None or is_ignored(module, settings, where):
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=next(name for name in stored.names() if name.rpartition(".")[0] == module),
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, module, group, where)
    said = settings.get("kv_cache_scheme")
    cache = None if said is None else Arguments.read(said, f"{where}: kv_cache_scheme")
    is_fp8 = cache is not None and (cache.is_float, cache.bits, cache.symmetric, cache.dynamic) == (
        True,
        8,
        True,
        False,
    )
    take_cache_scales(checkpoint, is_fp8=is_fp8, said=cache)


def _add(checkpoint: Checkpoint, module: str, group: Group, where: str) -> None:
    spec = weight_spec(group, f"{where}, for {module}.weight")
    order = None
    if group.layout == "pack-quantized":
        rows, columns = _add_packed(checkpoint, module, group, spec)
        if checkpoint.has(module, "weight_g_idx") and spec.group_size is not None:
            g_idx = checkpoint.take(module, "weight_g_idx", ("int32", "int64"), [(columns,)])
            groups = math.ceil(columns / spec.group_size)
            order, is_even = group_order(stored_g_idx := checkpoint.stored.read(g_idx), spec.group_size, groups, g_idx)
            if not is_even:
                raise UnsupportedModelError(
                    "groups of different sizes are not read",
                    where=g_idx,
                    got=f"{len(stored_g_idx.unique())} groups",
                    remedy=USE_ORIGINAL,
                )
    elif spec.is_fp4:
        rows, columns = _add_fp4(checkpoint, module, spec)
    else:
        rows, columns = _add_plain(checkpoint, module, group, spec)
    scheme, qparams = Scheme(spec), dict[str, Tensor]()
    if group.activation is not None:
        activation = None if group.layout == MXFP8 else activation_spec(group)
        if activation is None:
            lost = f"inputs stay in float, since no operator rounds them as {group.activation}"
            checkpoint.lost.setdefault(lost, []).append(module)
        else:
            scheme, qparams = Scheme(spec, activation), _input_qparams(checkpoint, module, activation)
            if activation.is_fp4 and not activation.has_factor:
                checkpoint.notes["exponents of MXFP4 inputs are those of the OCP specification"] = []
    if order is not None:
        _put_in_order(checkpoint, module, order)
    checkpoint.add(Layer(module, rows, columns, scheme, order, **qparams))


def _add_packed(checkpoint: Checkpoint, module: str, group: Group, spec: QuantSpec) -> tuple[int, int]:
    bits = group.weight.bits
    shape = checkpoint.stored.read(checkpoint.take(module, "weight_shape", ("int64", "int32"), [(2,)]))
    rows, columns = (int(size) for size in shape)
    words = math.ceil(columns * bits / 32)
    packed = checkpoint.take(module, "weight_packed", ("int32",), [(rows, words)])
    middle = 1 << (bits - 1)

    def codes(words: Tensor) -> Tensor:
        return _centred(unpack_words(words, bits, columns), spec, middle)

    checkpoint.part(module, "codes", [packed], codes, spec.stored_dtype, (rows, columns))
    shape_of_scale, groups = _add_scale(checkpoint, module, spec, rows, columns)
    if not spec.symmetric:
        zeros = checkpoint.take(module, "weight_zero_point", ("int32",), [(math.ceil(rows * bits / 32), groups)])

        def zero_point(words: Tensor) -> Tensor:
            return unpack_words(words.T, bits, rows).T.reshape(shape_of_scale)

        checkpoint.part(module, "zero_point", [zeros], zero_point, spec.stored_dtype, shape_of_scale)
    if spec.bits != bits:
        checkpoint.notes.setdefault(f"codes of {bits} bits are held in 8", []).append(module)
    return rows, columns


def _centred(codes: Tensor, spec: QuantSpec, middle: int) -> Tensor:
    return (codes.to(torch.int16) - middle).to(torch.int8) if spec.symmetric else codes


def _add_plain(checkpoint: Checkpoint, module: str, group: Group, spec: QuantSpec) -> tuple[int, int]:
    wanted = "float8_e4m3fn" if spec.is_float else "int8"
    rows, columns = checkpoint.shape(module, "weight", (wanted,), 2)

    def unsigned(codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) + 128).to(torch.uint8)

    function = _same if spec.symmetric else unsigned
    checkpoint.part(module, "codes", [f"{module}.weight"], function, spec.stored_dtype, (rows, columns))
    if group.layout == MXFP8:
        sizes = (rows, math.ceil(columns / (spec.group_size or 1)))
        scale = checkpoint.take(module, "weight_scale", ("uint8",), [sizes])
        checkpoint.part(module, "scale", [scale], powers_of_two, "float32", sizes)
        return rows, columns
    shape, groups = _add_scale(checkpoint, module, spec, rows, columns)
    if not spec.symmetric:
        shapes = [(rows, groups)] if spec.granularity != "per_tensor" else [(1,), ()]
        zeros = checkpoint.take(module, "weight_zero_point", ("int8",), shapes)
        checkpoint.part(module, "zero_point", [zeros], lambda t: unsigned(t).reshape(shape), spec.stored_dtype, shape)
    return rows, columns


def _add_scale(
    checkpoint: Checkpoint, module: str, spec: QuantSpec, rows: int, columns: int
) -> tuple[tuple[int, ...], int]:
    """Defines the scale of a weight; its shape, and the number of its columns as stored."""
    groups = 1
    shapes: list[tuple[int, ...]]
    shape: tuple[int, ...]
    if spec.granularity == "per_tensor":
        shapes, shape = [(1,), (), (1, 1)], ()
    elif spec.granularity == "per_channel":
        shapes, shape = [(rows, 1), (rows,)], (rows,)
    else:
        side = spec.group_size or 1
        groups = math.ceil(columns / side)
        shape = (rows if spec.granularity == "per_group" else math.ceil(rows / side), groups)
        shapes = [shape]
    scale = checkpoint.take(module, "weight_scale", FLOATS, shapes)
    dtype = checkpoint.stored.info(scale).dtype
    checkpoint.part(module, "scale", [scale], lambda t: t.reshape(shape), dtype, shape)
    return shape, groups


def _add_fp4(checkpoint: Checkpoint, module: str, spec: QuantSpec) -> tuple[int, int]:
    rows, pairs = checkpoint.shape(module, "weight_packed", ("uint8",), 2)
    columns, group = 2 * pairs, spec.group_size or 1
    scale_dtype = "float8_e4m3fn" if spec.has_factor else "uint8"
    shape = (rows, math.ceil(columns / group))
    scale = checkpoint.take(module, "weight_scale", (scale_dtype,), [shape])
    checkpoint.part(module, "codes", [f"{module}.weight_packed"], unpack_nibbles, spec.stored_dtype, (rows, columns))
    checkpoint.part(module, "scale", [scale], _same, scale_dtype, shape)
    if spec.has_factor:
        divisor = checkpoint.take(module, "weight_global_scale", ("float32",), [(1,), ()])
        checkpoint.part(module, "factor", [divisor], _inverse, "float32", ())
    return rows, columns


def _input_qparams(checkpoint: Checkpoint, module: str, spec: QuantSpec) -> dict[str, Tensor]:
    """What a static input is rounded with."""
    if spec.has_factor:
        return {"input_scale": _inverse(checkpoint.number(module, "input_global_scale", FLOATS))}
    if spec.dynamic:
        return {}
    found = {"input_scale": positive_number(checkpoint, module, "input_scale")}
    if not spec.symmetric:
        zero = checkpoint.number(module, "input_zero_point", ("int8",))
        found["input_zero_point"] = (zero.to(torch.int16) + 128).to(torch.uint8)
    elif checkpoint.has(module, "input_zero_point"):
        checkpoint.take(module, "input_zero_point", ("int8", "float8_e4m3fn"))
    return found


def _put_in_order(checkpoint: Checkpoint, module: str, order: Tensor) -> None:
    """Lets the codes of a layer come in the order of their groups."""
    name = f"{module}.weight_codes"
    info = checkpoint.parts.info(name)
    select: Callable[[Tensor], Tensor] = lambda codes: codes[:, order]  # noqa: E731
    checkpoint.parts.derive(name, (name,), select, dtype=info.dtype, shape=info.shape)


def _inverse(number: Tensor) -> Tensor:
    return 1 / number.float().reshape(())


def _same(tensor: Tensor) -> Tensor:
    return tensor
