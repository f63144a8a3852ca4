"""The namespace ``torch.ops.qcompiler_kernels``, and how an operator is put into it."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define"]

_LIBRARY = torch.library.Library("qcompiler_kernels", "DEF")


def define(schema: str, *, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> None:
    """Defines an operator for inference: no gradients.

    Args:
        schema: as ``torch.library`` takes it, such as ``scale_rows(Tensor x, Tensor scale) -> Tensor``.
        fake: shapes and dtypes of the results, for tracing.
        cpu: the implementation on the CPU.
        cuda: the implementation on CUDA devices; imports Triton itself, when it is called.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"qcompiler_kernels::{name}", fake, lib=_LIBRARY)
