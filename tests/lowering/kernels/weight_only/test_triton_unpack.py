"""The PTX that unpacks codes, run by a small emulator for every byte and zero point.

Interpreted kernels use plain Triton in its place, so nothing else looks at the constants without a GPU.
"""

import itertools
import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.weight_only.triton_unpack import assembly, constraints, magic

PARTS = {8: 1, 4: 2, 3: 4, 2: 4}


def to_floats(register: int, is_bfloat16: bool) -> tuple[np.float32, np.float32]:
    """The two numbers in a register, the lower half first."""
    halves = (register & 0xFFFF, register >> 16)
    if is_bfloat16:
        low, high = (struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves)
    else:
        low, high = (np.uint16(half).view(np.float16) for half in halves)
    return np.float32(low), np.float32(high)


def to_register(pair: tuple[float, float], is_bfloat16: bool) -> int:
    """Two numbers, rounded to nearest even, in one register."""
    dtype = torch.bfloat16 if is_bfloat16 else torch.float16
    low, high = torch.tensor(pair, dtype=torch.float64).to(dtype).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def run(code: str, registers: dict[str, int]) -> None:
    """Carries out PTX on 32-bit registers; understands what `assembly` writes and nothing else."""

    def value(operand: str) -> int:
        return int(operand, 0) if operand[0].isdigit() else registers[operand]

    body = re.fullmatch(r"\{ \.reg \.b32 [^;]*; (.*) \}", code)
    assert body is not None
    for statement in filter(None, (part.strip() for part in body[1].split(";"))):
        name, rest = statement.split(None, 1)
        target, *operands = (operand.strip() for operand in rest.split(","))
        given = [value(operand) for operand in operands]
        match name:
            case "mov.b32":
                found = given[0]
            case "and.b32":
                found = given[0] & given[1]
            case "shr.u32":
                found = given[0] >> given[1]
            case "shl.b32":
                found = given[0] << given[1] & 0xFFFFFFFF
            case "prmt.b32":
                source = given[0] | given[1] << 32
                found = sum((source >> 8 * (given[2] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
                assert not given[2] & 0x8888, "signs are not replicated here"
            case "lop3.b32":
                found = 0
                for bit in range(32):
                    a, b, c = (operand >> bit & 1 for operand in given[:3])
                    found |= (given[3] >> (4 * a + 2 * b + c) & 1) << bit
            case "add.f16x2" | "fma.rn.f16x2" | "fma.rn.bf16x2":
                is_bfloat16 = name.endswith("bf16x2")
                pairs = [[float(v) for v in to_floats(operand, is_bfloat16)] for operand in given]
                exact = (
                    [a * b + c for a, b, c in zip(*pairs, strict=True)]
                    if len(pairs) == 3
                    else list(map(sum, zip(*pairs, strict=True)))
                )
                found = to_register((exact[0], exact[1]), is_bfloat16)
            case _:
                raise AssertionError(f"unknown instruction {name}")
        registers[target] = found


def unpack(
    bits: int, is_bfloat16: bool, data: list[int], high: list[int], half: int, zeros: list[int]
) -> list[list[float]]:
    """Four bytes through the assembly: per part, its four weights. ``zeros`` has a zero point per part."""
    parts = PARTS[bits]
    code = assembly(bits, is_bfloat16, half)
    registers = {f"${2 * parts}": int.from_bytes(bytes(data), "little")}
    if bits == 3:
        registers[f"${2 * parts + 1}"] = int.from_bytes(bytes(high), "little")
    first = 2 * parts + (2 if bits == 3 else 1)
    for part, pair in itertools.product(range(parts), range(2)):
        addend = -(magic(bits, is_bfloat16)[part] + zeros[part])
        registers[f"${first + 2 * part + pair}"] = to_register((addend, addend), is_bfloat16)
        assert to_floats(registers[f"${first + 2 * part + pair}"], is_bfloat16)[0] == addend
    assert constraints(bits).count("=&r") == 2 * parts
    assert constraints(bits).count(",") + 1 == 2 * parts + len(registers)
    run(code, registers)
    return [
        [float(v) for pair in range(2) for v in to_floats(registers[f"${2 * part + pair}"], is_bfloat16)]
        for part in range(parts)
    ]


def expected(bits: int, byte: int, high: int, half: int, part: int, zero: int) -> int:
    if bits == 3:
        return (byte >> 2 * part & 3 | (high >> (2 * part + half) & 1) << 2) - zero
    return (byte >> bits * part & ((1 << bits) - 1)) - zero


@pytest.mark.parametrize("is_bfloat16", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_byte_in_every_place(bits, is_bfloat16):
    for byte in range(256):
        data = [byte, byte ^ 0xFF, (byte * 7 + 3) & 0xFF, (byte * 31 + 17) & 0xFF]
        zeros = [(byte * 5 + 3 * part) % (1 << bits) for part in range(PARTS[bits])]
        found = unpack(bits, is_bfloat16, data, [], 0, zeros)
        for part, weights in enumerate(found):
            assert weights == [expected(bits, value, 0, 0, part, zeros[part]) for value in data]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("is_bfloat16", [False, True], ids=["float16", "bfloat16"])
def test_every_byte_of_3_bits(is_bfloat16, half):
    for byte in range(256):
        data = [byte, byte ^ 0xFF, (byte * 7 + 3) & 0xFF, (byte * 31 + 17) & 0xFF]
        high = [(byte * 13 + 5) & 0xFF, byte, byte ^ 0xA5, (byte * 11) & 0xFF]
        zeros = [(byte + 3 * part) % 8 for part in range(4)]
        found = unpack(3, is_bfloat16, data, high, half, zeros)
        for part, weights in enumerate(found):
            assert weights == [expected(3, data[i], high[i], half, part, zeros[part]) for i in range(4)]


@pytest.mark.parametrize("is_bfloat16", [False, True], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_zero_point(bits, is_bfloat16):
    for zero in range(1 << bits):
        data, high = [0, 0xFF, 0x5A, zero], [0xFF, 0, 0xC3, zero]
        found = unpack(bits, is_bfloat16, data, high, 1, [zero] * PARTS[bits])
        for part, weights in enumerate(found):
            assert weights == [expected(bits, data[i], high[i], 1, part, zero) for i in range(4)]


def test_8_bits_in_bfloat16_need_no_addend_where_the_zero_point_is_128():
    code = assembly(8, True, has_addend=False)
    assert constraints(8, has_addend=False) == "=&r,=&r,r"
    for byte in range(256):
        registers = {"$2": byte | (byte ^ 0xFF) << 8 | 0x80 << 16 | 0x7F << 24}
        run(code, registers)
        found = [*to_floats(registers["$0"], True), *to_floats(registers["$1"], True)]
        assert found == [byte - 128, (byte ^ 0xFF) - 128, 0, -1]


@pytest.mark.parametrize(
    ("bits", "is_bfloat16", "codes", "most"),
    [(4, False, 8, 10), (4, True, 8, 11), (2, False, 16, 18), (3, False, 16, 30), (8, False, 4, 6), (8, True, 4, 10)],
)
def test_few_instructions(bits, is_bfloat16, codes, most):
    """Constants are moved once, outside the loop; everything else counts."""
    counted = [
        s for s in assembly(bits, is_bfloat16).split(";") if s.strip(" {}") and ".reg" not in s and "mov" not in s
    ]
    assert codes == 4 * PARTS[bits]
    assert len(counted) <= most


def test_the_emulator_fails_a_wrong_constant():
    code = assembly(4, False)
    broken = code.replace("0x000f000f", "0x000e000f", 1)
    assert broken != code
    registers = dict.fromkeys(("$4", "$5", "$6", "$7", "$8"), 0xFFFFFFFF)
    other = dict(registers)
    for each, text in ((registers, code), (other, broken)):
        each.update({"$5": to_register((-1032, -1032), False), "$6": 0, "$7": 0, "$8": 0})
        run(text, each)
    assert registers["$0"] != other["$0"]
