"""Linear layers that are timed: our modules, and PyTorch's own low-bit products as PyTorch offers them.

Weights are random codes made on the device (`weights`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.sections import Bench
from benchmarks.kernels.weights import SPARSE_SHARE, affine, codebook
from qcompiler.ir import Affine, Codebook
from qcompiler.numerics import QuantSpec, Scheme

__all__ = [
    "Product",
    "Unsupported",
    "codebooks",
    "library_fp8",
    "library_int8",
    "scaled",
    "tinygemm",
    "weight_only",
]

Make = Callable[[Bench, int, int], "Product"]
_LEAST_ROWS = 17  # of torch._int_mm on CUDA


class Unsupported(Exception):
    """PyTorch does not have the product for this device or shape."""


@dataclass(frozen=True)
class Product:
    """A linear layer.

    Attributes:
        implementation: what computes it.
        weights: a module or tuple of tensors; deep copies are rotated.
        apply: the product, of an input and weights.
        make_input: an input of so many rows.
        nbytes: of weights, scales and zero points.
        least_rows: that it takes.
        note: for the reader.
    """

    implementation: str
    weights: Any
    apply: Callable[[Any, Any], Tensor]
    make_input: Callable[[int], Any]
    nbytes: int
    least_rows: int = 1
    note: str = ""

    def check_rows(self, rows: int) -> None:
        """Raises Unsupported for fewer rows than it takes."""
        if rows < self.least_rows:
            raise Unsupported(f"PyTorch's takes {self.least_rows} rows or more")


def _generator(bench: Bench) -> torch.Generator:
    return torch.Generator(bench.device).manual_seed(1)


def _dtype(bench: Bench) -> torch.dtype:
    """Of activations: PyTorch's fast low-bit operators on a CPU take bfloat16 alone."""
    return torch.float16 if bench.device.type == "cuda" else torch.bfloat16


def _inputs(bench: Bench, width: int, dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, width, device=bench.device, generator=_generator(bench)).to(dtype)


def _stored_bytes(weight: Affine | Codebook) -> int:
    return -(-weight.stored_bits // 8)


def weight_only(name: str) -> Make:
    """Our weight-only layer."""

    def make(bench: Bench, out_features: int, in_features: int) -> Product:
        from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear

        weight = affine(out_features, in_features, _weight_spec(name), torch.float16, _generator(bench))
        module = WeightOnlyLinear.from_weight(weight, None, device=bench.device, dtype=_dtype(bench))
        make_input = _inputs(bench, in_features, _dtype(bench))
        return Product(_chosen(module), module, lambda x, layer: layer(x), make_input, _stored_bytes(weight))

    return make


def codebooks(bits: int, *, is_sparse: bool) -> Make:
    """Our layer with a table per output channel, and a sparse matrix beside it or none."""

    def make(bench: Bench, out_features: int, in_features: int) -> Product:
        from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear

        share = SPARSE_SHARE if is_sparse else 0.0
        weight = codebook(out_features, in_features, bits, _generator(bench), sparse_share=share)
        module = CodebookLinear.from_weight(weight, None, device=bench.device, dtype=_dtype(bench))
        make_input = _inputs(bench, in_features, _dtype(bench))
        return Product(_chosen(module), module, lambda x, layer: layer(x), make_input, _stored_bytes(weight))

    return make


def scaled(name: str) -> Make:
    """Our quantizer and our layer behind it: what a W8A8 or FP8 layer costs from 16 bits to 16 bits."""

    def make(bench: Bench, out_features: int, in_features: int) -> Product:
        from qcompiler.lowering.kernels.rows import quantize_rows  # noqa: F401  defines the operator
        from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear

        activation = Scheme.parse(name).activation
        assert activation is not None
        weight = affine(out_features, in_features, _weight_spec(name), torch.float32, _generator(bench))
        module = ScaledLinear.from_weight(weight, None, activation=activation, device=bench.device, dtype=_dtype(bench))

        def apply(x: Tensor, layer: Any) -> Tensor:
            y: Tensor = layer(*torch.ops.qcompiler_kernels.quantize_rows(x, activation.code_dtype, 1.0))
            return y

        make_input = _inputs(bench, in_features, _dtype(bench))
        note = "quantizing the activations is in the time"
        return Product(_chosen(module), module, apply, make_input, _stored_bytes(weight), note=note)

    return make


def library_int8(*, with_quantizer: bool) -> Make:
    """``torch._int_mm``: with our quantizer before it and the scales after it in PyTorch, or alone."""

    def make(bench: Bench, out_features: int, in_features: int) -> Product:
        weight = affine(out_features, in_features, _weight_spec("w8a8-dynamic"), torch.float32, _generator(bench))
        weights = (weight.codes, weight.scale.reshape(1, -1))
        dtype = _dtype(bench)
        least = _LEAST_ROWS if bench.device.type == "cuda" else 1
        if not with_quantizer:
            return Product(
                "torch._int_mm",
                weights,
                lambda codes, w: torch._int_mm(codes, w[0].t()),
                _random_codes(bench, in_features, torch.int8),
                weight.codes.nbytes,
                least,
                "codes in, int32 out: neither quantizer nor scales",
            )

        def apply(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
            codes, scale = torch.ops.qcompiler_kernels.quantize_rows(x, torch.int8, 1.0)
            y: Tensor = torch._int_mm(codes, w[0].t()) * scale * w[1]
            return y.to(dtype)

        _define_quantizer()
        note = "our quantizer, the product, and the scales in operators of PyTorch, each a kernel"
        make_input = _inputs(bench, in_features, dtype)
        return Product("torch._int_mm", weights, apply, make_input, _stored_bytes(weight), least, note)

    return make


def library_fp8(*, with_quantizer: bool) -> Make:
    """``torch._scaled_mm`` with a scale per row and column; bfloat16 comes out, it has no float16 of this kind."""

    def make(bench: Bench, out_features: int, in_features: int) -> Product:
        if bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) < (9, 0):
            raise Unsupported("torch._scaled_mm with scales per row needs compute capability 9.0")
        weight = affine(out_features, in_features, _weight_spec("fp8-dynamic"), torch.float32, _generator(bench))
        weights = (weight.codes, weight.scale.reshape(1, -1))

        def multiply(pair: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]) -> Tensor:
            codes, scale = pair
            return torch._scaled_mm(codes, w[0].t(), scale_a=scale, scale_b=w[1], out_dtype=torch.bfloat16)

        if not with_quantizer:
            codes = _random_codes(bench, in_features, torch.float8_e4m3fn)

            def make_pair(rows: int) -> tuple[Tensor, Tensor]:
                return codes(rows), torch.full((rows, 1), 0.01, device=bench.device)

            note = "codes in, bfloat16 out: no quantizer"
            return Product("torch._scaled_mm", weights, multiply, make_pair, _stored_bytes(weight), note=note)

        def quantize_and_multiply(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
            return multiply(torch.ops.qcompiler_kernels.quantize_rows(x, torch.float8_e4m3fn, 1.0), w)

        _define_quantizer()
        note = "our quantizer, then the product, with its scales and bfloat16 out"
        make_input = _inputs(bench, in_features, torch.bfloat16)
        return Product("torch._scaled_mm", weights, quantize_and_multiply, make_input, _stored_bytes(weight), note=note)

    return make


def tinygemm(bench: Bench, out_features: int, in_features: int) -> Product:
    """``torch._weight_int4pack_mm``, groups of 128, with zero points; bfloat16."""
    if bench.device.type != "cuda":
        raise Unsupported("torch._weight_int4pack_mm is for CUDA")
    group, inner = 128, 8
    codes = torch.randint(256, (out_features, in_features // 2), dtype=torch.uint8, device=bench.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, inner)
    places = (in_features // group, out_features, 2)
    scale_zero = torch.rand(places, device=bench.device).mul_(0.01).to(torch.bfloat16)
    nbytes = packed.nbytes + scale_zero.nbytes

    def apply(x: Tensor, w: tuple[Tensor, Tensor]) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, w[0], group, w[1])
        return y

    make_input = _inputs(bench, in_features, torch.bfloat16)
    return Product("torch._weight_int4pack_mm", (packed, scale_zero), apply, make_input, nbytes, note="groups of 128")


def _weight_spec(name: str) -> QuantSpec:
    spec = Scheme.parse(name).weight
    assert spec is not None
    return spec


def _random_codes(bench: Bench, width: int, dtype: torch.dtype) -> Callable[[int], Tensor]:
    def make(rows: int) -> Tensor:
        wide = torch.randn(rows, width, device=bench.device, generator=_generator(bench)).mul_(40).clamp_(-127, 127)
        return wide.to(dtype)

    return make


def _define_quantizer() -> None:
    from qcompiler.lowering.kernels.rows import quantize_rows  # noqa: F401


def _chosen(module: Any) -> str:
    choice = module.choice
    return f"ours, {choice.implementation}" + (f" ({choice.reason})" if choice.reason else "")
