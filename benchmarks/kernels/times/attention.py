"""Times of decode attention: one new token per sequence over a cache that lies in memory."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.caches import FORMATS, RandomCache, random_cache
from benchmarks.kernels.protocol import copies_needed
from benchmarks.kernels.records import Baseline, Record, Time
from benchmarks.kernels.sections import Bench, Case

__all__ = ["cases", "shape_name"]

_HEADS, _KV_HEADS, _WIDTH = 32, 8, 128
_SHAPES = ((1, 32_768), (8, 32_768), (1, 4096), (8, 4096))
_SMALL_SHAPES = ((1, 128), (2, 64))


def shape_name(batch: int, context: int) -> str:
    """As tables have it."""
    return f"batch {batch}, context {context}"


def cases(bench: Bench) -> Iterator[Case]:
    """PyTorch's attention over a cache in float16, then ours over each format."""
    for batch, context in _SMALL_SHAPES if bench.is_small else _SHAPES:
        shape = shape_name(batch, context)
        yield Case(f"{shape} PyTorch", _baseline(batch, context))
        for name in FORMATS:
            yield Case(f"{shape} {name}", _ours(batch, context, name))


def _dtype(bench: Bench) -> torch.dtype:
    return torch.float16 if bench.device.type == "cuda" else torch.bfloat16


def _setting(
    bench: Bench, batch: int, context: int, name: str
) -> tuple[Tensor, list[tuple[RandomCache, RandomCache]], int]:
    """Queries, caches in rotation, and bytes that one launch has to move."""
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (batch, _KV_HEADS, context, _WIDTH)

    def make() -> list[tuple[RandomCache, RandomCache]]:
        first = (
            random_cache(FORMATS[name], shape, _dtype(bench), generator),
            random_cache(FORMATS[name], shape, _dtype(bench), generator),
        )
        nbytes = first[0].nbytes + first[1].nbytes
        copies = copies_needed(nbytes, bench.l2_bytes) if bench.device.type == "cuda" else 2
        return [first, *((first[0].clone(), first[1].clone()) for _ in range(copies - 1))]

    caches = bench.keep("caches", (shape, name), make)
    q = torch.randn(batch, _HEADS, 1, _WIDTH, device=bench.device, generator=generator).to(_dtype(bench))
    return q, caches, caches[0][0].nbytes + caches[0][1].nbytes + 2 * q.nbytes


def _baseline(batch: int, context: int) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        q, caches, nbytes = _setting(bench, batch, context, "float16")

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        calls = [partial(attend, k.codes, v.codes) for k, v in caches]
        cold, warm = bench.timer.measure(calls), bench.timer.measure(calls[:1])
        shape = shape_name(batch, context)
        yield Baseline(bench.section.name, shape, "float16", "scaled_dot_product_attention", cold, warm, nbytes)

    return run


def _ours(batch: int, context: int, name: str) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        from qcompiler.lowering.kernels.cache.decode_attention import choose
        from qcompiler.lowering.kernels.launch.device import Device

        q, caches, nbytes = _setting(bench, batch, context, name)
        length = torch.tensor([context], dtype=torch.int32, device=bench.device)

        def attend(k: RandomCache, v: RandomCache) -> Tensor:
            sides = (k.codes, k.scale, k.zero, v.codes, v.scale, v.zero)
            found: Tensor = torch.ops.qcompiler_kernels.decode_attention(
                q, *sides, length, k.dtype, v.dtype, _WIDTH**-0.5
            )
            return found

        calls = [partial(attend, k, v) for k, v in caches]
        bench.search(calls)
        choice = choose(FORMATS[name], FORMATS[name], _WIDTH, Device.of(bench.device), q.dtype)
        implementation = f"ours, {choice.implementation}" + (f" ({choice.reason})" if choice.reason else "")
        cold, warm = bench.timer.measure(calls), bench.timer.measure(calls[:1])
        yield Time(bench.section.name, shape_name(batch, context), name, implementation, cold, warm, nbytes)

    return run
