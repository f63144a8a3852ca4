"""Triton kernel of gated activations: element by element, halves of one matrix read where they lie."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompiler.lowering.kernels.launch.machine_code import KernelCase
from qcompiler.lowering.kernels.rows.gated import ACTIVATIONS

__all__ = ["ahead_of_time", "launch"]

_SMALL, _LARGE = (256, 1), (1024, 4)  # elements and warps of one program: eight elements for each thread
_MANY = 1 << 20  # elements that keep a device busy in large programs


@triton.jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    out_ptr,
    width,
    blocks,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """``BLOCK`` elements of a row, of which there are ``blocks`` each."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        opened = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        opened = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(y)) is the logistic function of 2 y.
        twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        opened = gate / (1.0 + tl.exp(-twice))
    tl.store(out_ptr + row * width + columns, (opened * up).to(out_ptr.dtype.element_ty), mask=mask)


def launch(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The operator, of arguments that have been checked; copies what does not lie in rows at equal distances."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.numel():
        return out
    is_one = gate.is_contiguous() and up.is_contiguous()
    width = gate.numel() if is_one else gate.shape[-1]
    gates, ups = (_rows(tensor, width) for tensor in (gate, up))
    block, warps = _SMALL if gate.numel() < _MANY else _LARGE
    blocks = triton.cdiv(width, block)
    _gated_kernel[(len(gates) * blocks,)](
        gates,
        ups,
        out,
        width,
        blocks,
        gates.stride(0),
        ups.stride(0),
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=warps,
    )
    return out


def _rows(tensor: Tensor, width: int) -> Tensor:
    rows = tensor.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def ahead_of_time() -> Iterator[KernelCase]:
    """Every activation in every dtype, in small and in large programs."""
    for block, warps in (_SMALL, _LARGE):
        for activation in ACTIVATIONS:
            for floats in ("bf16", "fp16", "fp32"):
                pointers = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{floats}")
                yield KernelCase(
                    name=f"{activation}-{block}-{floats}{'-default' if (block, floats) == (256, 'bf16') else ''}",
                    kernel=_gated_kernel,
                    types={**pointers, **dict.fromkeys(("width", "blocks", "gate_stride", "up_stride"), "i32")},
                    constants={"BLOCK": block, "ACTIVATION": activation},
                    options={"num_warps": warps},
                    mma={80: None, 90: None},
                )
