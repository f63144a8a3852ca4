"""From bytes to weights, inside Triton kernels: every code of a tile of bytes as a 16-bit float, zero point taken off.

A code becomes a float without a conversion: put into the mantissa of a power of two (1024 in float16, 128 in bfloat16),
which is then subtracted together with the zero point in one exact addition. A code further up in its byte is scaled by
the same instruction, ``code * 2^s`` in the mantissa being ``1024 + code * 2^s``. Written as PTX, this takes 1.25
instructions per 4-bit code and has two codes in every register; compilers do not find it. Bytes keep their order, so it
is right however a tile is spread over threads, as long as four neighbours in a row lie in one register.

Tiles of bytes are ``[BN, part]``; one more axis may come first, in zero points ``[BN]`` as well.

Where kernels are interpreted there is no PTX: ``PTX`` False computes the same in plain Triton.

**Source** Kim et al., "Who says elephants can't run", arXiv 2211.10017, section 3, for conversion in the mantissa.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

__all__ = [
    "assembly",
    "constraints",
    "load_rows",
    "magic",
    "scale_weights",
    "unpack_2",
    "unpack_3",
    "unpack_4",
    "unpack_8",
]

_ONE = {False: 0x3C00, True: 0x3F80}  # by whether the dtype is bfloat16
_MAGIC_BITS = {False: 0x6400, True: 0x4300}
_OR = "0xea"  # lop3: (a & b) | c
_NOT_OR = "0xae"  # (~a & b) | c


def magic(bits: int, is_bfloat16: bool) -> tuple[int, ...]:
    """For each part of a byte, what its unpacked codes have too much before the addition."""
    if bits == 8:
        return (-128,) if is_bfloat16 else (1024,)
    if is_bfloat16:
        return (128, 128) if bits == 4 else (128, 32, 8, 32)
    return (1024, 64) if bits == 4 else (1024, 256, 64, 16)


def constraints(bits: int, has_addend: bool = True) -> str:
    """Of the registers of `assembly`: results, bytes, addends."""
    parts = 1 if bits == 8 else 2 if bits == 4 else 4
    inputs = (2 if bits == 3 else 1) + (2 * parts if has_addend else 0)
    return ",".join(["=&r"] * (2 * parts) + ["r"] * inputs)


def assembly(bits: int, is_bfloat16: bool, half: int = 0, has_addend: bool = True) -> str:
    """PTX that unpacks four bytes.

    Registers, 32 bits each: two results per part of a byte (four weights); the bytes; for 3 bits, the bytes of the
    third bits; two addends per part (four times ``-(magic + zero point)``).

    Args:
        bits: of one code.
        is_bfloat16: the weights; float16 otherwise.
        half: for 3 bits, which four of the eight parts.
        has_addend: False for 8 bits in bfloat16 with a zero point of 128: nothing is left to add.
    """
    parts = 1 if bits == 8 else 2 if bits == 4 else 4
    source = 2 * parts
    addend = source + (2 if bits == 3 else 1)
    kind = "bf16x2" if is_bfloat16 else "f16x2"
    base = _twice(_MAGIC_BITS[is_bfloat16])
    code = [".reg .b32 t0, t1, h0, h1, u, f;"]

    def finish(part: int, pair: int, shift: int) -> None:
        """Result of a part: times 2^-shift, plus the addend."""
        target, plus = f"${2 * part + pair}", f"${addend + 2 * part + pair}"
        if shift == 0 and not is_bfloat16:
            code.append(f"add.{kind} {target}, {target}, {plus};")
        else:
            exponent = 7 if is_bfloat16 else 10
            factor = _twice(_ONE[is_bfloat16] - (shift << exponent))
            code.append(f"mov.b32 f, {factor};")
            code.append(f"fma.rn.{kind} {target}, {target}, f, {plus};")

    def spread(target: str, register: str) -> None:
        """Four bytes to four 16-bit numbers."""
        code.append(f"prmt.b32 {target}0, {register}, 0, 0x4140;")
        code.append(f"prmt.b32 {target}1, {register}, 0, 0x4342;")

    if bits == 4 and is_bfloat16:  # the upper four bits do not fit the mantissa where they are
        code.append(f"and.b32 t0, ${source}, 0x0f0f0f0f;")
        code.append(f"shr.u32 t1, ${source}, 4;")
        code.append("and.b32 t1, t1, 0x0f0f0f0f;")
        for part in range(2):
            for pair, order in enumerate(("0x4140", "0x4342")):
                code.append(f"prmt.b32 ${2 * part + pair}, t{part}, 0x43434343, {order};")
                finish(part, pair, 0)
    elif bits == 8 and is_bfloat16:  # seven bits fit, and the eighth turns -256 into -128
        spread("t", f"${source}")
        for pair in range(2):
            code.append(f"lop3.b32 ${pair}, t{pair}, 0x007f007f, {base}, {_OR};")
            code.append(f"lop3.b32 u, t{pair}, 0x00800080, 0xc300c300, {_NOT_OR};")
            code.append(f"mov.b32 f, {_twice(_ONE[True])};")
            code.append(f"fma.rn.bf16x2 ${pair}, ${pair}, f, u;")
            if has_addend:
                finish(0, pair, 0)
    elif bits == 3:  # the third bit of part i goes to place 2 i + 2, above the other two
        spread("t", f"${source}")
        spread("h", f"${source + 1}")
        for pair in range(2):
            code.append(f"shl.b32 h{pair}, h{pair}, {2 - half};")
        for part in range(4):
            shift, moved = 2 * part, 4 if is_bfloat16 and part == 3 else 0
            for pair in range(2):
                target = f"${2 * part + pair}"
                if moved:
                    code.append(f"shr.u32 t{pair}, t{pair}, {moved};")
                    code.append(f"shr.u32 h{pair}, h{pair}, {moved};")
                low, high = _twice(3 << shift >> moved), _twice(4 << shift >> moved)
                code.append(f"lop3.b32 {target}, t{pair}, {low}, {base}, {_OR};")
                code.append(f"lop3.b32 {target}, h{pair}, {high}, {target}, {_OR};")
                finish(part, pair, shift - moved)
    else:
        spread("t", f"${source}")
        for part in range(parts):
            shift, moved = bits * part, 4 if is_bfloat16 and part == 3 else 0
            for pair in range(2):
                if moved:
                    code.append(f"shr.u32 t{pair}, t{pair}, {moved};")
                mask = _twice(((1 << bits) - 1) << shift >> moved)
                code.append(f"lop3.b32 ${2 * part + pair}, t{pair}, {mask}, {base}, {_OR};")
                finish(part, pair, shift - moved)
    return "{ " + " ".join(code) + " }"


def _twice(bits: int) -> str:
    """The same 16 bits in both halves of a register."""
    return f"0x{bits:04x}{bits:04x}"


_C8 = tl.constexpr(constraints(8))
_C8_PLAIN = tl.constexpr(constraints(8, has_addend=False))
_C4 = tl.constexpr(constraints(4))
_C3 = tl.constexpr(constraints(3))
_C2 = tl.constexpr(constraints(2))
_F8 = tl.constexpr(assembly(8, False))
_F4 = tl.constexpr(assembly(4, False))
_F3_0 = tl.constexpr(assembly(3, False, 0))
_F3_1 = tl.constexpr(assembly(3, False, 1))
_F2 = tl.constexpr(assembly(2, False))
_B8 = tl.constexpr(assembly(8, True))
_B8_PLAIN = tl.constexpr(assembly(8, True, has_addend=False))
_B4 = tl.constexpr(assembly(4, True))
_B3_0 = tl.constexpr(assembly(3, True, 0))
_B3_1 = tl.constexpr(assembly(3, True, 1))
_B2 = tl.constexpr(assembly(2, True))
_F8_MAGIC = tl.constexpr(magic(8, False))
_B8_MAGIC = tl.constexpr(magic(8, True))
_F4_MAGIC = tl.constexpr(magic(4, False))
_B4_MAGIC = tl.constexpr(magic(4, True))
_F3_MAGIC = tl.constexpr(magic(3, False))
_B3_MAGIC = tl.constexpr(magic(3, True))
_F2_MAGIC = tl.constexpr(magic(2, False))
_B2_MAGIC = tl.constexpr(magic(2, True))
_F_SCALE = tl.constexpr("mul.f16x2 $0, $1, $2;")
_B_SCALE = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")


@triton.jit
def _row(source, part, columns, N, last, GROUP: tl.constexpr, PART: tl.constexpr):
    return tl.load(source + tl.minimum(part * PART // GROUP, last).to(tl.int64) * N + columns)


@triton.jit
def load_rows(
    source, tile, columns, N, last, GROUP: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr
):
    """Scales or zero points ``[groups, N]`` of a tile (or tiles): for every ``RUN`` parts, the row of their group."""
    part = tile * PARTS
    if PARTS // RUN == 1:
        return (_row(source, part, columns, N, last, GROUP, PART),)
    elif PARTS // RUN == 2:
        return (
            _row(source, part, columns, N, last, GROUP, PART),
            _row(source, part + RUN, columns, N, last, GROUP, PART),
        )
    elif PARTS // RUN == 4:
        return (
            _row(source, part, columns, N, last, GROUP, PART),
            _row(source, part + RUN, columns, N, last, GROUP, PART),
            _row(source, part + 2 * RUN, columns, N, last, GROUP, PART),
            _row(source, part + 3 * RUN, columns, N, last, GROUP, PART),
        )
    else:
        return (
            _row(source, part, columns, N, last, GROUP, PART),
            _row(source, part + 1, columns, N, last, GROUP, PART),
            _row(source, part + 2, columns, N, last, GROUP, PART),
            _row(source, part + 3, columns, N, last, GROUP, PART),
            _row(source, part + 4, columns, N, last, GROUP, PART),
            _row(source, part + 5, columns, N, last, GROUP, PART),
            _row(source, part + 6, columns, N, last, GROUP, PART),
            _row(source, part + 7, columns, N, last, GROUP, PART),
        )


@triton.jit
def _addend(zero, bytes_, MAGIC: tl.constexpr):
    """What is added to the codes of a part, ``-(MAGIC + zero)``, exact; ``zero`` lacks the last axis."""
    return tl.broadcast_to(tl.expand_dims((-MAGIC - zero).to(zero.dtype), -1), bytes_.shape)


@triton.jit
def unpack_8(b, zero, HAS_ZERO: tl.constexpr, PTX: tl.constexpr):
    """uint8 ``[BN, part]`` → one tile of weights in the dtype of ``zero`` ``[BN]``."""
    if PTX:
        if zero.dtype == tl.float16:
            return tl.inline_asm_elementwise(
                _F8, _C8, [b, _addend(zero, b, _F8_MAGIC[0])], dtype=tl.float16, is_pure=True, pack=4
            )
        elif HAS_ZERO:
            return tl.inline_asm_elementwise(
                _B8, _C8, [b, _addend(zero, b, _B8_MAGIC[0])], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(_B8_PLAIN, _C8_PLAIN, [b], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return _plain(b, zero)


@triton.jit
def unpack_4(b, zeros, RUN: tl.constexpr, PTX: tl.constexpr):
    """uint8 ``[BN, part]`` → two tiles; ``zeros`` one ``[BN]`` for every ``RUN`` of them, in the dtype of weights."""
    if PTX:
        if zeros[0].dtype == tl.float16:
            a0 = _addend(zeros[0], b, _F4_MAGIC[0])
            a1 = _addend(zeros[1 // RUN], b, _F4_MAGIC[1])
            return tl.inline_asm_elementwise(
                _F4, _C4, [b, a0, a1], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            a0 = _addend(zeros[0], b, _B4_MAGIC[0])
            a1 = _addend(zeros[1 // RUN], b, _B4_MAGIC[1])
            return tl.inline_asm_elementwise(
                _B4, _C4, [b, a0, a1], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
    else:
        return (_plain(b & 15, zeros[0]), _plain(b >> 4, zeros[1 // RUN]))


@triton.jit
def _plain(code, zero):
    """As floats, by way of float32: interpreted, bfloat16 has no arithmetic."""
    return (code.to(tl.float32) - tl.expand_dims(zero.to(tl.float32), -1)).to(zero.dtype)


@triton.jit
def unpack_2(b, zeros, RUN: tl.constexpr, PTX: tl.constexpr):
    """uint8 ``[BN, part]`` → four tiles; as `unpack_4`."""
    if PTX:
        if zeros[0].dtype == tl.float16:
            a0 = _addend(zeros[0], b, _F2_MAGIC[0])
            a1 = _addend(zeros[1 // RUN], b, _F2_MAGIC[1])
            a2 = _addend(zeros[2 // RUN], b, _F2_MAGIC[2])
            a3 = _addend(zeros[3 // RUN], b, _F2_MAGIC[3])
            return tl.inline_asm_elementwise(
                _F2, _C2, [b, a0, a1, a2, a3], dtype=(tl.float16,) * 4, is_pure=True, pack=4
            )
        else:
            a0 = _addend(zeros[0], b, _B2_MAGIC[0])
            a1 = _addend(zeros[1 // RUN], b, _B2_MAGIC[1])
            a2 = _addend(zeros[2 // RUN], b, _B2_MAGIC[2])
            a3 = _addend(zeros[3 // RUN], b, _B2_MAGIC[3])
            return tl.inline_asm_elementwise(
                _B2, _C2, [b, a0, a1, a2, a3], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4
            )
    else:
        return (
            _plain(b & 3, zeros[0]),
            _plain((b >> 2) & 3, zeros[1 // RUN]),
            _plain((b >> 4) & 3, zeros[2 // RUN]),
            _plain(b >> 6, zeros[3 // RUN]),
        )


@triton.jit
def unpack_3(b, high, zeros, HALF: tl.constexpr, RUN: tl.constexpr, PTX: tl.constexpr):
    """Two low bits and third bits, uint8 ``[BN, part]`` → four of the eight tiles; as `unpack_4`."""
    z0 = zeros[4 * HALF // RUN]
    z1 = zeros[(4 * HALF + 1) // RUN]
    z2 = zeros[(4 * HALF + 2) // RUN]
    z3 = zeros[(4 * HALF + 3) // RUN]
    if PTX:
        if z0.dtype == tl.float16:
            a0 = _addend(z0, b, _F3_MAGIC[0])
            a1 = _addend(z1, b, _F3_MAGIC[1])
            a2 = _addend(z2, b, _F3_MAGIC[2])
            a3 = _addend(z3, b, _F3_MAGIC[3])
            if HALF == 0:
                return tl.inline_asm_elementwise(
                    _F3_0, _C3, [b, high, a0, a1, a2, a3], dtype=(tl.float16,) * 4, is_pure=True, pack=4
                )
            else:
                return tl.inline_asm_elementwise(
                    _F3_1, _C3, [b, high, a0, a1, a2, a3], dtype=(tl.float16,) * 4, is_pure=True, pack=4
                )
        else:
            a0 = _addend(z0, b, _B3_MAGIC[0])
            a1 = _addend(z1, b, _B3_MAGIC[1])
            a2 = _addend(z2, b, _B3_MAGIC[2])
            a3 = _addend(z3, b, _B3_MAGIC[3])
            if HALF == 0:
                return tl.inline_asm_elementwise(
                    _B3_0, _C3, [b, high, a0, a1, a2, a3], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4
                )
            else:
                return tl.inline_asm_elementwise(
                    _B3_1, _C3, [b, high, a0, a1, a2, a3], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4
                )
    else:
        return (
            _plain((b & 3) | (((high >> HALF) & 1) << 2), z0),
            _plain(((b >> 2) & 3) | (((high >> (2 + HALF)) & 1) << 2), z1),
            _plain(((b >> 4) & 3) | (((high >> (4 + HALF)) & 1) << 2), z2),
            _plain((b >> 6) | (((high >> (6 + HALF)) & 1) << 2), z3),
        )


@triton.jit
def scale_weights(w, scale, PTX: tl.constexpr):
    """A tile of weights ``[BN, part]`` times scales ``[BN]``, rounded to the dtype of the weights."""
    factor = tl.broadcast_to(scale.to(w.dtype)[:, None], w.shape)
    if PTX:
        if w.dtype == tl.float16:
            return tl.inline_asm_elementwise(_F_SCALE, "=r,r,r", [w, factor], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(_B_SCALE, "=r,r,r", [w, factor], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return (w.to(tl.float32) * factor.to(tl.float32)).to(w.dtype)
