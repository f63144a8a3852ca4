"""Appending to caches, and attention over them, against the graph's own operators."""

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.kernels.caches import RandomCache, cache_format, random_cache
from benchmarks.kernels.comparing import compare, compare_codes
from benchmarks.kernels.records import Record
from benchmarks.kernels.sections import Bench, Case

__all__ = ["cases"]

_PER_TOKEN = ("int8", "fp8", "int4", "int8 asym", "int4 asym", "int4 asym g32", "int8 g64", "fp8 g32")
_STATIC = ("int8 static", "fp8 static", "int4 static", "int8 asym static", "int4 asym static")
_HEADS = ((32, 8, 128), (4, 4, 64), (8, 1, 128), (6, 2, 96), (16, 8, 256), (2, 2, 40))


def cases(bench: Bench) -> Iterator[Case]:
    """Attention and appending, one case per format and dtype."""
    for dtype in bench.dtypes:
        short = str(dtype).removeprefix("torch.")
        for name in (short, *_PER_TOKEN, *_STATIC):
            label = f"attention over {name}" + ("" if name == short else f", {short}")
            yield Case(label, _attention(label, name, dtype))
        for name in (short, *_PER_TOKEN, *_STATIC):
            label = f"append to {name}" + ("" if name == short else f", {short}")
            yield Case(label, _append(label, name, dtype))


def _start(bench: Bench, label: str) -> tuple[random.Random, torch.Generator]:
    draw = random.Random(zlib.crc32(label.encode()))
    return draw, torch.Generator(bench.device).manual_seed(draw.randrange(1 << 30))


def _heads(draw: random.Random, name: str, count: int) -> list[tuple[int, int, int]]:
    """Heads that the format fits: the first, which models have, and others at random."""
    spec = cache_format(name)
    fitting = [h for h in _HEADS[1:] if spec is None or h[2] % spec.block(h[2]) == 0]
    return [_HEADS[0], *draw.sample(fitting, min(count, len(fitting)))]


def _attention(label: str, name: str, dtype: torch.dtype) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        from qcompiler.lowering.kernels.cache.decode_attention import decode_attention_reference

        draw, generator = _start(bench, label)
        spec = cache_format(name)
        longest = 200 if bench.is_small else 2500
        for query_heads, heads, width in _heads(draw, name, 2):
            batch, queries = draw.choice((1, 2, 3)), draw.choice((1, 1, 2, 5, 16))
            length = draw.randrange(queries, longest)
            capacity = length + draw.choice((0, 1, 63))
            shape = (batch, heads, capacity, width)
            keys, values = (random_cache(spec, shape, dtype, generator) for _ in range(2))
            _spoil(keys, length)
            _spoil(values, length)
            q = torch.randn(batch, query_heads, queries, width, generator=generator, device=bench.device).to(dtype)
            sides = (keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero)
            options = (
                torch.tensor([length], dtype=torch.int32, device=bench.device),
                keys.dtype,
                values.dtype,
                width**-0.5,
                draw.choice((None, None, 7, 100)),
                draw.choice((None, None, 30.0)),
            )
            expected = decode_attention_reference(q.float(), *sides, *options)

            def call(q: Tensor = q, sides: Any = sides, options: Any = options) -> Tensor:
                found: Tensor = torch.ops.qcompiler_kernels.decode_attention(q, *sides, *options)
                return found

            text = f"{label}: {batch}x{query_heads}/{heads}x{width}, {queries} over {length}"
            yield compare(bench.section.name, text, call, expected)

    return run


def _spoil(cache: RandomCache, length: int) -> None:
    """Makes what lies behind the tokens in use NaN, or as large as it can be: it must not be read into a result."""
    if cache.codes.dtype.is_floating_point:
        cache.codes.view(torch.uint8 if cache.codes.element_size() == 1 else torch.int16)[:, :, length:] = 0x7F
        if cache.codes.element_size() > 1:
            cache.codes[:, :, length:] = float("nan")
    if cache.scale is not None and cache.scale.dim() == 4 and cache.scale.shape[2] == cache.codes.shape[2]:
        cache.scale[:, :, length:] = float("nan")


def _append(label: str, name: str, dtype: torch.dtype) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        from qcompiler.lowering.kernels.cache import append as cache_append

        draw, generator = _start(bench, label)
        spec = cache_format(name)
        for _, heads, width in _heads(draw, name, 2):
            batch, tokens = draw.choice((1, 2, 3)), draw.choice((1, 1, 3, 17))
            capacity = tokens + draw.randrange(70)
            cache = random_cache(spec, (batch, heads, capacity, width), dtype, generator)
            new = torch.randn(batch, heads, tokens, width, generator=generator, device=bench.device).to(dtype)
            start = torch.tensor([draw.randrange(capacity - tokens + 1)], dtype=torch.int32, device=bench.device)
            if spec is None or spec.scales == "static":
                options: tuple[Any, ...] = (cache.dtype,)
                operator, reference = "append_static", cast(Any, cache_append.append_static_reference)
            else:
                options = (cache.dtype, spec.block(width), spec.symmetric)
                operator, reference = "append_quantized", cache_append.append_quantized_reference
            is_packed = spec is not None and spec.is_packed
            wanted = cache.clone()
            reference(new, wanted.codes, wanted.scale, wanted.zero, start, *options)

            def call(
                new: Tensor = new,
                cache: RandomCache = cache,
                start: Tensor = start,
                operator: str = operator,
                options: tuple[Any, ...] = options,
                is_packed: bool = is_packed,
            ) -> tuple[Tensor, ...]:
                mine = cache.clone()
                getattr(torch.ops.qcompiler_kernels, operator)(new, mine.codes, mine.scale, mine.zero, start, *options)
                return _comparable(mine, is_packed)

            codes, *others = _comparable(wanted, is_packed)
            text = f"{label}: {batch}x{heads}x{width}, {tokens} into {capacity}"
            yield compare_codes(bench.section.name, text, call, codes, tuple(others))

    return run


def _comparable(cache: RandomCache, is_packed: bool) -> tuple[Tensor, ...]:
    """Codes as numbers of which neighbours differ by one: packed ones apart, 16-bit floats by their bits."""
    codes = cache.codes
    if is_packed:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1)
    elif codes.dtype.is_floating_point and codes.element_size() > 1:
        codes = codes.view(torch.int16 if codes.element_size() == 2 else torch.int32)
    return (codes, *(t for t in (cache.scale, cache.zero) if t is not None))
