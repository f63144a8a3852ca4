"""Times of linear layers, ours and PyTorch's, on weights that lie in memory."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import products
from benchmarks.kernels.products import Unsupported
from benchmarks.kernels.protocol import copies_needed
from benchmarks.kernels.records import Baseline, LeftOut, Record, Time
from benchmarks.kernels.sections import Bench, Case
from benchmarks.kernels.weights import dense

__all__ = ["FORMATS", "SHAPES", "cases"]

SHAPES = {
    (8192, 8192): (1, 16, 64, 256, 2048, 4),
    (4096, 4096): (1, 16, 64),
    (11008, 4096): (1,),
    (14336, 4096): (1, 16, 64, 256, 2048, 4),
    (4096, 14336): (1, 16, 64, 256, 2048, 4),
}
"""Rows that are timed, most telling first, by (out, in) features."""
_SMALL_SHAPES = {(256, 512): (1, 16), (512, 256): (1, 32)}


@dataclass(frozen=True)
class Format:
    """Rows of the table.

    Attributes:
        name: of the number format.
        make: ``(bench, out, in) -> Product``; `products.Product`.
        library: whether it is a product of PyTorch's.
    """

    name: str
    make: Callable[[Bench, int, int], products.Product]
    library: bool = False


FORMATS = (
    Format("w4a16", products.weight_only("w4a16")),
    Format("w8a16", products.weight_only("w8a16")),
    Format("w8a8", products.scaled("w8a8-dynamic")),
    Format("fp8", products.scaled("fp8-dynamic")),
    Format("lut4 + 0.45 %", products.codebooks(4, is_sparse=True)),
    Format("lut3", products.codebooks(3, is_sparse=False)),
    Format("w8a8", products.library_int8(with_quantizer=True), library=True),
    Format("fp8", products.library_fp8(with_quantizer=True), library=True),
    Format("w4 bfloat16, tinygemm", products.tinygemm, library=True),
    Format("int8 product alone", products.library_int8(with_quantizer=False), library=True),
    Format("fp8 product alone", products.library_fp8(with_quantizer=False), library=True),
)
"""What is timed beside 16 bits: ours first."""


def cases(bench: Bench) -> Iterator[Case]:
    """One per shape, number of rows and format; the 16 bits of a shape come before all that is compared with them."""
    shapes = _SMALL_SHAPES if bench.is_small else SHAPES
    for (out_features, in_features), all_rows in shapes.items():
        for rows in all_rows:
            for dtype in (torch.float16, torch.bfloat16):
                name = f"{rows}x{out_features}x{in_features} {_short(dtype)}"
                yield Case(name, _baseline(out_features, in_features, rows, dtype))
        for form in FORMATS:
            for rows in all_rows:
                name = f"{rows}x{out_features}x{in_features} {form.name}{' (library)' if form.library else ''}"
                yield Case(name, _timed(name, form, out_features, in_features, rows))


def _baseline(
    out_features: int, in_features: int, rows: int, dtype: torch.dtype
) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        bench.drop("products")
        generator = torch.Generator(bench.device).manual_seed(0)

        def make() -> list[Tensor]:
            first = dense(out_features, in_features, dtype, generator)
            return [first, *(first.clone() for _ in range(_copies(bench, first.nbytes) - 1))]

        weights = bench.keep("weights", (out_features, in_features, dtype), make)
        x = torch.randn(rows, in_features, device=bench.device, generator=generator).to(dtype)
        calls = [partial(F.linear, x, w) for w in weights]
        nbytes = weights[0].nbytes + _vectors(rows, out_features, in_features)
        yield Baseline(
            bench.section.name,
            f"{rows}x{out_features}x{in_features}",
            _short(dtype),
            "cuBLAS" if bench.device.type == "cuda" else "CPU library",
            bench.timer.measure(calls),
            bench.timer.measure(calls[:1]),
            nbytes,
        )

    return run


def _timed(
    name: str, form: Format, out_features: int, in_features: int, rows: int
) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        bench.drop("weights")

        def make() -> tuple[products.Product, list[Callable[[Any], Tensor]]]:
            made = form.make(bench, out_features, in_features)
            return made, _rotated(bench, made)

        try:
            product, copies = bench.keep("products", (form.make, out_features, in_features), make)
            product.check_rows(rows)
            x = product.make_input(rows)
            calls = [partial(apply, x) for apply in copies]
            calls[0]()
        except Unsupported as reason:
            yield LeftOut(bench.section.name, name, str(reason))
            return
        except RuntimeError as error:
            if not form.library:
                raise
            yield LeftOut(bench.section.name, name, f"PyTorch: {str(error).splitlines()[0][:150]}")
            return
        bench.search(calls)
        yield Time(
            bench.section.name,
            f"{rows}x{out_features}x{in_features}",
            form.name,
            product.implementation,
            bench.timer.measure(calls),
            bench.timer.measure(calls[:1]),
            product.nbytes + _vectors(rows, out_features, in_features),
            note=product.note,
        )

    return run


def _rotated(bench: Bench, product: products.Product) -> list[Callable[[Any], Tensor]]:
    """The product on as many copies of its weights as the protocol asks for."""
    copies = [product.weights]
    copies += [copy.deepcopy(product.weights) for _ in range(_copies(bench, product.nbytes) - 1)]
    return [partial(_apply, product, w) for w in copies]


def _apply(product: products.Product, weights: Any, x: Any) -> Tensor:
    return product.apply(x, weights)


def _copies(bench: Bench, nbytes: int) -> int:
    return copies_needed(nbytes, bench.l2_bytes) if bench.device.type == "cuda" else 2


def _vectors(rows: int, out_features: int, in_features: int) -> int:
    """Bytes of input and output in 16 bits."""
    return 2 * rows * (out_features + in_features)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
