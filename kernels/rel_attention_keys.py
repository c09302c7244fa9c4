"""The kernel of relative attention's backward that owns keys; see rel_attention_backward.py."""

import triton
import triton.language as tl
from par_xl.kernels.rel_attention import (
    count_keys,
    end_chain,
    flatten_tile,
    head_rows,
    kept,
    key_rows,
    load_rows,
    permute_tile,
    place_in_tile,
    position_rows,
    product,
    seen_keys,
    store_rows,
)


@triton.jit
def seen_by(j, n_queries, n_keys, left, right):
    """The queries [first, last) that see keys j."""
    middle = j - (n_keys - n_queries)
    return tl.maximum(middle - right, 0), tl.minimum(middle + left + 1, n_queries)


@triton.jit
def position_scores(
    position, r, h, p, n_positions, from_left, places, zeros, never,
    HAS_CLAMP: tl.constexpr, TYPE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The position scores [N, M] of a transposed tile, whose left rows of r are p [N]; see rel_attention.py."""
    BLOCK_N: tl.constexpr = zeros.shape[0]
    BLOCK_D: tl.constexpr = position.shape[1]
    left_r = position_rows(r, h, p, n_positions, HAS_CLAMP, TYPE, WIDTH, BLOCK_D)
    right_r = position_rows(r, h, p + BLOCK_N, n_positions, HAS_CLAMP, TYPE, WIDTH, BLOCK_D)
    left_scores = product(left_r, position.T, zeros, PRECISION)  # [N, M]
    right_scores = product(right_r, position.T, zeros, PRECISION)
    left_scores = end_chain(left_scores, never)
    right_scores = end_chain(right_scores, never)
    return permute_tile(tl.where(from_left, left_scores, right_scores), places)


@triton.jit
def differentiate_keys(
    content_q, position_q, k, v, r, k_memory, v_memory, lengths, seed, grad, peak, delta, far_score,
    norm, dk, dv, dk_memory, dv_memory,
    first_block, n_blocks, n_heads, n_queries, n_memory, n_keys, n_positions, left, right, far, dropout_p: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CLAMP: tl.constexpr,
    NEAR: tl.constexpr, PART: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % n_heads
    b = pid // n_heads // n_blocks
    n0 = (first_block + pid // n_heads % n_blocks) * BLOCK_N  # the first keys, which most queries see, go first
    wide: tl.constexpr = peak.dtype.element_ty

    a = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    j = n0 + c
    end, _ = count_keys(lengths, b, n_memory, n_keys, HAS_LENGTHS)
    is_key = j < end
    k_tile = load_rows(key_rows(k_memory, k, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)  # [N, D]
    v_tile = load_rows(key_rows(v_memory, v, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)

    last_key = tl.minimum(n0 + BLOCK_N, end) - 1
    begin, all_end = seen_by(n0, n_queries, n_keys, left, right)
    all_begin, stop = seen_by(last_key, n_queries, n_keys, left, right)
    stop = tl.where(n0 < end, stop, 0)
    all_end = tl.where(n0 + BLOCK_N <= end, all_end, 0)
    from_left = c[:, None] >= BLOCK_N - 1 - a[None, :]
    places = flatten_tile(place_in_tile((c[:, None] + (BLOCK_N - 1 - a[None, :])) % BLOCK_N, a[None, :], BLOCK_M))
    head = (b.to(tl.int64) * n_heads + h) * n_queries

    zeros = tl.zeros([BLOCK_N, BLOCK_M], wide)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], wide)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], wide)
    for m0 in range(begin, stop, BLOCK_M):
        i = m0 + a
        first, last = seen_keys(i, n_queries, n_keys, end, left, right)
        is_query = (i < stop) & (first < last)
        content = load_rows(head_rows(content_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)  # [M, D]
        d_out = load_rows(head_rows(grad, b, h, i), is_query, TYPE, WIDTH, BLOCK_D)
        row_peak = tl.load(peak + head + i, mask=is_query, other=float("inf"))[None, :]
        row_delta = tl.load(delta + head + i, mask=is_query, other=0)[None, :]
        if NEAR:
            position = load_rows(head_rows(position_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)
            p = n0 - m0 + far + 1 - (n_keys - n_queries) - BLOCK_N + c  # [N], the rows of left
            scores = position_scores(
                position, r, h, p, n_positions, from_left, places, zeros, m0 >= stop, HAS_CLAMP, TYPE, WIDTH, PRECISION
            )
        else:
            scores = zeros + tl.load(far_score + head + i, mask=is_query, other=0)[None, :]
        scores = product(k_tile, content.T, scores, PRECISION)
        weights = tl.math.exp2(scores - row_peak)
        if (wide == TYPE) and not PART:
            weights *= tl.load(norm + head + i, mask=is_query, other=0)[None, :]
        masked = (m0 < all_begin) | (m0 + BLOCK_M > all_end)
        visible = (j[:, None] >= first[None, :]) & (j[:, None] < last[None, :]) & is_query[None, :]
        if masked:
            weights = tl.where(visible, weights, 0.0)
        d_weights = product(v_tile, d_out.T, zeros, PRECISION)
        dropped = weights
        if HAS_DROPOUT:
            keep = kept(i[None, :], j[:, None], (seed, dropout_p, b, h, n_heads, n_queries, n_keys))
            d_weights = tl.where(keep, d_weights / tl.full([1, 1], 1 - dropout_p, wide), 0.0)
            dropped = tl.where(keep, weights, 0.0)
        dv_tile = product(dropped.to(TYPE), d_out, dv_tile, PRECISION)
        d_scores = weights * (d_weights - row_delta)
        if masked:
            visible = visible & ((last - first > 1) | PART)[None, :]  # the weight of a single key is 1
            d_scores = tl.where(visible, d_scores, 0.0)
        dk_tile = product(d_scores.to(TYPE), content, dk_tile, PRECISION)

    dk_tile *= tl.full([1, 1], 0.6931471805599453, wide)  # content_q holds the scale, in powers of two
    dv_tile /= tl.full([1, 1], 1 - dropout_p, wide)
    is_key = j < n_keys
    store_rows(key_rows(dk_memory, dk, b, h, j, n_memory, HAS_MEMORY), dk_tile, is_key, WIDTH)
    store_rows(key_rows(dv_memory, dv, b, h, j, n_memory, HAS_MEMORY), dv_tile, is_key, WIDTH)
