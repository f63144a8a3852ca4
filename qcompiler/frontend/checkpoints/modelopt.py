"""The layouts of NVIDIA's ModelOpt (unified Hugging Face export).

| algorithm | ``weight`` of ``[out, in]`` | scales |
|---|---|---|
| ``FP8`` | float8 (E4M3) | ``weight_scale``, ``input_scale``: one number each |
| ``FP8_PER_CHANNEL_PER_TOKEN`` | the same | ``weight_scale`` ``[out]`` |
| ``FP8_PB_WO`` | the same | ``weight_scale`` ``[out / 128, in / 128]``, or with an axis of one behind each |
| ``MXFP8`` | the same | ``weight_scale`` ``[out, in / 32]``, the bytes of E8M0 |
| ``W8A8_SQ_PER_CHANNEL`` | int8 | ``weight_scale`` ``[out]``, ``input_scale`` |
| ``NVFP4``, ``NVFP4_AWQ`` | uint8 ``[out, in / 2]`` | ``weight_scale`` E4M3, ``weight_scale_2``, ``input_scale`` |
| ``W4A16_NVFP4`` | the same | without ``input_scale`` |
| ``W4A16_AWQ``, ``INT4_AWQ`` | uint8 ``[out / 2, in]`` | ``weight_scale`` ``[out, in / group]`` |

Scales of blocks are called ``weight_scale_inv`` by some. Of two codes in a byte the first lies low; integers are in
two's complement. Every input may be multiplied by a ``pre_quant_scale`` ``[in]`` first. Under ``MIXED_PRECISION`` each
layer has an algorithm of its own.

Source: ModelOpt's export to Hugging Face directories, and the readers of it in vLLM and TensorRT-LLM.
"""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

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
    unpack_nibbles,
)
from qcompiler.numerics import QuantSpec, Scheme, unpack_bits

__all__ = ["merged_settings", "read"]

_FLOAT8, _MIXED, _NONE = "float8_e4m3fn", "MIXED_PRECISION", (None, "NO_QUANT")
_CODES = (_FLOAT8, "int8", "uint8")
_BLOCK, _MX_GROUP, _FP4_GROUP = 128, 32, 16
_INT4 = ("W4A16_AWQ", "INT4_AWQ")
_NVFP4 = QuantSpec("float4_e2m1", "per_group", _FP4_GROUP, scale_dtype=_FLOAT8)
_TENSOR8, _CHANNEL8 = QuantSpec(_FLOAT8, "per_tensor", None), QuantSpec(_FLOAT8, "per_channel", None)
_SCHEMES = {
    "FP8": Scheme(_TENSOR8, _TENSOR8),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(_CHANNEL8, QuantSpec(_FLOAT8, "per_token", None)),
    "FP8_PB_WO": Scheme(  # weights alone by its name, but engines round inputs too
        QuantSpec(_FLOAT8, "per_block", _BLOCK), QuantSpec(_FLOAT8, "per_group", _BLOCK, dynamic=True)
    ),
    "MXFP8": Scheme(QuantSpec(_FLOAT8, "per_group", _MX_GROUP)),
    "W8A8_SQ_PER_CHANNEL": Scheme(QuantSpec("int8", "per_channel", None), QuantSpec("int8", "per_tensor", None)),
    "NVFP4": Scheme(_NVFP4, _NVFP4),
    "NVFP4_AWQ": Scheme(_NVFP4, _NVFP4),
    "W4A16_NVFP4": Scheme(_NVFP4),
}
_SHARED = ("quant_algo", "kv_cache_quant_algo", "group_size")
"""What both files say and must agree in."""


def merged_settings(
    own: Mapping[str, Any] | None, beside: Mapping[str, Any] | None, own_where: str, beside_where: str
) -> Mapping[str, Any]:
    """The settings of ``config.json`` and of ``hf_quant_config.json``, which say the same in different words.

    Args:
        own: of ``config.json``; None where it has none.
        beside: what the other file holds; None where there is none.
        own_where, beside_where: they stand, for messages.

    Returns:
        In the words of ``hf_quant_config.json``; layers that stay in float are those of both.

    Raises:
        InputError: if one of them is no object, or they contradict each other.
    """
    found: list[dict[str, Any]] = []
    for settings, where in ((own, own_where), (beside, beside_where)):
        if settings is None:
            continue
        fields = settings.get("quantization", settings)
        if not isinstance(fields, Mapping):
            raise InputError(
                "the quantization settings are not an object", where=where, got=fields, remedy=CHECK_SETTINGS
            )
        cache = fields.get("kv_cache_quant_algo") or fields.get("kv_cache_scheme")
        names = names_in(fields, "exclude_modules", where) + names_in(fields, "ignore", where)
        found.append({**fields, "kv_cache_quant_algo": _cache_algorithm(cache), "exclude_modules": names})
    first, second = found[0], found[-1]
    for key in _SHARED:
        values = [fields.get(key) for fields in (first, second)]
        if None not in values and values[0] != values[1]:
            raise InputError(
                "two descriptions of one quantization contradict each other",
                where=f"{beside_where}: {key}",
                got=values[1],
                expected=f"{values[0]}, as config.json says",
                remedy="use the files as they were published together",
            )
    given = {key: value for fields in (second, first) for key, value in fields.items() if value is not None}
    return {**given, "exclude_modules": [*first["exclude_modules"], *second["exclude_modules"]]}


def _cache_algorithm(found: object) -> object:
    """The name of a cache's format, also where it is spelled out as in compressed-tensors."""
    if isinstance(found, Mapping):
        return "FP8" if (found.get("num_bits"), found.get("type")) == (8, "float") else str(dict(found))
    return found


def read(checkpoint: Checkpoint, settings: Mapping[str, Any], where: str) -> None:
    """Adds the layers of a checkpoint; see `qcompiler.frontend.checkpoints`."""
    stored, excluded = checkpoint.stored, names_in(settings, "exclude_modules", where)
    modules = dict.fromkeys(checkpoint.modules("weight_scale", "weight_scale_2", "weight_scale_inv"))
    for module in checkpoint.modules("weight"):
        if stored.info(f"{module}.weight").dtype in _CODES:
            modules.setdefault(module)
    for module in modules:
        algorithm, fields = _algorithm(module, settings, where)
        if algorithm in _NONE or any(fnmatchcase(module, pattern) for pattern in excluded):
            raise WeightError(
                "a layer holds codes, but the settings leave it in float",
                where=next(name for name in stored.names() if name.rpartition(".")[0] == module),
                got=where,
                remedy=CHECK_SETTINGS,
            )
        _add(checkpoint, module, algorithm, fields, where)
    cache = settings.get("kv_cache_quant_algo")
    take_cache_scales(checkpoint, is_fp8=cache == "FP8", said=cache)


def _algorithm(module: str, settings: Mapping[str, Any], where: str) -> tuple[Any, Mapping[str, Any]]:
    """The name of a layer's algorithm, and what is said of it."""
    if settings.get("quant_algo") != _MIXED:
        return settings.get("quant_algo"), settings
    layers = settings.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(one, Mapping) for one in layers.values()):
        raise InputError(
            "the algorithms of layers are objects by name",
            where=f"{where}: quantized_layers",
            got=layers,
            remedy=CHECK_SETTINGS,
        )
    named = (one for name, one in layers.items() if name == module or fnmatchcase(module, name))
    fields: Mapping[str, Any] = next(named, {})
    return fields.get("quant_algo"), fields


def _add(checkpoint: Checkpoint, module: str, algorithm: Any, fields: Mapping[str, Any], where: str) -> None:
    group = fields.get("group_size")
    if group is not None and (type(group) is not int or group < 0):
        raise InputError(
            "not a group size",
            where=f"{where}, for {module}",
            got=group,
            expected="16, 128, ...",
            remedy=CHECK_SETTINGS,
        )
    if algorithm in _INT4:
        scheme, (rows, columns) = _add_integers(checkpoint, module, group)
    else:
        if not isinstance(algorithm, str) or algorithm not in _SCHEMES:
            raise UnsupportedModelError(
                "an algorithm of ModelOpt that is not read",
                where=f"{where}, for {module}",
                got=algorithm,
                expected=", ".join((*_SCHEMES, *_INT4)),
                remedy=USE_ORIGINAL,
            )
        scheme = _SCHEMES[algorithm]
        spec = scheme.weight
        assert spec is not None
        if spec.granularity == "per_group" and group not in (None, 0, spec.group_size):
            raise UnsupportedModelError(
                f"{algorithm} with groups of another size is not read",
                where=f"{where}, for {module}",
                got=group,
                expected=spec.group_size,
                remedy=USE_ORIGINAL,
            )
        rows, columns = (_add_fp4 if spec.is_fp4 else _add_plain)(checkpoint, module, spec)
    if algorithm == "MXFP8":
        lost = "inputs stay in float, since no operator rounds them as MXFP8"
        checkpoint.lost.setdefault(lost, []).append(module)
    activation, scale, multiplier = scheme.activation, None, None
    if activation is not None and not activation.dynamic:
        scale = positive_number(checkpoint, module, "input_scale")
    if checkpoint.has(module, "pre_quant_scale"):
        name = checkpoint.take(module, "pre_quant_scale", FLOATS, [(columns,)])
        multiplier = checkpoint.stored.read(name).float()
    checkpoint.add(Layer(module, rows, columns, scheme, input_scale=scale, input_multiplier=multiplier))


def _add_integers(checkpoint: Checkpoint, module: str, group: int | None) -> tuple[Scheme, tuple[int, int]]:
    """4-bit integers, two output channels to a byte."""
    pairs, columns = checkpoint.shape(module, "weight", ("uint8",), 2)
    rows, (_, groups) = 2 * pairs, checkpoint.shape(module, "weight_scale", FLOATS, 2)
    size = group or math.ceil(columns / max(groups, 1))
    shape = (rows, math.ceil(columns / size))
    scale = checkpoint.take(module, "weight_scale", FLOATS, [shape])
    spec = QuantSpec("int4", "per_group", size)

    def codes(packed: Tensor) -> Tensor:
        return unpack_bits(packed.T.contiguous(), 4, rows, signed=True).T.contiguous()

    checkpoint.part(module, "codes", [f"{module}.weight"], codes, spec.stored_dtype, (rows, columns))
    _add_scale(checkpoint, module, scale, shape)
    return Scheme(spec), (rows, columns)


def _add_fp4(checkpoint: Checkpoint, module: str, spec: QuantSpec) -> tuple[int, int]:
    rows, pairs = checkpoint.shape(module, "weight", ("uint8",), 2)
    columns = 2 * pairs
    shape = (rows, math.ceil(columns / _FP4_GROUP))
    scale = checkpoint.take(module, "weight_scale", (_FLOAT8,), [shape])
    factor = checkpoint.take(module, "weight_scale_2", ("float32",), [(), (1,)])
    checkpoint.part(module, "codes", [f"{module}.weight"], unpack_nibbles, spec.stored_dtype, (rows, columns))
    checkpoint.part(module, "scale", [scale], lambda t: t, _FLOAT8, shape)
    checkpoint.part(module, "factor", [factor], lambda t: t.reshape(()), "float32", ())
    return rows, columns


def _add_plain(checkpoint: Checkpoint, module: str, spec: QuantSpec) -> tuple[int, int]:
    """Codes of eight bits, one to an element."""
    rows, columns = checkpoint.shape(module, "weight", (spec.stored_dtype,), 2)
    checkpoint.part(module, "codes", [f"{module}.weight"], lambda t: t, spec.stored_dtype, (rows, columns))
    shape: tuple[int, ...] = ()
    if spec.granularity == "per_group":
        shape = (rows, math.ceil(columns / _MX_GROUP))
        scale = checkpoint.take(module, "weight_scale", ("uint8",), [shape])
        checkpoint.part(module, "scale", [scale], powers_of_two, "float32", shape)
        return rows, columns
    shapes: list[tuple[int, ...]] = [(), (1,)]
    part = "weight_scale"
    if spec.granularity == "per_channel":
        shape, shapes = (rows,), [(rows,), (rows, 1)]
    elif spec.granularity == "per_block":
        shape = (math.ceil(rows / _BLOCK), math.ceil(columns / _BLOCK))
        shapes = [shape, (shape[0], 1, shape[1], 1)]
        part = "weight_scale_inv" if checkpoint.has(module, "weight_scale_inv") else part
    _add_scale(checkpoint, module, checkpoint.take(module, part, FLOATS, shapes), shape)
    return rows, columns


def _add_scale(checkpoint: Checkpoint, module: str, stored: str, shape: tuple[int, ...]) -> None:
    reshaped: Callable[[Tensor], Tensor] = lambda scale: scale.reshape(shape)  # noqa: E731
    checkpoint.part(module, "scale", [stored], reshaped, checkpoint.stored.info(stored).dtype, shape)
