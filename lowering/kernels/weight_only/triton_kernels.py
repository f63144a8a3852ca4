"""Low-bit weights times 16-bit activations: the kernels, in Triton.

`multiply` reads each byte of the weight once, unpacks it in registers (`weight_only_unpack_triton`) and multiplies with
tensor cores, whatever the number of rows; `weight_only_config` describes its variants. `reduce` adds up partial sums,
`dequantize` writes the weight out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from qcompiler.lowering.kernels.weight_only.triton_unpack import (
    load_rows,
    scale_weights,
    unpack_2,
    unpack_3,
    unpack_4,
    unpack_8,
)

__all__ = ["dequantize", "multiply", "multiply_few", "reduce"]


@triton.jit
def _product(total, x, w, k, limit, SWAP: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr):
    """``total`` plus ``x[:, k] @ w.T``, or its transpose."""
    a = tl.load(x) if EVEN else tl.load(x, mask=(k < limit)[None, :], other=0.0)
    if not PTX:  # interpreted, bfloat16 has no products
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    if SWAP:
        return tl.dot(w, tl.trans(a), total)
    else:
        return tl.dot(a, tl.trans(w), total)


@triton.jit
def _zeros(BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((BN, BM), tl.float32)
    else:
        return tl.zeros((BM, BN), tl.float32)


@triton.jit
def _scaled(product, scale, SWAP: tl.constexpr):
    if SWAP:
        return product * scale.to(tl.float32)[:, None]
    else:
        return product * scale.to(tl.float32)[None, :]


@triton.jit
def _bytes(pointer, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer, eviction_policy="evict_first")
    else:
        return tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _weights(
    pointer,
    zeros,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PTX: tl.constexpr,
    inside=None,
    EVEN: tl.constexpr = True,
):
    """The parts of one tile; ``pointer`` ``[BN, PART]`` to its bytes, read only where ``inside`` if not EVEN."""
    if BITS == 3:
        high = _bytes(pointer + 64, inside, EVEN)
        first = unpack_3(_bytes(pointer, inside, EVEN), high, zeros, 0, RUN, PTX)
        second = unpack_3(_bytes(pointer + 32, inside, EVEN), high, zeros, 1, RUN, PTX)
        return (first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3])
    else:
        b = _bytes(pointer, inside, EVEN)
        if BITS == 8:
            return (unpack_8(b, zeros[0], HAS_ZERO, PTX),)
        elif BITS == 4:
            return unpack_4(b, zeros, RUN, PTX)
        else:
            return unpack_2(b, zeros, RUN, PTX)


@triton.jit
def multiply(
    x,
    packed,
    scale,
    zero,
    bias,
    y,
    M,
    N,
    K,
    tiles,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PARTIAL: tl.constexpr,
    SWAP: tl.constexpr,
    PRESCALE: tl.constexpr,
    PTX: tl.constexpr,
):
    """``y[m, n] = sum_k x[m, k] * W[n, k] + bias[n]``, or a piece of the sum to ``y[piece, m, n]`` where PARTIAL.

    Args:
        x: ``[M, K]``.
        packed, scale, zero: of the weight; not read where absent.
        bias: ``[N]``.
        y: of the dtype of ``x``; float32 where PARTIAL.
        M, N, K: sizes.
        tiles: of one piece.
        BITS, PART, PARTS: of the layout.
        RUN: parts of a tile that share a row of ``scale``.
        GROUP: input channels of such a row; 0: all.
        HAS_ZERO, HAS_BIAS: whether there are any.
        EVEN: whether K is a multiple of a tile.
        BM, BN, SWAP, PRESCALE: `Config` ``rows``, ``out``, ``swap``, ``prescale``.
        PTX: whether codes are unpacked in PTX.
    """
    TILE: tl.constexpr = PART * PARTS
    BYTES: tl.constexpr = TILE * BITS // 8
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # neighbours in time share a piece of the weight
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    piece = tl.program_id(2)
    columns = tl.minimum(n, N - 1)  # what is beyond the end is computed from the last, and not stored
    rows = tl.minimum(m, M - 1)
    k = tl.arange(0, PART)
    first = piece * tiles
    last = tl.minimum(first + tiles, tl.cdiv(K, TILE))
    x_tile = x + rows[:, None].to(tl.int64) * K + (first * TILE + k)[None, :]
    w_tile = packed + first.to(tl.int64) * N * BYTES + columns[:, None].to(tl.int64) * BYTES + k[None, :]
    total = _zeros(BM, BN, SWAP)
    groups = tl.cdiv(K, GROUP) if GROUP else 1
    # Scales and zero points are read one step ahead: they are no operands of a product that Triton would pipeline.
    if HAS_ZERO:
        if GROUP:
            zeros_ahead = load_rows(zero, first, columns, N, groups - 1, GROUP, PART, PARTS, RUN)
        else:
            zeros_ahead = (tl.load(zero + columns),)
    else:
        zeros_ahead = (tl.full((BN,), 1 << (BITS - 1), tl.uint8),)
    if GROUP:
        scales_ahead = load_rows(scale, first, columns, N, groups - 1, GROUP, PART, PARTS, RUN)
    for tile in range(first, last):
        zeros = _as(zeros_ahead, dtype)
        if GROUP:
            scales = scales_ahead
            scales_ahead = load_rows(scale, tile + 1, columns, N, groups - 1, GROUP, PART, PARTS, RUN)
            if HAS_ZERO:
                zeros_ahead = load_rows(zero, tile + 1, columns, N, groups - 1, GROUP, PART, PARTS, RUN)
        weights = _weights(w_tile, zeros, BITS, PART, RUN if HAS_ZERO and GROUP else PARTS, HAS_ZERO, PTX)
        if GROUP and not PRESCALE:
            for run in tl.static_range(PARTS // RUN):
                product = _zeros(BM, BN, SWAP)
                for i in tl.static_range(run * RUN, run * RUN + RUN):
                    product = _product(
                        product, x_tile + i * PART, weights[i], tile * TILE + i * PART + k, K, SWAP, EVEN, PTX
                    )
                total += _scaled(product, scales[run], SWAP)
        else:
            for i in tl.static_range(PARTS):
                w = weights[i]
                if GROUP:
                    w = scale_weights(w, scales[i // RUN], PTX)
                total = _product(total, x_tile + i * PART, w, tile * TILE + i * PART + k, K, SWAP, EVEN, PTX)
        x_tile += TILE
        w_tile += N * BYTES
    if not GROUP:
        total = _scaled(total, tl.load(scale + columns), SWAP)
    if SWAP:
        total = tl.trans(total)
    if HAS_BIAS and not PARTIAL:
        total += tl.load(bias + columns).to(tl.float32)[None, :]
    y += (piece * M + tl.program_id(0) * BM).to(tl.int64) * N  # so that 32 bits are left to be added for each number
    at = tl.arange(0, BM)[:, None] * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def multiply_few(
    x,
    packed,
    scale,
    zero,
    bias,
    y,
    M,
    N,
    K,
    tiles,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTIAL: tl.constexpr,
    PTX: tl.constexpr,
):
    """`multiply` for few rows: each warp takes a tile of its own in every step, and all add up at the end.

    So the device is full of warps, and little is left to be split over blocks. Products are ``W x^T``, one for each of
    DEPTH tiles, as one batch.

    Args:
        x, packed, scale, zero, bias, y, M, N, K: as in `multiply`.
        tiles: of one piece, a multiple of DEPTH.
        BITS, PART, PARTS, RUN, GROUP, HAS_ZERO, HAS_BIAS: as in `multiply`.
        EVEN: whether K is a multiple of DEPTH tiles.
        BM, BN, DEPTH: `Config` ``rows``, ``out``, ``depth``.
        PARTIAL, PTX: as in `multiply`.
    """
    TILE: tl.constexpr = PART * PARTS
    BYTES: tl.constexpr = TILE * BITS // 8
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    piece = tl.program_id(2)
    columns = tl.minimum(n, N - 1)
    rows = tl.minimum(m, M - 1)
    k = tl.arange(0, PART)
    depth = tl.arange(0, DEPTH)
    first = piece * tiles
    last = tl.minimum(first + tiles, tl.cdiv(K, TILE))
    x_tile = x + rows[None, :, None].to(tl.int64) * K + (first + depth)[:, None, None] * TILE + k[None, None, :]
    w_tile = (
        packed + ((first + depth).to(tl.int64)[:, None, None] * N + columns[None, :, None]) * BYTES + k[None, None, :]
    )
    total = tl.zeros((DEPTH, BN, BM), tl.float32)
    groups = tl.cdiv(K, GROUP) if GROUP else 1
    at = (first + depth)[:, None]
    if HAS_ZERO:
        if GROUP:
            zeros_ahead = load_rows(zero, at, columns[None, :], N, groups - 1, GROUP, PART, PARTS, RUN)
        else:
            zeros_ahead = (tl.broadcast_to(tl.load(zero + columns)[None, :], (DEPTH, BN)),)
    else:
        zeros_ahead = (tl.full((DEPTH, BN), 1 << (BITS - 1), tl.uint8),)
    if GROUP:
        scales_ahead = load_rows(scale, at, columns[None, :], N, groups - 1, GROUP, PART, PARTS, RUN)
    for tile in range(first, last, DEPTH):
        at = (tile + depth)[:, None]
        zeros = _as(zeros_ahead, dtype)
        if GROUP:
            scales = scales_ahead
            scales_ahead = load_rows(scale, at + DEPTH, columns[None, :], N, groups - 1, GROUP, PART, PARTS, RUN)
            if HAS_ZERO:
                zeros_ahead = load_rows(zero, at + DEPTH, columns[None, :], N, groups - 1, GROUP, PART, PARTS, RUN)
        inside = (at < last)[:, :, None]
        weights = _weights(w_tile, zeros, BITS, PART, RUN if HAS_ZERO and GROUP else PARTS, HAS_ZERO, PTX, inside, EVEN)
        position = at[:, :, None] * TILE + k[None, None, :]
        for run in tl.static_range(PARTS // RUN):
            product = tl.zeros((DEPTH, BN, BM), tl.float32)
            for i in tl.static_range(run * RUN, run * RUN + RUN):
                a = x_tile + i * PART
                a = tl.load(a) if EVEN else tl.load(a, mask=position + i * PART < K, other=0.0)
                w = weights[i]
                if not PTX:  # interpreted, bfloat16 has no products
                    a = a.to(tl.float32)
                    w = w.to(tl.float32)
                product = tl.dot(w, tl.permute(a, (0, 2, 1)), product)
            if GROUP:
                product *= scales[run].to(tl.float32)[:, :, None]
            total += product
        x_tile += DEPTH * TILE
        w_tile += DEPTH * N * BYTES
    result = tl.trans(tl.sum(total, 0))
    if not GROUP:
        result *= tl.load(scale + columns).to(tl.float32)[None, :]
    if HAS_BIAS and not PARTIAL:
        result += tl.load(bias + columns).to(tl.float32)[None, :]
    place = (piece * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _as(rows, DTYPE: tl.constexpr):
    """uint8 zero points as floats."""
    if len(rows) == 1:
        return (rows[0].to(tl.float32).to(DTYPE),)
    elif len(rows) == 2:
        return (rows[0].to(tl.float32).to(DTYPE), rows[1].to(tl.float32).to(DTYPE))
    elif len(rows) == 4:
        return (
            rows[0].to(tl.float32).to(DTYPE),
            rows[1].to(tl.float32).to(DTYPE),
            rows[2].to(tl.float32).to(DTYPE),
            rows[3].to(tl.float32).to(DTYPE),
        )
    else:
        return (
            rows[0].to(tl.float32).to(DTYPE),
            rows[1].to(tl.float32).to(DTYPE),
            rows[2].to(tl.float32).to(DTYPE),
            rows[3].to(tl.float32).to(DTYPE),
            rows[4].to(tl.float32).to(DTYPE),
            rows[5].to(tl.float32).to(DTYPE),
            rows[6].to(tl.float32).to(DTYPE),
            rows[7].to(tl.float32).to(DTYPE),
        )


@triton.jit
def reduce(partial, bias, y, MN, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """``y[i] = sum_s partial[s, i] + bias[i % N]``, the pieces in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < MN
    total = tl.zeros((BLOCK,), tl.float32)
    partial += at
    for _ in tl.static_range(SPLIT):
        total += tl.load(partial, mask=inside, other=0.0)
        partial += MN
    if HAS_BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    packed,
    scale,
    zero,
    w,
    N,
    K,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BN: tl.constexpr,
    PTX: tl.constexpr,
):
    """``w[n, k] = (code[n, k] - zero[n, k]) * scale[n, k]``, rounded once; arguments as in `multiply`."""
    TILE: tl.constexpr = PART * PARTS
    BYTES: tl.constexpr = TILE * BITS // 8
    dtype: tl.constexpr = w.dtype.element_ty
    tile = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = tl.minimum(n, N - 1)
    k = tl.arange(0, PART)
    groups = tl.cdiv(K, GROUP)
    pointer = packed + (tile.to(tl.int64) * N + columns[:, None]) * BYTES + k[None, :]
    scales = load_rows(scale, tile, columns, N, groups - 1, GROUP, PART, PARTS, RUN)
    if HAS_ZERO:
        zeros = _as(load_rows(zero, tile, columns, N, groups - 1, GROUP, PART, PARTS, RUN), dtype)
    else:
        zeros = _as((tl.full((BN,), 1 << (BITS - 1), tl.uint8),), dtype)
    weights = _weights(pointer, zeros, BITS, PART, RUN if HAS_ZERO else PARTS, HAS_ZERO, PTX)
    for i in tl.static_range(PARTS):
        at = tile * TILE + i * PART + k
        value = weights[i].to(tl.float32) * scales[i // RUN].to(tl.float32)[:, None]
        inside = (n[:, None] < N) & (at[None, :] < K)
        tl.store(w + n[:, None].to(tl.int64) * K + at[None, :], value.to(dtype), mask=inside)
