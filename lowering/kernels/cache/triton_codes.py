"""Codes of a cache as operands of matrix products, for Triton kernels.

Codes are read as 16-bit words, which matrix operands are made of, so that the hardware transposes them on their way
into registers. A word is then taken apart into operands of float16, one for each of its codes: channels 0, 2, 4, ...
and 1, 3, 5, ... of 8-bit codes, every fourth one of 4-bit codes. A code is put into the mantissa of a float16 of 1024
and brought down by one subtraction, so each becomes its exact value.

``MODE`` is 0 for plain Triton, which the interpreter runs too, 1 for inline assembly, and 2 for that with the
conversions of 8-bit floats that came with compute capability 8.9. Without those, an 8-bit float is moved to the top of
a float16, which makes it 2^-8 of itself; what is not a number becomes 480.
"""

import triton
import triton.language as tl

__all__ = [
    "FLOAT8_BITS",
    "FLOAT8_WORDS",
    "INT4_WORDS",
    "INT8_WORDS",
    "UINT8_WORDS",
    "four_codes",
    "operands",
    "two_codes",
]

# Two codes of 8 bits per word, two words per register: the first codes of both, the second ones of both.
INT8_WORDS = tl.constexpr("""{
    .reg .b32 t, c;
    xor.b32 t, $2, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 $0, t, 0x64646464, 0x4240;
    prmt.b32 $1, t, 0x64646464, 0x4341;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
}""")
UINT8_WORDS = tl.constexpr("""{
    .reg .b32 c;
    mov.b32 c, 0x64806480;
    prmt.b32 $0, $2, 0x64646464, 0x4240;
    prmt.b32 $1, $2, 0x64646464, 0x4341;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
}""")
FLOAT8_WORDS = tl.constexpr("""{
    .reg .b32 t;
    .reg .b16 a, b;
    prmt.b32 t, $2, 0, 0x3120;
    mov.b32 {a, b}, t;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
}""")
FLOAT8_BITS = tl.constexpr("""{
    .reg .b32 s, t;
    shl.b32 s, $2, 8;
    shl.b32 t, $2, 7;
    and.b32 t, t, 0x3f803f80;
    lop3.b32 $0, s, 0x80008000, t, 0xea;
    shr.u32 t, $2, 1;
    and.b32 t, t, 0x3f803f80;
    lop3.b32 $1, $2, 0x80008000, t, 0xea;
}""")
# Four codes of 4 bits per word.
INT4_WORDS = tl.constexpr("""{
    .reg .b32 t, c, m, a;
    mov.b32 c, 0x64086408;
    mov.b32 m, 0x2c002c00;
    mov.b32 a, 0xd480d480;
    shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
    lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xea;
    sub.f16x2 $0, $0, c;
    fma.rn.f16x2 $1, $1, m, a;
    sub.f16x2 $2, $2, c;
    fma.rn.f16x2 $3, $3, m, a;
}""")


@triton.jit
def two_codes(words, KIND: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """First and second codes of words of two; unsigned ones less 128, floats on old devices times 2^-8."""
    if MODE == 0:
        first, second = words & 255, words >> 8
        if KIND == "fp8":
            a = ((first & 128) << 8 | (first & 127) << 7).to(tl.float16, bitcast=True)
            b = ((second & 128) << 8 | (second & 127) << 7).to(tl.float16, bitcast=True)
        elif KIND == "int8":
            a, b = (first ^ 128).to(tl.float16) - 128, (second ^ 128).to(tl.float16) - 128
        else:
            a, b = first.to(tl.float16) - 128, second.to(tl.float16) - 128
    else:
        floats: tl.constexpr = FLOAT8_WORDS if MODE == 2 else FLOAT8_BITS
        integers: tl.constexpr = INT8_WORDS if KIND == "int8" else UINT8_WORDS
        code: tl.constexpr = floats if KIND == "fp8" else integers
        a, b = tl.inline_asm_elementwise(
            code, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return a, b


@triton.jit
def four_codes(words, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of words of four, less 8."""
    if MODE == 0:
        a, b = (words & 15).to(tl.float16) - 8, ((words >> 4) & 15).to(tl.float16) - 8
        c, d = ((words >> 8) & 15).to(tl.float16) - 8, (words >> 12).to(tl.float16) - 8
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            INT4_WORDS,
            "=&r,=&r,=&r,=&r,r",  # '&': outputs are written before the input is read for the last time
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def _grouped(codes, scale, offset, ZERO: tl.constexpr, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    if MODE == 0:
        values = codes * scale
        if ZERO:
            values += offset
    elif ZERO:
        values = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [codes, scale, offset], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        values = tl.inline_asm_elementwise(
            "mul.f16x2 $0, $1, $2;", "=r,r,r", [codes, scale], dtype=tl.float16, is_pure=True, pack=2
        )
    return values


@triton.jit
def operands(  # type: ignore[no-untyped-def]
    codes,
    scale,
    zero,
    at,
    codes_t,
    scale_t,
    zero_t,
    KIND: tl.constexpr,
    PER: tl.constexpr,
    WORDS: tl.constexpr,
    USED: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    ZERO: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
):
    """The codes of tokens ``at`` as ``PER`` operands ``[tokens, words]``, times their scales if a token has several."""
    word = tl.arange(0, WORDS)
    where = codes + (at * codes_t * UNIT)[:, None] + word[None, :]
    if USED == WORDS:
        words = tl.load(where)
    else:
        words = tl.load(where, mask=(word < USED)[None, :] & (at >= 0)[:, None], other=0)
    if PER == 1:
        a = words.to(tl.float32) if MODE == 0 else words  # the interpreter multiplies no matrices of bfloat16
        b, c, d = a, a, a
    elif PER == 2:
        a, b = two_codes(words, KIND, MODE)
        c, d = a, b
    else:
        a, b, c, d = four_codes(words, MODE)
    if GROUPS > 1:
        base: tl.constexpr = 8.0 if PER == 4 else 128.0
        group = tl.arange(0, PADDED_GROUPS)
        there = (group < GROUPS)[None, :]
        s = tl.load(scale + (at * scale_t)[:, None] + group[None, :], mask=there, other=0.0)
        o = s
        if ZERO:
            z = tl.load(zero + (at * zero_t)[:, None] + group[None, :], mask=there, other=0).to(tl.float32)
            o = ((base - z) * s.to(tl.float32)).to(tl.float16)
        each: tl.constexpr = WORDS // PADDED_GROUPS
        s = tl.reshape(tl.broadcast_to(s[:, :, None], [TOKENS, PADDED_GROUPS, each]), [TOKENS, WORDS])
        o = tl.reshape(tl.broadcast_to(o[:, :, None], [TOKENS, PADDED_GROUPS, each]), [TOKENS, WORDS])
        a = _grouped(a, s, o, ZERO, MODE)
        if PER > 1:
            b = _grouped(b, s, o, ZERO, MODE)
        if PER == 4:
            c = _grouped(c, s, o, ZERO, MODE)
            d = _grouped(d, s, o, ZERO, MODE)
    return a, b, c, d
