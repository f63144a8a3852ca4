"""``gated(gate, up, activation)``: ``activation(gate) * up`` in one launch, computed in float32 and rounded once.

Activations are ``silu``, ``gelu`` (by the error function) and ``gelu_tanh``. `gated_reference` is what the CPU runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import library

__all__ = ["ACTIVATIONS", "check", "gated_reference"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def gated_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` in float32, in the dtype of ``gate``."""
    wide = gate.float()
    if activation == "silu":
        opened = F.silu(wide)
    else:
        opened = F.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (opened * up.float()).to(gate.dtype)


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Holds the arguments of the operator against what it takes.

    Raises:
        InputError: naming what does not fit.
    """
    if activation not in ACTIVATIONS:
        raise InputError("no such activation", where="activation", got=activation, expected=", ".join(ACTIVATIONS))
    if gate.dtype not in _FLOATS:
        expected = "float32, float16 or bfloat16"
        raise InputError("a gate of another dtype", where="gate", got=gate.dtype, expected=expected)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{up.dtype} {list(up.shape)}"
        raise InputError("gate and value differ", where="up", got=got, expected=f"{gate.dtype} {list(gate.shape)}")
    if gate.device != up.device:
        raise InputError("tensors on several devices", where="up", got=up.device, expected=gate.device)


def _gated_cpu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check(gate, up, activation)
    return gated_reference(gate, up, activation)


def _gated_cuda(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from qcompiler.lowering.kernels.rows.triton_gated import launch

    check(gate, up, activation)
    with torch.cuda.device(gate.device):
        return launch(gate, up, activation)


def _gated_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


library.define(
    "gated(Tensor gate, Tensor up, str activation) -> Tensor",
    fake=_gated_fake,
    cpu=_gated_cpu,
    cuda=_gated_cuda,
)
