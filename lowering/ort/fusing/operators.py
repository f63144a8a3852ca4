"""What stands in a graph for operators of ONNX Runtime's own; nothing ever calls these, the dialect builds nodes."""

from typing import NoReturn

__all__ = [
    "gather_block_quantized",
    "group_query_attention",
    "matmul_nbits",
    "merge_heads",
    "rotary_embedding",
    "skip_layer_norm",
    "skip_rms_norm",
    "split_heads",
]


def matmul_nbits(*args: object, **options: object) -> NoReturn:
    """``(x, codes, scales, zero_points, biases)``, each but x a tuple, one entry for each layer side by side.

    Options: ``block``, ``bits``, ``groups`` (channels that share a stored scale), ``sites``; ``split``: as many results
    as layers, instead of all in one.
    """
    _never()


def group_query_attention(*args: object, **options: object) -> NoReturn:
    """``(q, k, v, past_key, past_value, mask, cos, sin, key_scale, value_scale)`` → ``[B, S, N·H]`` and both caches.

    Options: ``heads``, ``kv_heads``, ``width``, ``scale``, ``window``, ``softcap``, ``interleaved``, ``bits``.
    """
    _never()


def rotary_embedding(*args: object, **options: object) -> NoReturn:
    """``(x, positions, cos, sin)`` and ``interleaved``, of ``[B, N, S, H]``."""
    _never()


def merge_heads(*args: object, **options: object) -> NoReturn:
    """``[B, N, S, H]``, or with ``swapped=False`` ``[B, S, N, H]``, as ``[B, S, N·H]``."""
    _never()


def split_heads(*args: object, **options: object) -> NoReturn:
    """``[B, S, N·H]`` as ``[B, N, S, H]``; ``heads`` is N."""
    _never()


def skip_rms_norm(*args: object, **options: object) -> NoReturn:
    """``(x, skip, weight)`` and ``eps`` → the norm of the sum, and the sum."""
    _never()


def skip_layer_norm(*args: object, **options: object) -> NoReturn:
    """``(x, skip, weight, bias)`` and ``eps`` → the norm of the sum, and the sum."""
    _never()


def gather_block_quantized(*args: object, **options: object) -> NoReturn:
    """``(ids, codes, scale, zero_point)``, ``block`` and ``bits``."""
    _never()


def _never() -> NoReturn:
    raise TypeError("an operator of ONNX Runtime's own stands in a graph to be written, and is never computed here")
