"""The permutes, emulated instruction by instruction, against the tables they read."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.codebook_linear.layout import pack_codes, pack_table
from qcompiler.lowering.kernels.codebook_linear.triton_lookup import ASSEMBLY, rows_are_apart

WORD = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """``prmt.b32`` in its default mode: bytes of ``b:a`` by nibbles, bit 3 repeats the sign of the byte instead."""
    source = [(b << 32 | a) >> 8 * place & 0xFF for place in range(8)]
    result = 0
    for place in range(4):
        nibble = selector >> 4 * place & 0xF
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def choose(a: int, b: int, c: int, truth: int) -> int:
    """``lop3.b32``: a function of three bits by its table of truth."""
    result = 0
    for bit in range(32):
        place = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
        result |= (truth >> place & 1) << bit
    return result


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & WORD,
    "prmt.b32": permute,
    "lop3.b32": choose,
}


def emulate(text: str, operands: dict[str, int]) -> dict[str, int]:
    registers = dict(operands)
    for line in text.strip("{}\n").splitlines():
        if line.startswith(("//", ".reg")):
            continue
        match = re.fullmatch(r"(\S+) (.*);", line)
        assert match is not None
        opcode, rest = match.groups()
        target, *sources = rest.split(", ")
        values = [registers[source] if source in registers else int(source, 0) for source in sources]
        registers[target] = INSTRUCTIONS[opcode](*values)
    return registers


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_byte_finds_the_entries_of_its_codes(bits: int) -> None:
    """All 16 bits of every entry, for every byte of codes, in every one of the four places of a word."""
    text, constraints = ASSEMBLY[bits]
    outputs = constraints.count("=r")
    assert constraints.split(",") == ["=r"] * outputs + ["r"] * (constraints.count("r") - outputs)
    codes = torch.randint(0, 1 << bits, (16, 1024), dtype=torch.uint8)
    table = torch.randint(-(1 << 15), 1 << 15, (16, 1 << bits), dtype=torch.int16)
    packed = pack_codes(codes, bits).numpy()[0]  # [4 blocks, bits, 16, 32]
    words = pack_table(table).numpy().view(np.uint32)  # [planes, 16]
    planes = 3 if bits == 3 else 1
    groups = outputs // 4
    seen = set()
    for block, row, element in ((b, r, e) for b in range(4) for r in range(16) for e in range(0, 32, 4)):
        for first in range(0, bits, planes):
            operands = {}
            for plane in range(planes):
                four = packed[block, first + plane, row, element : element + 4]
                operands[f"${outputs + plane}"] = int.from_bytes(four.tobytes(), "little")
                seen |= set(four.tolist())
            for word, value in enumerate(words[:, row]):
                for same in range(4):
                    operands[f"${outputs + planes + 4 * word + same}"] = int(value) if same == 0 else 0xBAD
            result = emulate(text, operands)
            for tile in range(2 * groups):
                pairs = [result[f"${2 * tile + half}"] for half in range(2)]
                got = np.array(pairs, np.uint32).view(np.int16)
                place = block * 256 + (first // planes * 2 * groups + tile) * 32 + element
                wanted = table[row, codes[row, place : place + 4].long()].numpy()
                assert got.tolist() == wanted.tolist()
    assert len(seen) > 250


def test_the_layout_is_read_from_the_assembly() -> None:
    comment = next(line for line in ASSEMBLY[3][0].splitlines() if line.startswith("//"))
    together = re.sub(r"\$\d+", "%r5", comment)
    apart = together.replace("%r5", "%r6", 1)
    assert rows_are_apart(f"x\n{together}\ny") == ""
    assert "several rows" in rows_are_apart(f"{together}\n{apart}")
    assert "no lookup" in rows_are_apart("prmt.b32 %r1, %r2, %r3, %r4;")
