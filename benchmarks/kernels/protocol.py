"""The arithmetic of the timings.

A launch of a decoding step finds its weights in memory, not in the L2 cache, which would hold a whole 4-bit matrix. So
every launch takes another copy of the weights, and the copies together are many times what the cache holds.
"""

import math
import statistics
from collections.abc import Sequence

__all__ = [
    "REPLAYS",
    "ROTATED_BYTES",
    "bandwidth_share",
    "copies_needed",
    "per_launch",
    "rounds_needed",
    "tokens_per_second",
]

ROTATED_BYTES = 240_000_000
"""Bytes of distinct operands that one round of launches reads, at least."""
REPLAYS = 20
"""Replays that a median is taken of, at least."""
_CACHE_MULTIPLE = 4
_REPLAY_SECONDS = 5e-4


def copies_needed(nbytes: int, l2_bytes: int = 0) -> int:
    """Copies of an operand that together are no smaller than `ROTATED_BYTES` and four L2 caches; at least two.

    Args:
        nbytes: of one copy.
        l2_bytes: of the device's L2 cache; 0 where it has none that is known.
    """
    return max(2, math.ceil(max(ROTATED_BYTES, _CACHE_MULTIPLE * l2_bytes) / max(nbytes, 1)))


def rounds_needed(seconds: float) -> int:
    """Rounds through all copies that one replay holds, so that it takes half a millisecond and what starting a graph
    costs is lost in it.

    Args:
        seconds: that one round takes, about.
    """
    return max(1, math.ceil(_REPLAY_SECONDS / max(seconds, 1e-9)))


def per_launch(replays: Sequence[float], launches: int) -> float:
    """Seconds of one launch: the median replay divided by the launches in it."""
    return statistics.median(replays) / launches


def bandwidth_share(nbytes: int, seconds: float, copy_bandwidth: float) -> float:
    """Bytes that had to be moved per second, as a share of what a copy moves (reads and writes counted)."""
    return nbytes / seconds / copy_bandwidth


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Of one decoding step that yields a token for every sequence of the batch."""
    return tokens / seconds
