"""`QuantizeKVCache`: keys and values are kept as codes."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from qcompiler.errors import RecipeError, UnsupportedModelError, ZeroCoverageError
from qcompiler.ir import (
    FLOAT_CACHES,
    Cache,
    CacheFormat,
    Graph,
    Segment,
    Site,
    descendants,
    float_caches,
    keep_range,
    quantize_cache,
    static_qparams,
)
from qcompiler.numerics import factors_of, sqnr_db
from qcompiler.protocol import (
    CACHE_QUANTIZED,
    CANONICAL,
    DROP,
    FLOAT_CACHE,
    Effect,
    Gram,
    HeadRange,
    Pass,
    PassContext,
    PassResult,
    SiteReport,
    Skip,
    Tap,
    Wave,
)

__all__ = ["QuantizeKVCache"]

_canonical = torch.ops.qcompiler
_DTYPES: dict[str, Literal["int8", "int4", "float8_e4m3fn"]] = {
    "fp8": "float8_e4m3fn",
    "int8": "int8",
    "int4": "int4",
}
_NARROW_GROUP = 16


@dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Keeps keys and values as codes, now, so that what follows is calibrated on what attention will read.

    ``attention(q, kv_append(past, k), ...)`` becomes ``attention(q, dequantize(kv_append(past, quantize(k, s)), s),
    ...)``: the ports of the cache take the dtype of the codes, and with scales per token there is a port for them too.
    Keys are quantized as they are cached, behind a rotary embedding. Nothing is rounded twice: a code that is in the
    cache stays as it is.

    Scales per token are computed when the token comes, ``amax / 127``, ``amax / 448`` or, for ``int4``, from the range
    of every 16 channels, widened to hold zero, with a zero point; they are rounded to float16 first. Static ranges come
    from calibration: per channel of every head for integers, per tensor for floats (or per head, with ``per_head``),
    those with twice the room of what was seen. The static range of every channel is calibrated in either case and
    stored, because some targets have no other form; `static_caches` makes it, and the report says what it costs beside
    what the scales per token do.

    With ``rotate``, queries and keys are rotated by a Hadamard matrix (arXiv 2404.00456, section 4), which changes no
    product of theirs and spreads the few large channels that keys have over all. Values have none and stay as they are.

    Left alone: caches that are not recognized as such, each with its reason; an unrecognized reader of the keys leaves
    them unrotated.

    Error: half a step of the codes, for keys and values each; SQNR of both forms is in the report.

    Attributes:
        format: ``fp8`` (E4M3), ``int8`` or ``int4``.
        scales: ``per_token`` or ``static``.
        keys, values: another format for one of them; ``float`` leaves it in float.
        group_size: channels of a head that share a scale per token; -1: all of them; None: 16 for ``int4``, all for
            others.
        symmetric: no zero point; None: only ``int4`` has one.
        rotate: turn queries and keys.
        per_head: a static scale for every head, instead of one for the tensor; for floats.

    Raises:
        RecipeError: for an unknown format, or options that do not go together.
    """

    format: str = "int8"
    scales: Literal["per_token", "static"] = "per_token"
    keys: str | None = None
    values: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    rotate: bool = False
    per_head: bool = False

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, FLOAT_CACHE})
    establishes: ClassVar[frozenset[str]] = frozenset({CACHE_QUANTIZED})
    rewrites_upstream: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, name in (("format", self.format), ("keys", self.keys), ("values", self.values)):
            if name not in _DTYPES and not (option != "format" and name in (None, "float")):
                raise RecipeError(
                    "unknown format of a cache", where=option, got=name, expected=", ".join((*_DTYPES, "float"))
                )
        if self.keys == self.values == "float":
            raise RecipeError("a cache quantizer that quantizes nothing", got="keys='float', values='float'")
        if self.group_size is not None and self.group_size != -1 and self.group_size < 1:
            raise RecipeError("group_size out of range", got=self.group_size, expected="-1, or a positive number")
        if self.rotate and self.keys == "float":
            raise RecipeError("keys in float are not rotated", got="keys='float', rotate=True")
        for part in ("key", "value"):
            self._format_of(part, _NARROW_GROUP)

    def check(self, graph: Graph) -> None:
        """Refuses a model without a cache in float, and formats that do not fit its heads.

        Raises:
            UnsupportedModelError: if there is no cache, or none in float that is recognized as one.
            RecipeError: if the format does not fit its heads.
        """
        caches = float_caches(graph)
        if not caches:
            raise UnsupportedModelError(
                "this model has no cache to quantize",
                got="a quantized cache" if graph.signature.has_quantized_cache else "no key-value cache in float",
                expected="keys and values that are appended to those that came in",
                remedy="leave the cache out of the recipe",
            )
        for cache in caches:
            spec = self._format_of(cache.part, cache.width)
            if spec is not None:
                spec.check_width(cache.width, cache.name)
            if self.rotate and cache.part == "key" and factors_of(cache.width) is None:
                raise RecipeError(
                    "no Hadamard matrix is known for heads of this width",
                    where=cache.name,
                    got=f"{cache.width} channels",
                    remedy="rotate=False",
                )

    def cache_formats(self) -> tuple[CacheFormat, ...]:
        """Of keys and of values."""
        found = (self._format_of(part, _NARROW_GROUP) for part in ("key", "value"))
        return tuple(dict.fromkeys(spec for spec in found if spec is not None))

    def planned_caches(self, graph: Graph) -> dict[str, CacheFormat]:
        """Keys and values that are recognized, but for those that stay in float."""
        found = {cache.name: self._format_of(cache.part, cache.width) for cache in float_caches(graph)}
        return {name: spec for name, spec in found.items() if spec is not None}

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """The caches of a segment, together."""
        inside = set(segment.nodes())
        caches = tuple(cache for cache in float_caches(graph) if cache.append in inside)
        return [_CacheWave(caches)] if any(self._format_of(c.part, c.width) for c in caches) else []

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """The ranges of what is cached."""
        assert isinstance(wave, _CacheWave)
        return [self._tap(cache) for cache in wave.caches if self._format_of(cache.part, cache.width) is not None]

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Quantizes the caches of a segment."""
        assert isinstance(wave, _CacheWave)
        reports: list[SiteReport] = []
        skips: list[Skip] = []
        changed: dict[Tap, Any] = {}
        for cache in wave.caches:
            start = time.perf_counter()
            spec = self._format_of(cache.part, cache.width)
            if spec is None:
                skips.append(Skip(cache.name, self.name, "left in float by the recipe", asked=True))
                continue
            seen: HeadRange = statistics[self._tap(cache)]
            if not seen.rows:
                raise ZeroCoverageError(
                    "calibration never reached this cache", where=cache.name, expected="at least one token"
                )
            rotated = self._rotates(cache)
            if self.rotate and cache.part == "key" and not rotated:
                skips.append(Skip(cache.name, self.name, "not rotated: something else than attention reads its keys"))
            changed.update({Tap(node, Gram): DROP for node in descendants(cache.append.users)})
            details = self._quantize(cache, spec, seen, context.graph, rotated=rotated)
            reports.append(
                SiteReport(
                    cache.name,
                    self.name,
                    f"cache {spec}{', rotated' if rotated else ''}",
                    details["per_token_sqnr_db"] if spec.scales == "per_token" else details["static_sqnr_db"],
                    seconds=time.perf_counter() - start,
                    details=details,
                )
            )
        if not any(self._format_of(cache.part, cache.width) for cache in float_caches(context.graph)):
            skips += self._unrecognized(context.graph)
        return PassResult(modified=bool(reports), sites=tuple(reports), skips=tuple(skips), statistics=changed)

    def _unrecognized(self, graph: Graph) -> list[Skip]:
        """What is left in float when all is done, unasked."""
        known = {(cache.layer, cache.part) for cache in float_caches(graph)}
        left = [port for port in graph.signature.inputs if port.role == "past" and port.dtype in FLOAT_CACHES]
        reason = "not recognized as keys or values that are appended to those that came in"
        return [
            Skip(f"cache.{port.layer}.{port.part}", self.name, reason)
            for port in left
            if port.part in ("key", "value") and (port.layer, port.part) not in known
        ]

    def _rotates(self, cache: Cache) -> bool:
        return self.rotate and cache.part == "key" and cache.can_rotate

    def _tap(self, cache: Cache) -> Tap:
        """What is known of a cache before it is quantized."""
        return Tap(cache.new, TurnedHeadRange if self._rotates(cache) else HeadRange)

    def _quantize(
        self, cache: Cache, spec: CacheFormat, seen: HeadRange, graph: Graph, *, rotated: bool
    ) -> dict[str, Any]:
        """Rewrites one cache; returns what the report says of it beside its format."""
        low, high = (end.cpu() for end in seen.result())
        tokens = seen.tokens().cpu()
        static = CacheFormat(spec.dtype, "static", symmetric=spec.symmetric, per_head=spec.per_head)
        scale, zero = static_qparams(static, low, high)
        names: tuple[str | None, str | None] = (None, None)
        if spec.scales == "static":
            names = f"{cache.name}_scale", None if zero is None else f"{cache.name}_zero_point"
            graph.weights.set(f"{cache.name}_scale", scale)
            if zero is not None:
                graph.weights.set(f"{cache.name}_zero_point", zero)
        keep_range(graph, cache, low, high)
        quantize_cache(graph, cache, spec, *names, rotated=rotated)
        per_token = None if spec.scales == "static" else sqnr_db(tokens, _per_token(tokens, spec))
        return {
            "form": spec.scales,
            "per_token_sqnr_db": per_token,
            "static_sqnr_db": sqnr_db(tokens, _rounded(tokens, static, scale, zero)),
            "seen": [float(low.min()), float(high.max())],
            "bytes_per_token": spec.bytes_per_token(cache.heads, cache.width),
            "rotated": rotated,
        }

    def _format_of(self, part: str, width: int) -> CacheFormat | None:
        """The format of keys or values; None for float."""
        name = (self.keys if part == "key" else self.values) or self.format
        if name == "float":
            return None
        group: int | None = None if self.group_size == -1 else self.group_size
        if self.group_size is None and name == "int4" and self.scales == "per_token":
            group = math.gcd(_NARROW_GROUP, width)
        symmetric = name != "int4" if self.symmetric is None else self.symmetric
        return CacheFormat(_DTYPES[name], self.scales, group, symmetric, self.per_head)


class TurnedHeadRange(HeadRange):
    """The same of values whose heads are rotated by a Hadamard matrix."""

    def update(self, batch: Tensor, reference: Tensor | None = None) -> None:
        """Takes ``[B, H, S, D]`` as they are before they are rotated."""
        super().update(_canonical.hadamard(batch, batch.shape[-1]))


@dataclass(frozen=True)
class _CacheWave(Sequence[Site]):
    """Caches that are rewritten together; no sites."""

    caches: tuple[Cache, ...]

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...

    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        return ()[index]

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Site]:
        return iter(())


def _per_token(tokens: Tensor, spec: CacheFormat) -> Tensor:
    """What tokens ``[1, H, n, D]`` are in the cache, with ranges of their own."""
    block = spec.block(tokens.shape[-1])
    scale, zero = _canonical.choose_block_qparams(tokens, spec.code_dtype, block, spec.bits)
    return _rounded(tokens, spec, scale.float(), None if spec.symmetric else zero)


def _rounded(tokens: Tensor, spec: CacheFormat, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Quantized and dequantized."""
    axis, block = spec.place(tokens.shape[-1])
    codes = _canonical.quantize(tokens, scale, zero, axis, block, spec.code_dtype, spec.bits)
    rounded: Tensor = _canonical.dequantize(codes, scale, zero, axis, block, torch.float32)
    return rounded
