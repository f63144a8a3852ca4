"""Codes to values in Triton: entries of a table that lies in registers, picked by byte permutes.

``prmt`` picks four of the eight bytes in two registers, by four numbers of three bits that stand in nibbles. A table of
``2^b`` values of 16 bits is held as planes: words of low bytes, then words of high bytes (`pack_table`). Four codes
take one permute per plane and eight entries; two more put low and high bytes together as pairs of values. With four
bits, the fourth chooses between the lower and the upper eight entries: a permute that repeats signs makes a mask of it.

| bits | instructions for 32 codes | per code |
|---|---|---|
| 2 | 32 ``prmt``, 4 ``and``, 6 shifts | 1.3 |
| 3 | 32 ``prmt``, 4 ``and``, 2 ``lop3``, 7 shifts | 1.4 |
| 4 | 56 ``prmt``, 4 ``and``, 16 ``lop3``, 8 shifts | 2.6 |

They are integer instructions, of which an SM starts those of 64 lanes per clock, half of what it can start in all.

Four bytes that are neighbours in a thread's registers are looked up together, in the table of the first. That they are
of one row of the weight is up to the layout that Triton chooses; each block of instructions names the registers of all
four tables in a comment, and `rows_are_apart` reads it.
"""

import re

import triton
import triton.language as tl

__all__ = ["ASSEMBLY", "look_up_2", "look_up_3", "look_up_4", "rows_are_apart"]

_SAME = "one table:"


def _assembly(bits: int) -> tuple[str, str]:
    """Instructions and constraints: outputs are pairs of values, inputs the words of codes, then the tables'.

    Every word of a table comes four times, for the four elements that are worked on together.
    """
    planes = 3 if bits == 3 else 1
    groups = {2: 2, 3: 4, 4: 1}[bits]
    words = [f"${4 * groups + plane}" for plane in range(planes)]
    first = 4 * groups + planes
    count = (1 << bits) // 2
    table = [f"${first + 4 * word}" for word in range(count)]
    lines = ["{", f"// {_SAME} " + " ".join(f"${first + element}" for element in range(4))]
    lines.append(".reg .b32 s, v, m, a, b, c, d;")
    for group in range(groups):
        lines += _selectors(bits, group, words)
        for half in range(2):
            if half:
                lines.append("shr.u32 s, s, 16;")
            if bits == 4:
                lines.append(f"prmt.b32 m, v, {words[0]}, {'0xFBEA' if half else '0xD9C8'};")
            for byte, (low, high) in enumerate((("a", "b"), ("c", "d"))):
                plane = table[byte * count // 2 : (byte + 1) * count // 2]
                lines.append(f"prmt.b32 {low}, {plane[0]}, {plane[len(plane) > 1]}, s;")
                if bits == 4:
                    lines.append(f"prmt.b32 {high}, {plane[2]}, {plane[3]}, s;")
                    lines.append(f"lop3.b32 {low}, {low}, {high}, m, 0xD8;")  # (low & ~m) | (high & m)
            lines.append(f"prmt.b32 ${4 * group + half}, a, c, 0x6240;")
            lines.append(f"prmt.b32 ${4 * group + 2 + half}, a, c, 0x7351;")
    constraints = ["=r"] * (4 * groups) + ["r"] * (planes + 4 * count)
    return "\n".join([*lines, "}"]), ",".join(constraints)


def _selectors(bits: int, group: int, words: list[str]) -> list[str]:
    """Two codes of each of four bytes into the nibbles of ``s``."""
    if bits == 4:
        return [f"and.b32 s, {words[0]}, 0x77777777;", f"shl.b32 v, {words[0]}, 4;"]
    if bits == 2:
        if group == 0:
            return [f"and.b32 s, {words[0]}, 0x33333333;"]
        return [f"shr.u32 s, {words[0]}, 2;", "and.b32 s, s, 0x33333333;"]
    if group < 3:
        return [f"and.b32 s, {words[group]}, 0x77777777;"]
    lines = [f"shr.u32 s, {words[0]}, 1;"]
    for word in words[1:]:  # (s & ~c) | (word & c): the fourth bits of the next plane above those before
        lines += [f"lop3.b32 s, s, {word}, 0x88888888, 0xD8;", "shr.u32 s, s, 1;"]
    return [*lines, "and.b32 s, s, 0x77777777;"]


ASSEMBLY = {bits: _assembly(bits) for bits in (2, 3, 4)}
"""Instructions in PTX and constraints of their operands, by bits."""

_TEXT_2, _TEXT_3, _TEXT_4 = (tl.constexpr(ASSEMBLY[bits][0]) for bits in (2, 3, 4))
_OPERANDS_2, _OPERANDS_3, _OPERANDS_4 = (tl.constexpr(ASSEMBLY[bits][1]) for bits in (2, 3, 4))


def rows_are_apart(ptx: str) -> str:
    """What is wrong with how a kernel was laid out, in words; empty if nothing is.

    Args:
        ptx: of a kernel that looks up with permutes.
    """
    found = re.findall(rf"// {_SAME} (.*)", ptx)
    if not found:
        return "no lookup by permutes"
    apart = [registers for registers in found if len(set(registers.split())) != 1]
    return f"codes of several rows are looked up in the table of one: {apart[0]}" if apart else ""


@triton.jit
def look_up_2(like, w, t0, t1, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of four tiles whose codes are in a plane of two bits per code; ``like`` points to what they are."""
    if PTX:
        return tl.inline_asm_elementwise(
            _TEXT_2,
            _OPERANDS_2,
            [w, t0, t1],
            dtype=(like.dtype.element_ty, like.dtype.element_ty, like.dtype.element_ty, like.dtype.element_ty),
            is_pure=True,
            pack=4,
        )
    else:
        return (
            _value(like, w & 3, t0, t0, t0, t0, t1, t1, t1, t1),
            _value(like, w >> 4 & 3, t0, t0, t0, t0, t1, t1, t1, t1),
            _value(like, w >> 2 & 3, t0, t0, t0, t0, t1, t1, t1, t1),
            _value(like, w >> 6, t0, t0, t0, t0, t1, t1, t1, t1),
        )


@triton.jit
def look_up_3(like, w0, w1, w2, t0, t1, t2, t3, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of eight tiles whose codes are in three planes."""
    if PTX:
        return tl.inline_asm_elementwise(
            _TEXT_3,
            _OPERANDS_3,
            [w0, w1, w2, t0, t1, t2, t3],
            dtype=(
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
                like.dtype.element_ty,
            ),
            is_pure=True,
            pack=4,
        )
    else:
        w3 = (w0 >> 3 & 0x11) | (w1 >> 2 & 0x22) | (w2 >> 1 & 0x44)
        return (
            _value(like, w0 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w0 >> 4 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w1 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w1 >> 4 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w2 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w2 >> 4 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w3 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
            _value(like, w3 >> 4 & 7, t0, t1, t0, t1, t2, t3, t2, t3),
        )


@triton.jit
def look_up_4(like, w, t0, t1, t2, t3, t4, t5, t6, t7, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of two tiles whose codes are the nibbles of a plane."""
    if PTX:
        return tl.inline_asm_elementwise(
            _TEXT_4,
            _OPERANDS_4,
            [w, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(like.dtype.element_ty, like.dtype.element_ty),
            is_pure=True,
            pack=4,
        )
    else:
        return (
            _value(like, w & 15, t0, t1, t2, t3, t4, t5, t6, t7),
            _value(like, w >> 4, t0, t1, t2, t3, t4, t5, t6, t7),
        )


@triton.jit
def _value(like, code, l0, l1, l2, l3, h0, h1, h2, h3):  # type: ignore[no-untyped-def]
    """The entry a code stands for, put together from four words of low bytes and four of high ones."""
    word = (code >> 2).to(tl.int32)
    shift = ((code & 3) * 8).to(tl.int32)
    low = tl.where(word == 0, l0, tl.where(word == 1, l1, tl.where(word == 2, l2, l3)))
    high = tl.where(word == 0, h0, tl.where(word == 1, h1, tl.where(word == 2, h2, h3)))
    bits = (low >> shift & 0xFF) | (high >> shift & 0xFF) << 8
    return bits.to(tl.uint16).to(like.dtype.element_ty, bitcast=True)
