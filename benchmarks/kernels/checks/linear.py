"""Linear layers of every number format against ``x @ dequantized.T`` in float32, on random shapes.

The reference takes the codes as they are before a layout is made of them, so the layout is checked too.
"""

import random
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels.comparing import compare
from benchmarks.kernels.records import Record, Verdict
from benchmarks.kernels.sections import Bench, Case
from benchmarks.kernels.weights import SPARSE_SHARE, affine, codebook
from qcompiler.ir import Affine, Codebook
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["cases", "draw_shapes"]

_FORMATS = {
    "weight-only": (
        "w4a16",
        "w4a16-asym",
        "w8a16",
        "w4a16-g32",
        "w4a16-channel",
        "w4a16-g64-asym",
        "w8a16-g128-asym",
        "w3a16",
        "w2a16-g64-asym",
        "w8a16-channel-asym",
        "w4a16-channel-asym",
        "w3a16-asym",
        "w2a16-g32",
    ),
    "scaled": ("w8a8-dynamic", "fp8-dynamic", "w8a8", "fp8", "w8a8-actsym", "w4a8-dynamic"),
    "codebook": (
        f"4 bits, {SPARSE_SHARE:.2%} sparse",
        "3 bits, 0% sparse",
        f"3 bits, {SPARSE_SHARE:.2%} sparse",
        "4 bits, 0% sparse",
        "4 bits, 5% sparse",
    ),
}
_ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 257, 513)


def cases(bench: Bench) -> Iterator[Case]:
    """One case per format and dtype of the section's kind of layer: those that matter most first."""
    kind = bench.section.name.removeprefix("check-")
    for name in _FORMATS[kind][:2] if bench.quick else _FORMATS[kind]:
        for dtype in bench.dtypes:
            label = f"{kind} {name} {_short(dtype)}"
            yield Case(label, _case(label, kind, name, dtype))


def _case(label: str, kind: str, name: str, dtype: torch.dtype) -> Any:
    def run(bench: Bench) -> Iterator[Record]:
        draw = random.Random(zlib.crc32(label.encode()))
        generator = torch.Generator(bench.device).manual_seed(draw.randrange(1 << 30))
        check = {"weight-only": _weight_only, "scaled": _scaled, "codebook": _codebook}[kind]
        for shape in draw_shapes(draw, 2 if bench.is_small else 3, bench.is_small):
            yield from check(bench, label, name, dtype, shape, draw, generator)

    return run


def draw_shapes(draw: random.Random, count: int, is_small: bool) -> list[tuple[int, int]]:
    """(out, in) features: one that tiles divide, the others odd multiples; in features of whole groups of 128."""
    largest = 4 if is_small else 24
    shapes = [(256, 512) if is_small else (1024, 2048)]
    while len(shapes) < count:
        shapes.append((16 * draw.randrange(1, 8 * largest), 128 * draw.randrange(1, largest)))
    return shapes


def _rows(draw: random.Random, is_small: bool) -> list[int]:
    chosen = {1, 16, *draw.sample(_ROWS[:12] if is_small else _ROWS, 2 if is_small else 4)}
    return [*sorted(chosen), 0]


def _input(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, device=generator.device).to(dtype)


def _bias(draw: random.Random, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    return None if draw.random() < 0.5 else _input(1, width, dtype, generator)[0]


def _name(label: str, rows: int, shape: tuple[int, int]) -> str:
    return f"{label}: {rows}x{shape[0]}x{shape[1]}"


def _weight_only(
    bench: Bench,
    label: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    draw: random.Random,
    generator: torch.Generator,
) -> Iterator[Record]:
    from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear

    spec = _spec(Scheme.parse(name).weight)
    weight = affine(*shape, spec, dtype, generator)
    bias = _bias(draw, shape[0], dtype, generator)
    module = WeightOnlyLinear.from_weight(weight, bias, device=bench.device, dtype=dtype)
    yield from _chosen(bench, label, module, shape)
    yield from _plain(bench, label, module, weight, bias, dtype, shape, draw, generator)


def _codebook(
    bench: Bench,
    label: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    draw: random.Random,
    generator: torch.Generator,
) -> Iterator[Record]:
    from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear

    bits, share = int(name[0]), float(name.split()[2].rstrip("%")) / 100
    weight = codebook(*shape, bits, generator, sparse_share=share, dtype=dtype)
    bias = _bias(draw, shape[0], dtype, generator)
    module = CodebookLinear.from_weight(weight, bias, device=bench.device, dtype=dtype)
    yield from _chosen(bench, label, module, shape)
    yield from _plain(bench, label, module, weight, bias, dtype, shape, draw, generator)


def _plain(
    bench: Bench,
    label: str,
    module: nn.Module,
    weight: Affine | Codebook,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    draw: random.Random,
    generator: torch.Generator,
) -> Iterator[Record]:
    full = weight.dequantize()
    for rows in _rows(draw, bench.is_small):
        x = _input(rows, shape[1], dtype, generator)
        expected = F.linear(x.float(), full, None if bias is None else bias.float())

        def run(x: Tensor = x) -> Tensor:
            found: Tensor = module(x)
            return found

        yield compare(bench.section.name, _name(label, rows, shape), run, expected)


def _scaled(
    bench: Bench,
    label: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    draw: random.Random,
    generator: torch.Generator,
) -> Iterator[Record]:
    from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear

    scheme = Scheme.parse(name)
    spec, activation = _spec(scheme.weight), _spec(scheme.activation)
    weight = affine(*shape, spec, torch.float32, generator)
    bias = _bias(draw, shape[0], dtype, generator)
    module = ScaledLinear.from_weight(weight, bias, activation=activation, device=bench.device, dtype=dtype)
    yield from _chosen(bench, label, module, shape)
    full = weight.dequantize()
    for rows in _rows(draw, bench.is_small):
        codes, scale, zero_point = _activation(rows, shape[1], activation, generator)
        centred = codes.float() - (0 if zero_point is None else zero_point.float())
        expected = F.linear(centred * scale, full, None if bias is None else bias.float())

        def run(codes: Tensor = codes, scale: Tensor = scale, zero_point: Tensor | None = zero_point) -> Tensor:
            found: Tensor = module(codes, scale, zero_point)
            return found

        yield compare(bench.section.name, _name(label, rows, shape), run, expected)


def _activation(
    rows: int, width: int, spec: QuantSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes as an activation quantizer gives them, with one scale per row or one for all."""
    device = generator.device
    places = (rows, 1) if spec.granularity == "per_token" else ()
    scale = torch.rand(places, generator=generator, device=device).add_(0.5).div_(50)
    if spec.is_float:
        wide = torch.randn(rows, width, generator=generator, device=device).mul_(100).clamp_(-448, 448)
        return wide.to(spec.code_dtype), scale, None
    low, high = spec.quant_min, spec.quant_max
    codes = torch.randint(low, high + 1, (rows, width), dtype=spec.code_dtype, generator=generator, device=device)
    zero_point = None if spec.symmetric else torch.tensor(117, dtype=spec.code_dtype, device=device)
    return codes, scale, zero_point


def _chosen(bench: Bench, label: str, module: Any, shape: tuple[int, int]) -> Iterator[Verdict]:
    """On CUDA: whether a kernel was chosen. FP8 has none before compute capability 8.9."""
    if bench.device.type != "cuda":
        return
    choice = module.choice
    is_exempt = "fp8" in label and torch.cuda.get_device_capability(bench.device) < (8, 9)
    detail = f"{choice.implementation}{': ' if choice.reason else ''}{choice.reason}"
    name = f"a kernel was chosen: {label} {shape[0]}x{shape[1]}"
    yield Verdict(bench.section.name, name, choice.is_fused or is_exempt, detail)


def _spec(spec: QuantSpec | None) -> QuantSpec:
    assert spec is not None
    return spec


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
