"""Optimization profiles: the sizes that inputs may have, and those that kernels are chosen for."""

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from qcompiler.errors import TargetError, did_you_mean
from qcompiler.ir import BATCH, PAST, SEQUENCE, Port

__all__ = ["Profile", "Sizes", "default_profiles", "make_profile", "parse_profiles"]

Shape = tuple[int, ...]
Sizes = tuple[int, int, int]
"""The least, the one that kernels are chosen for, and the largest."""

_PIECE, _OPTIMAL_PIECE = 512, 128
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Profile:
    """Shapes of all inputs whose sizes vary.

    Attributes:
        name: such as ``prefill``.
        shapes: by name of the input: the least, the optimal and the largest.
    """

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON fields."""
        return {"name": self.name, "shapes": {name: [list(s) for s in shapes] for name, shapes in self.shapes.items()}}


def default_profiles(
    ports: Iterable[Port], *, batch: int = 1, length: int, piece: int | None = None, step: int = 1, least: int = 1
) -> tuple[Profile, ...]:
    """A profile to read a prompt with, and where there is a cache one to decode with.

    ``prefill`` takes ``least`` to ``piece`` tokens behind none to ``length - piece``: a longer prompt is read in
    pieces, the shorter one first. ``decode`` is fixed at one sequence and one token, where the builder takes
    matrix-vector kernels (or takes up to ``step``), behind none to ``length - 1``; with a larger ``batch``,
    ``decode_batch`` takes one token of each of them.

    Args:
        ports: the inputs, with symbolic sizes.
        batch: sequences at once, at most.
        length: tokens of a sequence at most, prompt and answer together.
        piece: tokens of the prompt at once, at most; by default 512.
        step: tokens at once while decoding, at most. Weights of 8 bits that floats are multiplied with are dequantized
            by a kernel of their own where it is 1, and as they are multiplied where it is 2 (seen with 1.7).
        least: tokens at once while reading, at least. What is less is read by ``decode``, one by one.

    Raises:
        TargetError: for a size that is no expression of batch, sequence and past length, or sizes that do not hold.
    """
    ports = tuple(ports)
    has_cache = PAST in _symbols(ports)
    for what, got in (("batch", batch), ("length", length), ("piece", 1 if piece is None else piece), ("step", step)):
        if got < 1:
            raise TargetError("a profile needs sizes of at least one", where=what, got=got)
    piece = min(length, piece or (_PIECE if has_cache else length))
    if piece < least:
        raise TargetError(
            "the profiles are shorter than what is read at once",
            where="length",
            got=piece,
            expected=f"at least {least}",
        )
    tokens = (least, max(least, min(piece, _OPTIMAL_PIECE)), piece)
    batches, past = (1, 1, batch), (0, 0, length - piece)
    found = [make_profile("prefill", ports, {BATCH: batches, SEQUENCE: tokens, PAST: past})]
    if has_cache:
        past = (0, (length - 1) // 2, length - step)
        found.append(make_profile("decode", ports, {BATCH: (1, 1, 1), SEQUENCE: (1, 1, step), PAST: past}))
        if batch > 1:
            batches = (1, batch, batch)
            found.append(make_profile("decode_batch", ports, {BATCH: batches, SEQUENCE: (1, 1, step), PAST: past}))
    return tuple(found)


def parse_profiles(text: str, ports: Iterable[Port], *, positions: int | None = None) -> tuple[Profile, ...]:
    """Profiles written as ``NAME:SYMBOL=SIZES:.../NAME:...``, such as this::

        prefill:sequence=1..128..512:past_sequence=0..512/decode:sequence=1:past_sequence=0..256..1023

    Sizes are ``N``, which fixes it, ``LEAST..MOST``, where kernels are chosen for the largest, or
    ``LEAST..OPTIMAL..MOST``. Symbols are those that the inputs' sizes are written with; ``batch`` is 1 unless given.

    Args:
        text: the profiles.
        ports: the inputs, with symbolic sizes.
        positions: tokens of a sequence that the model can tell apart; None: any.

    Raises:
        TargetError: for a text that is not of this form, an unknown or missing symbol, sizes out of order, or more
            tokens than the model has positions.
    """
    ports = tuple(ports)
    symbols = _symbols(ports)
    found: list[Profile] = []
    for part in text.split("/"):
        name, *items = part.split(":")
        if not name.isidentifier() or name in [profile.name for profile in found]:
            raise TargetError(
                "a profile begins with a name of its own", where="profiles", got=part, expected="such as decode:..."
            )
        sizes: dict[str, Sizes] = {}
        for item in items:
            symbol, equals, size = item.partition("=")
            if not equals or symbol in sizes:
                raise TargetError(
                    "a profile is symbols with their sizes, each at most once",
                    where=f"profile {name}",
                    got=item,
                    expected="SYMBOL=LEAST..OPTIMAL..MOST",
                )
            if symbol not in symbols:
                raise TargetError(
                    "no size of the inputs has this symbol",
                    where=f"profile {name}",
                    got=symbol,
                    expected=", ".join(symbols),
                    remedy=did_you_mean(symbol, symbols),
                )
            sizes[symbol] = _sizes(size, f"{symbol} of profile {name}")
        if BATCH in symbols:
            sizes.setdefault(BATCH, (1, 1, 1))
        found.append(make_profile(name, ports, sizes, positions=positions))
    return tuple(found)


def make_profile(
    name: str, ports: Iterable[Port], sizes: Mapping[str, Sizes], *, positions: int | None = None
) -> Profile:
    """The shapes of inputs for sizes of their symbols.

    Args:
        name: of the profile.
        ports: the inputs; those of fixed sizes are left out.
        sizes: by symbol; those that no input has are ignored.
        positions: tokens of a sequence that the model can tell apart; None: any.

    Raises:
        TargetError: if a symbol is missing, sizes are out of order or negative, or too long for the model.
    """
    ports = tuple(ports)
    where = f"profile {name}"
    for symbol in _symbols(ports):
        if symbol not in sizes:
            raise TargetError("a profile says nothing of one of the symbols", where=where, expected=symbol)
        least, optimal, most = sizes[symbol]
        if not (0 if symbol == PAST else 1) <= least <= optimal <= most:
            raise TargetError(
                "the sizes of a profile do not hold",
                where=f"{symbol} of {where}",
                got="..".join(map(str, sizes[symbol])),
                expected=f"{0 if symbol == PAST else 1} <= LEAST <= OPTIMAL <= MOST",
            )
    tokens = sum(sizes[symbol][2] for symbol in _symbols(ports) if symbol in (SEQUENCE, PAST))
    if positions is not None and tokens > positions:
        raise TargetError(
            "a profile takes longer texts than the model",
            where=where,
            got=f"{tokens} tokens",
            expected=f"at most {positions}, those given at once and those behind which they stand together",
        )
    shapes = {
        port.name: (_shape(port, sizes, 0), _shape(port, sizes, 1), _shape(port, sizes, 2))
        for port in ports
        if not all(isinstance(dim, int) for dim in port.shape)
    }
    return Profile(name, shapes)


def _shape(port: Port, sizes: Mapping[str, Sizes], which: int) -> Shape:
    values = {symbol: three[which] for symbol, three in sizes.items()}
    return tuple(_size(dim, values, port) for dim in port.shape)


def _size(dim: int | str, values: Mapping[str, int], port: Port) -> int:
    def computed(tree: ast.expr) -> int:
        if isinstance(tree, ast.BinOp):
            return _ARITHMETIC[type(tree.op)](computed(tree.left), computed(tree.right))
        return values[tree.id] if isinstance(tree, ast.Name) else int(ast.literal_eval(tree))

    return dim if isinstance(dim, int) else computed(_tree(dim, port))


def _tree(dim: str, port: Port) -> ast.expr:
    try:
        tree = ast.parse(dim, mode="eval").body
    except SyntaxError as error:
        raise _not_a_size(dim, port) from error
    for part in ast.walk(tree):
        is_number = isinstance(part, ast.Constant) and isinstance(part.value, int)
        if not is_number and not isinstance(part, (ast.Name, ast.Load, ast.BinOp, *_ARITHMETIC)):
            raise _not_a_size(dim, port)
    return tree


def _not_a_size(dim: int | str, port: Port) -> TargetError:
    return TargetError(
        "the size of an input cannot be told from others",
        where=port.name,
        got=dim,
        expected="sums and products of symbols and numbers",
    )


def _symbols(ports: Sequence[Port]) -> tuple[str, ...]:
    names = (
        tree.id
        for port in ports
        for dim in port.shape
        if isinstance(dim, str)
        for tree in ast.walk(_tree(dim, port))
        if isinstance(tree, ast.Name)
    )
    return tuple(dict.fromkeys(names))


def _sizes(text: str, where: str) -> Sizes:
    numbers = text.split("..")
    if len(numbers) > 3 or not all(number.isdecimal() for number in numbers):
        raise TargetError(
            "these are no sizes", where=where, got=text, expected="N, LEAST..MOST, or LEAST..OPTIMAL..MOST"
        )
    values = [int(number) for number in numbers]
    if len(values) == 2:
        values.insert(1, values[1])
    return (values[0], values[0], values[0]) if len(values) == 1 else (values[0], values[1], values[2])
