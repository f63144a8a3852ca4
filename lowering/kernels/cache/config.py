"""Launch configurations of attention over a cache."""

from dataclasses import dataclass
from functools import cache

from qcompiler.lowering.kernels.cache.decode_attention import Side

__all__ = ["Config", "Tile", "configs", "default_config", "kind_of", "padded_words", "power_of_2", "registers"]

_SHARED = 84 * 1024  # bytes for tiles of codes: 99 KiB are the least that devices have, queries and weights need some


@dataclass(frozen=True)
class Config:
    """A launch.

    Attributes:
        tokens: that a program takes at a time, a power of two, more than its rows.
        warps: of 32 threads.
        stages: tiles of tokens on their way at once, the one in use included.
        programs: per multiprocessor; the tokens are split until there are so many.
    """

    tokens: int
    warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class Tile:
    """What configurations depend on.

    Attributes:
        rows: queries that a program holds, 16 or 32.
        words: 16-bit words of the values of a token, padded.
        token_bytes: of the codes of a token, keys and values, padded.
    """

    rows: int
    words: int
    token_bytes: int

    @classmethod
    def of(cls, rows: int, keys: Side, values: Side) -> "Tile":
        """The tile for a number of queries that read one head of the cache.

        Warps share the tokens, then the words of the result; 32 rows are worth while where there are enough of both.
        """
        words = padded_words(values)
        token_bytes = 2 * (words + padded_words(keys))
        is_wide = rows > 16 and words >= 64 and 2 * 64 * token_bytes <= _SHARED
        return cls(32 if is_wide else 16, words, token_bytes)


@cache
def default_config(tile: Tile) -> Config:
    """The first that fits of larger and smaller tiles."""
    return configs(tile)[0]


@cache
def configs(tile: Tile) -> tuple[Config, ...]:
    """What a search tries, the default first."""
    if tile.words <= tile.rows:  # several warps would compute the same
        shapes = [(32, 1, 4, 8), (32, 1, 3, 8), (32, 1, 4, 16)]
    elif tile.rows == 32:
        shapes = [(64, 8, 3, 2), (64, 8, 2, 2), (64, 8, 4, 2)]
    else:
        shapes = [
            (64, 4, 3, 4),
            (64, 4, 2, 4),
            (32, 2, 3, 8),
            (64, 4, 4, 4),
            (64, 4, 3, 2),
            (128, 8, 2, 2),
            (128, 8, 3, 2),
        ]
    fitting = [Config(*shape) for shape in shapes if (shape[2] - 1) * shape[0] * tile.token_bytes <= _SHARED]
    return tuple(fitting) or (Config(32, 2, 2, 4),)


def registers(keys: Side, values: Side, config: Config) -> int:
    """Most registers of a thread: 128, where they suffice, for four programs of 128 threads on a multiprocessor.

    Left to itself, the compiler gives up a register or two for less.
    """
    is_large = config.warps < 4 or max(keys.width, values.width) > 128
    is_large |= any(side.spec is None and side.width & (side.width - 1) for side in (keys, values))  # masks of padding
    return 255 if is_large or any(side.groups > 1 or side.zero is not None for side in (keys, values)) else 128


def kind_of(side: Side) -> tuple[str, int]:
    """Name of the unpacking, and codes per word of 16 bits."""
    if side.spec is None:
        return "float", 1
    if side.spec.is_packed:
        return "int4", 4
    return ("fp8" if side.spec.is_float else "int8" if side.spec.symmetric else "uint8"), 2


def power_of_2(least: int) -> int:
    """The next; Triton's own takes microseconds, at every launch."""
    return 1 << (least - 1).bit_length()


def padded_words(side: Side) -> int:
    """Words that the codes of one token take, as loaded: a power of two, 16 at least."""
    return max(16, power_of_2(side.width) // kind_of(side)[1])
