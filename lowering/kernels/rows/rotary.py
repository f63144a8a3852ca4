"""Rotary embeddings in one launch, of one tensor or of queries and keys together, in float32 and rounded once.

| operator | result |
|---|---|
| ``rotary(x, cos, sin, interleaved, dtype)`` | ``x * cos + rotated(x) * sin``, in ``dtype``; None: that of ``x`` |
| ``rotary_pair(q, k, cos, sin, interleaved, q_dtype, k_dtype)`` | the same of both |

``rotated`` is that of the canonical ``rotary``, which is their reference: halves, or neighbours where interleaved, are
exchanged, and one of them negated. Cosines and sines are as a graph has them, ``[..., D]`` and broadcast to ``x``.
`rotary_reference` is what the CPU runs.
"""

import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import library

__all__ = ["MOST_AXES", "check", "rotary_reference"]

MOST_AXES = 4
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """``x[..., D]`` turned by angles whose cosines and sines are given, computed in float32."""
    turned: Tensor = torch.ops.qcompiler.rotary(x.float(), cos.float(), sin.float(), interleaved)
    return turned.to(x.dtype if dtype is None else dtype)


def check(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None, name: str = "x") -> None:
    """Holds the arguments of either operator against what it takes.

    Raises:
        InputError: naming what does not fit.
    """
    if x.dtype not in _FLOATS or not 1 <= x.dim() <= MOST_AXES or x.shape[-1] % 2:
        raise InputError(
            "no vectors that can be turned",
            where=name,
            got=f"{x.dtype} {list(x.shape)}",
            expected=f"float32, float16 or bfloat16 of an even width and at most {MOST_AXES} axes",
        )
    if dtype is not None and dtype not in _FLOATS:
        raise InputError("no dtype of results", where=name, got=dtype, expected=", ".join(map(str, _FLOATS)))
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in _FLOATS:
        got, expected = (f"{table.dtype} {list(table.shape)}" for table in (sin, cos))
        raise InputError("sines that are not like the cosines", where="sin", got=got, expected=expected)
    fits = cos.dim() <= x.dim() and all(n in (1, m) for n, m in zip(cos.shape[::-1], x.shape[::-1], strict=False))
    if not fits or cos.dim() == 0 or cos.shape[-1] != x.shape[-1]:
        raise InputError("angles that do not fit", where=name, got=list(cos.shape), expected=f"for {list(x.shape)}")
    for where, table in (("cos", cos), ("sin", sin)):
        if table.device != x.device:
            raise InputError("tensors on several devices", where=where, got=table.device, expected=x.device)


def _rotary_cpu(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None) -> Tensor:
    check(x, cos, sin, dtype)
    return rotary_reference(x, cos, sin, interleaved, dtype).contiguous()


def _rotary_pair_cpu(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_dtype: torch.dtype | None = None,
    k_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    _check_pair(q, k, cos, sin, q_dtype, k_dtype)
    return (
        rotary_reference(q, cos, sin, interleaved, q_dtype).contiguous(),
        rotary_reference(k, cos, sin, interleaved, k_dtype).contiguous(),
    )


def _check_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_dtype: torch.dtype | None, k_dtype: torch.dtype | None
) -> None:
    check(q, cos, sin, q_dtype, "q")
    check(k, cos, sin, k_dtype, "k")
    if q.dtype != k.dtype or q.shape[-1] != k.shape[-1]:
        got, expected = f"{k.dtype} of {k.shape[-1]}", f"{q.dtype} of {q.shape[-1]}, as the queries"
        raise InputError("keys that are not like the queries", where="k", got=got, expected=expected)


def _rotary_cuda(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None) -> Tensor:
    from qcompiler.lowering.kernels.rows.triton_rotary import launch

    check(x, cos, sin, dtype)
    with torch.cuda.device(x.device):
        return launch([x], cos, sin, interleaved, [dtype])[0]


def _rotary_pair_cuda(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_dtype: torch.dtype | None = None,
    k_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    from qcompiler.lowering.kernels.rows.triton_rotary import launch

    _check_pair(q, k, cos, sin, q_dtype, k_dtype)
    with torch.cuda.device(q.device):
        turned = launch([q, k], cos, sin, interleaved, [q_dtype, k_dtype])
    return turned[0], turned[1]


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _rotary_pair_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_dtype: torch.dtype | None = None,
    k_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=q_dtype), k.new_empty(k.shape, dtype=k_dtype)


library.define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, ScalarType? dtype=None) -> Tensor",
    fake=_rotary_fake,
    cpu=_rotary_cpu,
    cuda=_rotary_cuda,
)
library.define(
    "rotary_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, ScalarType? q_dtype=None, "
    "ScalarType? k_dtype=None) -> (Tensor, Tensor)",
    fake=_rotary_pair_fake,
    cpu=_rotary_pair_cpu,
    cuda=_rotary_pair_cuda,
)
