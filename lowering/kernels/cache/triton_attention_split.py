"""The kernels of attention over a quantized cache: one that goes through a share of the tokens, one that merges shares.

A program takes a head of the cache, all queries that read it as the rows of its products, and an even share of the
tokens in use. Queries are read, and results written, in the parts that codes come in (``cache_codes_triton``).

Rows of queries are divided by a power of two, and the scale of a token's value is split: its power of two goes into the
exponent of the softmax, the rest, at least 1 and less than 2, multiplies the probability. So neither leaves the range
of float16, whatever the model computes in. Probabilities are powers of two: ``exp(x) = 2^(x log2(e))``.
"""

import triton
import triton.language as tl

from qcompiler.lowering.kernels.cache.triton_codes import operands

__all__ = ["merge_kernel", "split_kernel"]

NOTHING = tl.constexpr(-1.0e30)
"""The running maximum of a row that has seen nothing."""


@triton.jit
def _query_part(  # type: ignore[no-untyped-def]
    q,
    rows,
    mask,
    scale,
    scale_step,
    PART: tl.constexpr,
    PER: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
):
    """Every ``PER``-th channel of the queries in float32, from ``PART`` on; times stored scales, if there are any."""
    channel = tl.arange(0, WORDS) * PER + PART
    there = channel < WIDTH
    part = tl.load(q + rows[:, None] + channel[None, :], mask=mask[:, None] & there[None, :], other=0.0).to(tl.float32)
    if STORED:
        part *= tl.load(scale + channel * scale_step, mask=there, other=0.0)[None, :]
    return part


@triton.jit
def _zero_part(  # type: ignore[no-untyped-def]
    part, zero, zero_step, PART: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr
):
    """What stored zero points add to the product of a part of the queries."""
    channel = tl.arange(0, WORDS) * PER + PART
    base: tl.constexpr = 8.0 if PER == 4 else 128.0
    z = tl.load(zero + channel * zero_step, mask=channel < WIDTH, other=0).to(tl.float32) - base
    return tl.sum(part.to(tl.float32) * z[None, :], 1)


@triton.jit
def _result_part(  # type: ignore[no-untyped-def]
    acc,
    total,
    scale,
    zero,
    scale_step,
    zero_step,
    PART: tl.constexpr,
    PER: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Stored scales and zero points of values, which come last."""
    channel = tl.arange(0, WORDS) * PER + PART
    there = channel < WIDTH
    if ZERO:
        base: tl.constexpr = 8.0 if PER == 4 else 128.0
        z = tl.load(zero + channel * zero_step, mask=there, other=0).to(tl.float32) - base
        acc -= total[:, None] * z[None, :]
    return acc * tl.load(scale + channel * scale_step, mask=there, other=0.0)[None, :]


@triton.jit
def _store_part(  # type: ignore[no-untyped-def]
    to, acc, rows, mask, PART: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr
):
    channel = tl.arange(0, WORDS) * PER + PART
    where = to + rows[:, None] * WIDTH + channel[None, :]
    tl.store(where, acc.to(to.dtype.element_ty), mask=mask[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    k_scale,
    k_zero,
    v,
    v_scale,
    v_zero,
    length,
    partial,
    stats,
    out,
    sm_scale,
    softcap,
    queries,
    capacity,
    window,
    length_step,
    q_b,
    q_h,
    q_s,
    k_b,
    k_h,
    k_t,
    k_scale_b,
    k_scale_h,
    k_scale_t,
    k_zero_b,
    k_zero_h,
    k_zero_t,
    v_b,
    v_h,
    v_t,
    v_scale_b,
    v_scale_h,
    v_scale_t,
    v_zero_b,
    v_zero_h,
    v_zero_t,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_KIND: tl.constexpr,
    K_PER: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_PADDED_GROUPS: tl.constexpr,
    K_ZERO: tl.constexpr,
    K_UNIT: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_KIND: tl.constexpr,
    V_PER: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_PADDED_GROUPS: tl.constexpr,
    V_ZERO: tl.constexpr,
    V_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MODE: tl.constexpr,
):
    """One share of the tokens of one head; of stored scales, ``_t`` is the step between channels."""
    # Blocks of queries that read the same tokens run at the same time: all but one find them in the L2 cache.
    blocks = tl.cdiv(RATIO * queries, ROWS)
    place_of_head = tl.program_id(0) // blocks
    split = tl.program_id(1)
    batch = (place_of_head // HEADS).to(tl.int64)
    head = (place_of_head % HEADS).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    is_row = row < RATIO * queries
    used = tl.minimum(tl.maximum(tl.load(length + batch * length_step), 0), capacity)
    place = tl.where(is_row, used - queries + row % queries, -1)  # the last token that a row sees
    k += (batch * k_b + head * k_h) * K_UNIT
    v += (batch * v_b + head * v_h) * V_UNIT
    k_scale += batch * k_scale_b + head * k_scale_h
    v_scale += batch * v_scale_b + head * v_scale_h
    k_zero += batch * k_zero_b + head * k_zero_h
    v_zero += batch * v_zero_b + head * v_zero_h
    k_stored: tl.constexpr = K_GROUPS == 0 and K_KIND != "float"
    v_stored: tl.constexpr = V_GROUPS == 0 and V_KIND != "float"

    # Queries in parts, rows divided by a power of two.
    q += batch * q_b
    q_row = (head * RATIO + row // queries) * q_h + (row % queries) * q_s
    q0 = _query_part(q, q_row, is_row, k_scale, k_scale_t, 0, K_PER, K_WORDS, K_WIDTH, k_stored)
    q1, q2, q3 = q0, q0, q0
    size = tl.max(tl.abs(q0), 1)
    if K_PER > 1:
        q1 = _query_part(q, q_row, is_row, k_scale, k_scale_t, 1, K_PER, K_WORDS, K_WIDTH, k_stored)
        size = tl.maximum(size, tl.max(tl.abs(q1), 1))
    if K_PER == 4:
        q2 = _query_part(q, q_row, is_row, k_scale, k_scale_t, 2, K_PER, K_WORDS, K_WIDTH, k_stored)
        q3 = _query_part(q, q_row, is_row, k_scale, k_scale_t, 3, K_PER, K_WORDS, K_WIDTH, k_stored)
        size = tl.maximum(size, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where(power > 0, power, 1.0)
    k_dtype: tl.constexpr = tl.float16 if K_PER > 1 else tl.float32 if MODE == 0 else k.dtype.element_ty
    q0 = (q0 / power[:, None]).to(k_dtype)
    total = tl.sum(q0.to(tl.float32), 1)
    if K_PER > 1:
        q1 = (q1 / power[:, None]).to(k_dtype)
        total += tl.sum(q1.to(tl.float32), 1)
    if K_PER == 4:
        q2 = (q2 / power[:, None]).to(k_dtype)
        q3 = (q3 / power[:, None]).to(k_dtype)
        total += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    if k_stored and K_ZERO:
        total = _zero_part(q0, k_zero, k_zero_t, 0, K_PER, K_WORDS, K_WIDTH)
        total += _zero_part(q1, k_zero, k_zero_t, 1, K_PER, K_WORDS, K_WIDTH)
        if K_PER == 4:
            total += _zero_part(q2, k_zero, k_zero_t, 2, K_PER, K_WORDS, K_WIDTH)
            total += _zero_part(q3, k_zero, k_zero_t, 3, K_PER, K_WORDS, K_WIDTH)
    factor = power * sm_scale
    if K_KIND == "fp8" and MODE != 2:
        factor *= 256.0

    begin = 0
    if WINDOW:
        begin = tl.maximum(used - queries - window + 1, 0)
    tiles = tl.cdiv(used - begin, TOKENS)
    first, end = split * tiles // SPLITS, (split + 1) * tiles // SPLITS

    most = tl.full([ROWS], NOTHING, tl.float32)
    weight = tl.zeros([ROWS, TOKENS], tl.float32)  # added up over tokens at the end
    lifted = tl.zeros([ROWS, TOKENS], tl.float32)
    acc0 = tl.zeros([ROWS, V_WORDS], tl.float32)
    acc1 = tl.zeros([ROWS, V_WORDS], tl.float32)
    acc2 = tl.zeros([ROWS, V_WORDS], tl.float32)
    acc3 = tl.zeros([ROWS, V_WORDS], tl.float32)
    for tile in range(first, end):
        token = begin + tile * TOKENS + tl.arange(0, TOKENS)
        at = tl.minimum(token, used - 1).to(tl.int64)  # what lies behind the end is not read
        if K_GROUPS == 1:
            k_step = tl.load(k_scale + at * k_scale_t).to(tl.float32)
            if K_ZERO:
                k_base: tl.constexpr = 8.0 if K_PER == 4 else 128.0
                k_lift = tl.load(k_zero + at * k_zero_t).to(tl.float32) - k_base
        if V_GROUPS == 1:
            # Its power of two goes into the exponent, and what is left multiplies p, which stays below 2 therefore.
            v_step = tl.load(v_scale + at * v_scale_t).to(tl.float32)
            bits = v_step.to(tl.int32, bitcast=True)
            exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0
            inverse = (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
            v_step *= inverse
            if V_ZERO:
                v_base: tl.constexpr = 8.0 if V_PER == 4 else 128.0
                v_lift = tl.load(v_zero + at * v_zero_t).to(tl.float32) - v_base
        a, b, c, d = operands(
            k, k_scale, k_zero, at, k_t, k_scale_t, k_zero_t, K_KIND, K_PER, K_WORDS, K_WIDTH // K_PER,
            K_GROUPS, K_PADDED_GROUPS, K_ZERO, K_UNIT, TOKENS, MODE,
        )  # fmt: skip
        score = tl.dot(q0, tl.trans(a))
        if K_PER > 1:
            score = tl.dot(q1, tl.trans(b), score)
        if K_PER == 4:
            score = tl.dot(q2, tl.trans(c), score)
            score = tl.dot(q3, tl.trans(d), score)
        if K_GROUPS == 1:
            if K_ZERO:
                score -= total[:, None] * k_lift[None, :]
            score *= k_step[None, :]
        elif k_stored and K_ZERO:
            score -= total[:, None]
        score *= factor[:, None]
        if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            score = softcap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
        if V_GROUPS == 1:
            score += exponent[None, :]
        seen = token[None, :] <= place[:, None]
        if WINDOW:
            seen = seen & (token[None, :] > place[:, None] - window)
        score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        shrink = tl.exp2(most - higher)
        most = higher
        p = tl.exp2(score - most[:, None])
        if V_GROUPS == 1:
            weight = weight * shrink[:, None] + p * inverse[None, :]
            p *= v_step[None, :]
        else:
            weight = weight * shrink[:, None] + p
        v_dtype: tl.constexpr = tl.float16 if V_PER > 1 else tl.float32 if MODE == 0 else v.dtype.element_ty
        p = p.to(v_dtype)
        if V_GROUPS == 1 and V_ZERO:
            lifted = lifted * shrink[:, None] + p.to(tl.float32) * v_lift[None, :]
        a, b, c, d = operands(
            v, v_scale, v_zero, at, v_t, v_scale_t, v_zero_t, V_KIND, V_PER, V_WORDS, V_WIDTH // V_PER,
            V_GROUPS, V_PADDED_GROUPS, V_ZERO, V_UNIT, TOKENS, MODE,
        )  # fmt: skip
        acc0 = tl.dot(p, a, acc0 * shrink[:, None])
        if V_PER > 1:
            acc1 = tl.dot(p, b, acc1 * shrink[:, None])
        if V_PER == 4:
            acc2 = tl.dot(p, c, acc2 * shrink[:, None])
            acc3 = tl.dot(p, d, acc3 * shrink[:, None])

    total = tl.sum(weight, 1)
    lift = tl.sum(lifted, 1)
    over = tl.full([ROWS], 1.0, tl.float32)
    if SPLITS == 1:
        over /= tl.where(total > 0, total, 1.0)
    if V_KIND == "fp8" and MODE != 2:
        over *= 256.0
    flat = (place_of_head * RATIO * queries + row).to(tl.int64)
    rows = tl.num_programs(0) // blocks * RATIO * queries
    if SPLITS == 1:
        to = out
        to_row = flat
    else:
        to = partial
        to_row = split.to(tl.int64) * rows + flat
        tl.store(stats + to_row, most, mask=is_row)
        tl.store(stats + SPLITS * rows.to(tl.int64) + to_row, total, mask=is_row)
        is_row = is_row & (total != 0.0)  # what is not a number differs from 0, but need not be in the maximum
    for part in tl.static_range(V_PER):
        if part == 0:
            acc = acc0
        elif part == 1:
            acc = acc1
        elif part == 2:
            acc = acc2
        else:
            acc = acc3
        if V_GROUPS == 1 and V_ZERO:
            acc -= lift[:, None]
        if v_stored:
            acc = _result_part(
                acc, total, v_scale, v_zero, v_scale_t, v_zero_t, part, V_PER, V_WORDS, V_WIDTH, V_ZERO
            )  # fmt: skip
        _store_part(to, acc * over[:, None], to_row, is_row, part, V_PER, V_WORDS, V_WIDTH)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]
    partial,
    stats,
    out,
    rows,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of the result from what the splits have of it, in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, PADDED).to(tl.int64)
    most = tl.max(tl.load(stats + every * rows + row, mask=every < SPLITS, other=NOTHING), 0)
    channel = tl.arange(0, CHANNELS)
    acc = tl.zeros([CHUNK, CHANNELS], tl.float32)
    whole = tl.zeros([CHUNK], tl.float32)
    for start in tl.static_range(0, PADDED, CHUNK):
        split = start + tl.arange(0, CHUNK).to(tl.int64)
        own = tl.load(stats + split * rows + row, mask=split < SPLITS, other=NOTHING)
        weight = tl.load(stats + (SPLITS + split) * rows + row, mask=split < SPLITS, other=0.0)
        there = weight != 0.0  # 0: it has seen nothing, and written no result
        share = tl.where(there, tl.exp2(own - most), 0.0)
        whole += weight * share
        where = partial + (split * rows + row)[:, None] * WIDTH + channel[None, :]
        acc += tl.load(where, mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0) * share[:, None]
    total = tl.sum(whole, 0)
    result = tl.sum(acc, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + channel, result.to(out.dtype.element_ty), mask=channel < WIDTH)
