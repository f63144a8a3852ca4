"""A part of building: attention over caches of a fixed capacity.

Fused for a few new tokens, on dequantized values for many.
"""

from typing import cast

import torch
from torch import Tensor, nn

from qcompiler.ir import CacheFormat
from qcompiler.lowering.kernels.cache.decode_attention import MOST_QUERIES, choose
from qcompiler.lowering.kernels.launch.device import Choice, Device

__all__ = ["CachedAttention", "dequantized"]

_canonical = torch.ops.qcompiler


def dequantized(
    spec: CacheFormat | None, codes: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A cache in float ``[B, H, T, D]``, computed in float32 as the graph has it.

    Args:
        spec: its format; None in float.
        codes, scale, zero_point: see `qcompiler.lowering.kernels.cache.append`.
        dtype: of the result.
    """
    if spec is None:
        return codes.to(dtype)
    assert scale is not None
    codes = _canonical.unpack_nibbles(codes, spec.symmetric) if spec.is_packed else codes
    axis, block = spec.place(codes.shape[3])
    values: Tensor = _canonical.dequantize(codes, scale.float(), zero_point, axis, block, torch.float32)
    return values.to(dtype)


class CachedAttention(nn.Module):
    """Softmax attention, causal, of new tokens over caches they have been appended to.

    Args:
        keys, values: formats of the caches; None in float, of ``dtype``.
        widths: channels of a head of keys, and of values.
        scale: factor of the scores.
        window: only the last ``window`` tokens; None: all.
        softcap: ``c * tanh(scores / c)``; None: the scores.
        device: where it will run.
        dtype: of queries and result.

    Attributes:
        choice: the implementation for up to 16 new tokens.
    """

    def __init__(
        self,
        keys: CacheFormat | None,
        values: CacheFormat | None,
        widths: tuple[int, int],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.scale, self.window, self.softcap = scale, window, softcap
        name = str(dtype).removeprefix("torch.")
        self._names = [name if spec is None else spec.dtype for spec in (keys, values)]
        self.choice: Choice = choose(keys, values, max(widths), Device.of(device), dtype)

    def forward(
        self,
        q: Tensor,
        length: Tensor,
        total: int,
        k_codes: Tensor,
        k_scale: Tensor | None,
        k_zero: Tensor | None,
        v_codes: Tensor,
        v_scale: Tensor | None,
        v_zero: Tensor | None,
    ) -> Tensor:
        """The result of queries, which are the last tokens of the cache.

        Args:
            q: ``[B, Hq, S, D]``.
            length: int32 ``[1]`` on the device: tokens in the caches, the new ones too.
            total: the same number; not looked at where attention is fused.
            k_codes, k_scale, k_zero, v_codes, v_scale, v_zero: the caches ``[B, H, capacity, ...]``; scales and zero
                points may be stored ones.

        Returns:
            ``[B, Hq, S, Dv]`` of the dtype of ``q``.
        """
        if self.choice.is_fused and q.shape[2] <= MOST_QUERIES:
            fused: Tensor = torch.ops.qcompiler_kernels.decode_attention(
                q,
                k_codes,
                k_scale,
                k_zero,
                v_codes,
                v_scale,
                v_zero,
                length,
                *self._names,
                self.scale,
                self.window,
                self.softcap,
            )
            return fused
        k = dequantized(self.keys, *self._used(self.keys, k_codes, k_scale, k_zero, total), q.dtype)
        v = dequantized(self.values, *self._used(self.values, v_codes, v_scale, v_zero, total), q.dtype)
        result: Tensor = _canonical.attention(q, k, v, None, self.scale, True, self.window, self.softcap)
        return result

    @staticmethod
    def _used(
        spec: CacheFormat | None, codes: Tensor, scale: Tensor | None, zero: Tensor | None, total: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What of a cache is in use."""
        used = codes.narrow(2, 0, total)
        if spec is None or spec.scales == "static":
            return used, scale, zero
        parts = (None if part is None else part.narrow(2, 0, total) for part in (scale, zero))
        return used, *cast(tuple[Tensor | None, Tensor | None], tuple(parts))

    def extra_repr(self) -> str:
        """Formats and implementation, as printed with a module."""
        return f"keys {self.keys or 'float'}, values {self.values or 'float'}, {self.choice.implementation}"
