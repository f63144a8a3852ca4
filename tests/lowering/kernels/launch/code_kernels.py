"""A kernel that does nothing but take codes apart."""

import triton
import triton.language as tl

from qcompiler.lowering.kernels.cache.triton_codes import four_codes, two_codes


@triton.jit
def take_apart(words, out, count, KIND: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = tl.load(words + at)
    if KIND == "int4":
        a, b, c, d = four_codes(word, 0)
        tl.store(out + 2 * count + at, c)
        tl.store(out + 3 * count + at, d)
    else:
        a, b = two_codes(word, KIND, 0)
    tl.store(out + at, a)
    tl.store(out + count + at, b)
