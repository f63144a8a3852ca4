"""Bytes: of weights by their formats, of caches by tokens, of what a step holds besides."""

import math
from dataclasses import dataclass, replace

from qcompiler.advisor.shapes import Matrix, ModelShape
from qcompiler.ir import CacheFormat
from qcompiler.numerics import QuantSpec, Scheme

__all__ = [
    "FLOAT_BYTES",
    "Footprint",
    "activation_bytes",
    "cache_bytes",
    "cache_bytes_per_token",
    "fitted",
    "weight_bytes",
    "weight_parts",
]

FLOAT_BYTES = 2
"""Engines hold what is not quantized in 16 bits."""
_ROWS_AT_ONCE = 2048  # tokens of prompts that engines put through at a time (vLLM: max_num_batched_tokens)
_SMALLER_GROUPS = (64, 32, 16)  # what `Assign` tries where 128 does not divide a width
_QUANTIZED = ("attention", "mlp", "experts")


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU.

    Attributes:
        weights: with scales.
        cache: of all sequences, at the context.
        activations: of a step.
    """

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.activations


def weight_bytes(rows: int, columns: int, spec: QuantSpec | None, *, kept_apart: float = 0.0) -> float:
    """Bytes of a matrix: packed codes, scales, zero points, factors, tables; in 16 bits where ``spec`` is None.

    Args:
        rows: output channels.
        columns: input channels.
        spec: its format. Scales without a dtype of their own take 16 bits.
        kept_apart: the share of weights that a codebook keeps apart in a sparse matrix, of 2 bytes a value and 4 a
            place.
    """
    if spec is None:
        return rows * columns * FLOAT_BYTES
    codes = rows * columns * spec.bits / 8
    if spec.codebook:
        return codes + rows * (1 << spec.bits) * FLOAT_BYTES + kept_apart * rows * columns * (FLOAT_BYTES + 4)
    scales: int = {
        "per_tensor": 1,
        "per_channel": rows,
        "per_group": rows * math.ceil(columns / spec.group_of(columns)),
        "per_block": math.ceil(rows / (spec.group_size or 1)) * math.ceil(columns / (spec.group_size or 1)),
    }[spec.granularity]
    each = {"float32": 4, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}.get(str(spec.scale_dtype), FLOAT_BYTES)
    if spec.granularity == "per_block" and spec.scale_dtype is None:
        each = 4
    zero_points = 0.0 if spec.symmetric else scales * spec.bits / 8
    return codes + scales * each + zero_points + (4 if spec.has_factor else 0)


def fitted(spec: QuantSpec, width: int) -> QuantSpec:
    """A format in the groups that it comes to in a layer of so many input channels."""
    if spec.granularity != "per_group" or spec.is_fp4 or spec.group_size is None or width % spec.group_of(width) == 0:
        return spec
    size = next((size for size in _SMALLER_GROUPS if size < spec.group_size and width % size == 0), spec.group_size)
    return replace(spec, group_size=size)


def weight_parts(
    shape: ModelShape, scheme: Scheme, table: QuantSpec | None = None, *, kept_apart: float = 0.0
) -> dict[str, float]:
    """Bytes of weights by part; what recipes leave in float (head, routers, norms) is.

    Args:
        shape: of the model.
        scheme: of attention, MLPs and experts.
        table: of the embedding, and of a head that is the same matrix; None: float.
        kept_apart: as of `weight_bytes`.
    """
    found: dict[str, float] = {"others": shape.others * FLOAT_BYTES}
    for matrix in shape.matrices:
        size = matrix.count * _bytes(matrix, scheme, table, kept_apart)
        found[matrix.part] = found.get(matrix.part, 0) + size
    return found


def _bytes(matrix: Matrix, scheme: Scheme, table: QuantSpec | None, kept_apart: float) -> float:
    spec = scheme.weight if matrix.part in _QUANTIZED else table if matrix.part == "table" else None
    spec = None if spec is None else fitted(spec, matrix.columns)
    return weight_bytes(matrix.rows, matrix.columns, spec, kept_apart=kept_apart)


def cache_bytes_per_token(shape: ModelShape, keys: CacheFormat | None, values: CacheFormat | None) -> int:
    """Of all layers that cache, as long as no window is full; scales included; None: 16 bits."""
    return (shape.cached_layers + shape.windowed_layers) * _per_layer(shape, keys, values)


def cache_bytes(shape: ModelShape, keys: CacheFormat | None, values: CacheFormat | None, context: int) -> float:
    """Of one sequence of ``context`` tokens."""
    in_window = min(context, shape.window) if shape.windowed_layers else 0
    tokens = shape.cached_layers * context + shape.windowed_layers * in_window
    return tokens * _per_layer(shape, keys, values)


def _per_layer(shape: ModelShape, keys: CacheFormat | None, values: CacheFormat | None) -> int:
    plain = shape.kv_heads * shape.head_dim * FLOAT_BYTES
    formats = (keys, values)
    return sum(plain if item is None else item.bytes_per_token(shape.kv_heads, shape.head_dim) for item in formats)


def activation_bytes(shape: ModelShape, context: int, batch: int) -> float:
    """What a step holds besides weights and cache, in an engine that puts prompts through in pieces.

    For each of at most 2048 tokens the residual stream with its norm and what attention reads and gives, the two inner
    values of the MLP, and for each sequence logits in float32.
    """
    rows = min(context * batch, max(_ROWS_AT_ONCE, batch))
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    inner = 2 * shape.intermediate * max(shape.active, 1)
    return rows * (3 * shape.hidden + attention + inner) * FLOAT_BYTES + batch * shape.vocab * 4
