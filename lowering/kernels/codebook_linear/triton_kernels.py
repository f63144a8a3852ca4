"""The kernels of ``codebook_linear``: a product with values looked up on the way, and what is around it.

`multiply` reads each byte of the codes once, looks values up in registers (`codebook_lookup_triton`) and multiplies
with tensor cores, even a single row: that spares conversions to float32, which would cost more than the lookups. Few
rows are multiplied as ``out^T = W x^T`` (``SWAP``), because the smaller side of a tensor-core instruction is 8, the
other 16. `finish` adds partial sums up in order and the sparse matrix to them, each row of it in one block, without
atomic additions. `dequantize` and `add_sparse` write the weight out.
"""

import triton
import triton.language as tl

from qcompiler.lowering.kernels.codebook_linear.triton_lookup import look_up_2, look_up_3, look_up_4

__all__ = ["add_sparse", "dequantize", "finish", "multiply"]


@triton.jit
def _dot(total, x, w, ok, SWAP: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` plus a tile of ``x`` times a tile of weights; in float32 without PTX.

    The interpreter takes bfloat16 factors for the integers it stores them in.
    """
    a = tl.load(x, mask=ok, other=0.0)
    if not PTX:
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, a, total, input_precision="ieee")
    else:
        return tl.dot(a, w, total, input_precision="ieee")


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    x,
    codes,
    table,
    bias,
    target,
    rows,
    out,
    padded,
    blocks,
    per_split,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    SWAP: tl.constexpr,
    FINAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
):
    """A tile of outputs from the blocks of input channels that are its split's.

    ``padded`` is out rounded up to 16; ``x`` has ``blocks`` blocks of 256 input channels, a split ``per_split`` of
    them. ``target`` is ``[split, rows, out]`` float32, or with FINAL the result, to which the bias is added.
    """
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    e = tl.arange(0, 32)
    row = tl.minimum(n, padded - 1)
    begin = (row // 16) * blocks * (BITS * 512) + (row % 16) * 32
    if SWAP:
        w = codes + begin[:, None] + e[None, :]
        t = table + row[:, None]
        a = x + m[None, :] * (blocks * 256) + e[:, None]
        exists = (m < rows)[None, :]
        total = tl.zeros((OUT, ROWS), tl.float32)
    else:
        w = codes + begin[None, :] + e[:, None]
        t = table + row[None, :]
        a = x + m[:, None] * (blocks * 256) + e[None, :]
        exists = (m < rows)[:, None]
        total = tl.zeros((ROWS, OUT), tl.float32)
    t0 = tl.load(t)
    t1 = tl.load(t + padded)
    if BITS > 2:
        t2 = tl.load(t + 2 * padded)
        t3 = tl.load(t + 3 * padded)
    if BITS > 3:
        t4 = tl.load(t + 4 * padded)
        t5 = tl.load(t + 5 * padded)
        t6 = tl.load(t + 6 * padded)
        t7 = tl.load(t + 7 * padded)
    first = tl.program_id(1) * per_split
    for block in range(first, tl.minimum(first + per_split, blocks)):
        p = w + block * (BITS * 512)
        b = a + block * 256
        if BITS == 3:
            w0 = tl.load(p, eviction_policy="evict_first")
            w1 = tl.load(p + 512, eviction_policy="evict_first")
            w2 = tl.load(p + 1024, eviction_policy="evict_first")
            tiles = look_up_3(x, w0, w1, w2, t0, t1, t2, t3, PTX)
            for tile in tl.static_range(8):
                total = _dot(total, b + tile * 32, tiles[tile], exists, SWAP, PTX)
        else:
            for plane in tl.static_range(BITS):
                bytes_ = tl.load(p + plane * 512, eviction_policy="evict_first")
                if BITS == 4:
                    tiles = look_up_4(x, bytes_, t0, t1, t2, t3, t4, t5, t6, t7, PTX)
                else:
                    tiles = look_up_2(x, bytes_, t0, t1, PTX)
                for one in tl.static_range(8 // BITS):
                    tile = plane * (8 // BITS) + one
                    total = _dot(total, b + tile * 32, tiles[one], exists, SWAP, PTX)
    if SWAP:
        total = tl.trans(total)
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    place = target + (tl.program_id(1) * rows + m[:, None]) * out + n[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=(m < rows)[:, None] & (n < out)[None, :])


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    y,
    partial,
    x,
    bias,
    values,
    columns,
    row_offsets,
    rows,
    out,
    x_row,
    x_column,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
    SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Partial sums in order, the sparse matrix times ``x`` (elements ``x_row``, ``x_column`` apart), and the bias."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    place = m[None, :] * out + n[:, None]
    ok = (m < rows)[None, :] & (n < out)[:, None]
    total = tl.zeros((OUT, ROWS), tl.float32)
    for piece in tl.static_range(SPLIT):
        total += tl.load(partial + piece * rows * out + place, mask=ok, other=0.0)
    if SPARSE:
        start = tl.load(row_offsets + n, mask=n < out, other=0)
        end = tl.load(row_offsets + n + 1, mask=n < out, other=0)
        steps = tl.arange(0, STEP)
        for at in range(0, tl.max(end - start, 0), STEP):
            entry = start[:, None] + at + steps[None, :]
            there = entry < end[:, None]
            column = tl.load(columns + entry, mask=there, other=0).to(tl.int32)
            value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
            a = x + column[:, :, None] * x_column + m[None, None, :] * x_row
            seen = tl.load(a, mask=there[:, :, None] & (m < rows)[None, None, :], other=0.0)
            total += tl.sum(seen.to(tl.float32) * value[:, :, None], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=ok)


@triton.jit
def dequantize(  # type: ignore[no-untyped-def]
    weight, codes, table, out, width, padded, blocks, BITS: tl.constexpr, OUT: tl.constexpr, PTX: tl.constexpr
):
    """A block of 256 input channels of ``weight``, ``[out, width]``."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    e = tl.arange(0, 32)
    row = tl.minimum(n, padded - 1)
    block = tl.program_id(1)
    p = codes + ((row // 16) * blocks + block)[:, None] * (BITS * 512) + (row % 16)[:, None] * 32 + e[None, :]
    t = table + row[:, None]
    k = block * 256 + e
    place = weight + n[:, None] * width + k[None, :]
    exists = (n < out)[:, None]
    t0 = tl.load(t)
    t1 = tl.load(t + padded)
    if BITS > 2:
        t2 = tl.load(t + 2 * padded)
        t3 = tl.load(t + 3 * padded)
    if BITS > 3:
        t4 = tl.load(t + 4 * padded)
        t5 = tl.load(t + 5 * padded)
        t6 = tl.load(t + 6 * padded)
        t7 = tl.load(t + 7 * padded)
    if BITS == 3:
        tiles = look_up_3(weight, tl.load(p), tl.load(p + 512), tl.load(p + 1024), t0, t1, t2, t3, PTX)
        for tile in tl.static_range(8):
            tl.store(place + tile * 32, tiles[tile], mask=exists & (k + tile * 32 < width)[None, :])
    else:
        for plane in tl.static_range(BITS):
            if BITS == 4:
                tiles = look_up_4(weight, tl.load(p + plane * 512), t0, t1, t2, t3, t4, t5, t6, t7, PTX)
            else:
                tiles = look_up_2(weight, tl.load(p + plane * 512), t0, t1, PTX)
            for one in tl.static_range(8 // BITS):
                tile = plane * (8 // BITS) + one
                tl.store(place + tile * 32, tiles[one], mask=exists & (k + tile * 32 < width)[None, :])


@triton.jit
def add_sparse(  # type: ignore[no-untyped-def]
    weight, values, columns, row_offsets, out, width, OUT: tl.constexpr, STEP: tl.constexpr
):
    """Adds the sparse matrix to ``weight``; a column occurs once in a row."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    start = tl.load(row_offsets + n, mask=n < out, other=0)
    end = tl.load(row_offsets + n + 1, mask=n < out, other=0)
    for at in range(0, tl.max(end - start, 0), STEP):
        entry = start[:, None] + at + tl.arange(0, STEP)[None, :]
        there = entry < end[:, None]
        column = tl.load(columns + entry, mask=there, other=0).to(tl.int32)
        value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
        place = weight + n[:, None] * width + column
        total = tl.load(place, mask=there, other=0.0).to(tl.float32) + value
        tl.store(place, total.to(weight.dtype.element_ty), mask=there)
