"""Whole decoding steps of the shape of Llama-2-7B, weights at random: what a stack of the fused operators yields.

Layers are made of one that is random and copies of it in other memory; codes are made on the device. The original is
the same stack in float16, with PyTorch's own products, norms and attention.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.caches import RandomCache, cache_format, random_cache
from benchmarks.kernels.products import codebooks, scaled, weight_only
from benchmarks.kernels.records import Baseline, Record, Time
from benchmarks.kernels.sections import Bench, Case
from benchmarks.kernels.weights import dense
from qcompiler.ir import CacheFormat

__all__ = ["LLAMA_2_7B", "Recipe", "Shape", "Stack", "cases"]

_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Of a decoder.

    Attributes:
        layers, hidden, intermediate, heads, vocabulary: as configurations call them; every head has keys of its own.
        context: tokens in the cache, the new one included.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    context: int

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of the linear layers of one decoder layer."""
        square = (self.hidden, self.hidden)
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return {"q": square, "k": square, "v": square, "o": square, "gate": up, "up": up, "down": down}


LLAMA_2_7B = Shape(32, 4096, 11008, 32, 32_000, 1024)
_SMALL = Shape(2, 256, 512, 4, 512, 32)


@dataclass(frozen=True)
class Recipe:
    """How a stack is quantized.

    Attributes:
        name: of the recipe.
        make: ``(bench, out, in) -> Product`` of one linear layer; None: float16, in PyTorch's operators.
        codes: dtype of activations; None for 16 bits.
        cache: its format, as `caches.cache_format` has it.
    """

    name: str
    make: Callable[[Bench, int, int], Any] | None = None
    codes: torch.dtype | None = None
    cache: str = "float16"


_RECIPES = (
    Recipe("float16"),
    Recipe("w4a16", weight_only("w4a16")),
    Recipe("w8a8", scaled("w8a8-dynamic"), torch.int8),
    Recipe("w8a16", weight_only("w8a16")),
    Recipe("fp8", scaled("fp8-dynamic"), torch.float8_e4m3fn),
    Recipe("lut4 + 0.45 %", codebooks(4, is_sparse=True)),
    Recipe("w4a16, int8 cache", weight_only("w4a16"), None, "int8"),
    Recipe("w8a8, int8 cache", scaled("w8a8-dynamic"), torch.int8, "int8"),
    Recipe("lut3", codebooks(3, is_sparse=False)),
)


def cases(bench: Bench) -> Iterator[Case]:
    """One per recipe and batch."""
    for recipe in _RECIPES:
        for batch in (1, 2) if bench.is_small else (1, 32):
            yield Case(f"{recipe.name}, batch {batch}", _case(recipe, batch))


def _case(recipe: Recipe, batch: int) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        shape = _SMALL if bench.is_small else LLAMA_2_7B
        stack = bench.keep("stack", (recipe.name, shape), lambda: Stack(bench, shape, recipe))
        state = stack.state(batch)
        seconds = bench.timer.measure([lambda: stack.step(state)])
        moved = stack.nbytes + sum(k.nbytes + v.nbytes for k, v in state.caches)
        kind = Baseline if recipe.make is None else Time
        name = f"{shape.layers} layers of {shape.hidden}, batch {batch}, context {shape.context}"
        yield kind(bench.section.name, name, recipe.name, stack.implementation, seconds, None, moved, batch)

    return run


@dataclass(frozen=True)
class _State:
    """What belongs to a batch: hidden states of the new tokens, caches of each layer, and where the tokens stand."""

    x: Tensor
    caches: list[tuple[RandomCache, RandomCache]]
    cos: Tensor
    sin: Tensor
    start: Tensor
    length: Tensor
    place: Tensor


class Stack:
    """Decoder layers and an output head.

    Attributes:
        implementation: what computes the linear layers.
        nbytes: of all weights, as they are stored.
    """

    def __init__(self, bench: Bench, shape: Shape, recipe: Recipe) -> None:

        self.shape, self.recipe, self.device = shape, recipe, bench.device
        self.dtype = torch.float16 if bench.device.type == "cuda" else torch.bfloat16
        generator = torch.Generator(bench.device).manual_seed(0)
        self.generator = generator
        first: dict[str, Any] = {}
        self.nbytes = 0
        chosen: dict[str, None] = {}
        for name, (outputs, inputs) in shape.linears.items():
            if recipe.make is None:
                first[name] = dense(outputs, inputs, self.dtype, generator)
                self.nbytes += shape.layers * first[name].nbytes
                chosen["PyTorch"] = None
            else:
                product = recipe.make(bench, outputs, inputs)
                first[name] = product.weights
                self.nbytes += shape.layers * product.nbytes
                chosen[product.implementation] = None
        self.implementation = "; ".join(chosen)
        self.layers = [first, *(copy.deepcopy(first) for _ in range(shape.layers - 1))]
        self.norm = torch.ones(shape.hidden, dtype=self.dtype, device=bench.device)
        self.head = dense(shape.vocabulary, shape.hidden, self.dtype, generator)
        self.nbytes += self.head.nbytes

    def state(self, batch: int) -> _State:
        """Caches that are full but for the place of the new token."""
        shape, device = self.shape, self.device
        spec: CacheFormat | None = cache_format(self.recipe.cache)
        place = (batch, shape.heads, shape.context, shape.width)
        first = tuple(random_cache(spec, place, self.dtype, self.generator) for _ in range(2))
        caches = [(first[0], first[1])] + [(first[0].clone(), first[1].clone()) for _ in range(shape.layers - 1)]
        x = torch.randn(batch, 1, shape.hidden, generator=self.generator, device=device).to(self.dtype)
        angle = torch.rand(1, 1, 1, shape.width, generator=self.generator, device=device)
        start = torch.tensor([shape.context - 1], dtype=torch.int32, device=device)
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return _State(x, caches, cos, sin, start, start + 1, start.long())

    def step(self, state: _State) -> Tensor:
        """Logits ``[B, 1, vocabulary]`` of one new token per sequence."""
        x = state.x
        for layer, cache in zip(self.layers, state.caches, strict=True):
            q, k, v = self._behind_norm(layer, ("q", "k", "v"), x)
            x = x + self._alone(layer["o"], self._attend(q, k, v, cache, state))
            gate, up = self._behind_norm(layer, ("gate", "up"), x)
            x = x + self._alone(layer["down"], self._gated(gate, up))
        return F.linear(self._norm(x), self.head)

    def _norm(self, x: Tensor) -> Tensor:
        if self.recipe.make is None:
            return F.rms_norm(x, (self.shape.hidden,), self.norm, _EPS)
        normed: Tensor = torch.ops.qcompiler_kernels.rms_norm(x, self.norm, _EPS)
        return normed

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.recipe.make is None:
            return F.silu(gate) * up
        product: Tensor = torch.ops.qcompiler_kernels.gated(gate, up, "silu")
        return product

    def _behind_norm(self, layer: dict[str, Any], names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        if self.recipe.codes is not None:
            parts = torch.ops.qcompiler_kernels.rms_norm_quantize_rows(x, self.norm, _EPS, self.recipe.codes)
            return [layer[name](*parts) for name in names]
        normed = self._norm(x)
        return [self._multiply(layer[name], normed) for name in names]

    def _alone(self, linear: Any, x: Tensor) -> Tensor:
        if self.recipe.codes is None:
            return self._multiply(linear, x)
        y: Tensor = linear(*torch.ops.qcompiler_kernels.quantize_rows(x, self.recipe.codes))
        return y

    def _multiply(self, linear: Any, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, linear) if self.recipe.make is None else linear(x)
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[RandomCache, RandomCache], state: _State) -> Tensor:
        keys, values = cache
        q, k, v = (t.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for t in (q, k, v))
        ours = torch.ops.qcompiler_kernels
        if self.recipe.make is None:
            q, k = (torch.ops.qcompiler.rotary(t, state.cos, state.sin, False) for t in (q, k))
            keys.codes.index_copy_(2, state.place, k)
            values.codes.index_copy_(2, state.place, v)
            found = F.scaled_dot_product_attention(q, keys.codes, values.codes)
            return found.transpose(1, 2).flatten(2)
        q, k = ours.rotary_pair(q, k, state.cos, state.sin, False)
        for side, new in ((keys, k), (values, v)):
            if side.scale is None:
                ours.append_static(new, side.codes, None, None, state.start, side.dtype)
            else:
                width = self.shape.width
                ours.append_quantized(new, side.codes, side.scale, side.zero, state.start, side.dtype, width, True)
        sides = (keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero)
        scale = self.shape.width**-0.5
        attended: Tensor = ours.decode_attention(q, *sides, state.length, keys.dtype, values.dtype, scale)
        return attended.transpose(1, 2).flatten(2)
