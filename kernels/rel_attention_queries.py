"""The kernel of relative attention's backward that owns queries; see rel_attention_backward.py."""

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
)


@triton.jit
def in_accumulators(x, dtype: tl.constexpr):
    """x itself, where a product leaves it. Triton would else gather it in the layout of the store, which has many bank
    conflicts, and once more for each other use."""
    if dtype.primitive_bitwidth == 16:
        x = tl.dot(tl.zeros([x.shape[0], 16], dtype), tl.zeros([16, x.shape[1]], dtype), acc=x)
    return x


@triton.jit
def differentiate_queries(
    content_q, position_q, k, v, r, k_memory, v_memory, lengths, seed, grad, peak, delta, far_score,
    norm, d_content, d_far, scratch,
    first_head, first_sequence, first_query, chunk_heads, chunk_sequences, chunk_queries,
    n_heads, n_queries, n_memory, n_keys, n_positions, first_position, n_columns, left, right, far,
    dropout_p: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CLAMP: tl.constexpr,
    NEAR: tl.constexpr, PART: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(chunk_queries, BLOCK_M)
    pid = tl.program_id(0)
    chunk_h = pid % chunk_heads
    chunk_b = pid // chunk_heads // n_blocks
    chunk_row = (n_blocks - 1 - pid // chunk_heads % n_blocks) * BLOCK_M  # those that see most go first
    h = first_head + chunk_h
    b = first_sequence + chunk_b
    m0 = first_query + chunk_row
    wide: tl.constexpr = peak.dtype.element_ty

    # Where the results are as precise as lse, its rounding counts: the weights are divided by their sum (which is not 1
    # if there are more keys than these).
    NORMALIZE: tl.constexpr = (wide == TYPE) and not PART

    a = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    i = m0 + a
    is_query = i < n_queries
    content = load_rows(head_rows(content_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)  # [M, D]
    d_out = load_rows(head_rows(grad, b, h, i), is_query, TYPE, WIDTH, BLOCK_D)
    row = (b.to(tl.int64) * n_heads + h) * n_queries + i
    row_peak = tl.load(peak + row, mask=is_query, other=float("inf"))[:, None]
    row_delta = tl.load(delta + row, mask=is_query, other=0)[:, None]

    end, _ = count_keys(lengths, b, n_memory, n_keys, HAS_LENGTHS)
    first, last = seen_keys(i, n_queries, n_keys, end, left, right)  # of each query
    if not PART:
        first = tl.where(last - first == 1, last, first)  # the weight of a single key is constant: exactly no gradient
    last_query = tl.minimum(m0 + BLOCK_M, n_queries) - 1
    begin, all_end = seen_keys(m0, n_queries, n_keys, end, left, right)
    all_begin, stop = seen_keys(last_query, n_queries, n_keys, end, left, right)

    # Tiles start where the first row of left stands at a multiple of BLOCK_N in the scratch. Those that start before it
    # are whole tiles beyond the clamp, and another launch's.
    origin = far - (n_keys - n_queries)  # p = j - i + origin
    before = tl.cdiv(n_keys, BLOCK_N) * BLOCK_N
    column = (begin - m0 + origin + 1 - first_position + before) // BLOCK_N * BLOCK_N - BLOCK_N - before
    start = column + first_position + m0 - origin - 1 + BLOCK_N
    if HAS_CLAMP:
        near = start + tl.maximum(-column, 0)
        start = near if NEAR else start
        stop = stop if NEAR else tl.minimum(near, stop)
        column = tl.maximum(column, 0)

    chunk = (chunk_h.to(tl.int64) * chunk_sequences + chunk_b) * chunk_queries + chunk_row + a
    d_content_rows = d_content + chunk[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], wide)
    total = tl.zeros([BLOCK_M, BLOCK_D], wide)
    weight_sum = tl.zeros([BLOCK_M], wide)
    dropout = (seed, dropout_p, b, h, n_heads, n_queries, n_keys)
    if NEAR:
        if HAS_CLAMP:
            total = tl.load(d_content_rows, mask=is_query[:, None], other=0)
            weight_sum = tl.load(norm + row, mask=is_query, other=0)
        scratch_rows = scratch + chunk[:, None] * n_columns + c[None, :]
        for zero in range(0, tl.minimum(tl.maximum(column, 0), n_columns), BLOCK_N):
            tl.store(scratch_rows + zero, tl.zeros([BLOCK_M, BLOCK_N], TYPE), mask=is_query[:, None])
        position = load_rows(head_rows(position_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)
        p = first_position + column + c  # [N], the rows of left
        left_r = position_rows(r, h, p, n_positions, HAS_CLAMP, TYPE, WIDTH, BLOCK_D)
        left_scores = product(position, left_r.T, zeros, PRECISION)  # [M, N]
        from_left = c[None, :] >= BLOCK_N - 1 - a[:, None]
        places = flatten_tile(place_in_tile(a[:, None], (c[None, :] + (BLOCK_N - 1 - a[:, None])) % BLOCK_N, BLOCK_N))
        places_back = flatten_tile(place_in_tile(a[:, None], (c[None, :] + a[:, None] + 1) % BLOCK_N, BLOCK_N))
        previous = zeros
    else:
        constant = zeros + tl.load(far_score + row, mask=is_query, other=0)[:, None]
        far_sum = tl.zeros([BLOCK_M], wide)
    for n0 in range(start, stop, BLOCK_N):
        j = n0 + c
        is_key = (j >= begin) & (j < stop)
        if NEAR:
            p += BLOCK_N
            right_r = position_rows(r, h, p, n_positions, False, TYPE, WIDTH, BLOCK_D)
        k_tile = load_rows(key_rows(k_memory, k, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
        v_tile = load_rows(key_rows(v_memory, v, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
        if NEAR:
            right_scores = product(position, right_r.T, zeros, PRECISION)
            right_scores = end_chain(right_scores, n0 >= stop)
            scores = permute_tile(tl.where(from_left, left_scores, right_scores), places)
            left_scores = right_scores
        else:
            scores = constant
        scores = product(content, k_tile.T, scores, PRECISION)
        weights = tl.math.exp2(scores - row_peak)
        d_weights = product(d_out, v_tile.T, zeros, PRECISION)
        if HAS_DROPOUT:
            keep = kept(i[:, None], j[None, :], dropout)
            d_weights = tl.where(keep, d_weights / tl.full([1, 1], 1 - dropout_p, wide), 0.0)
        d_scores = weights * (d_weights - row_delta)
        if (n0 < all_begin) | (n0 + BLOCK_N > all_end):
            visible = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
            d_scores = tl.where(visible, d_scores, 0.0)
            if NORMALIZE:
                weights = tl.where(visible, weights, 0.0)
        if NORMALIZE:
            weight_sum += tl.sum(weights, 1)
        total = product(d_scores.to(TYPE), k_tile, total, PRECISION)
        if NEAR:
            rotated = in_accumulators(permute_tile(d_scores, places_back), TYPE)
            d_left = tl.where(from_left, rotated, previous).to(TYPE)
            tl.store(scratch_rows + column, d_left, mask=is_query[:, None] & (column >= 0))
            previous = rotated
            column += BLOCK_N
        else:
            far_sum += tl.sum(d_scores, 1)

    if NEAR:
        # What is left of the last tile belongs to its right rows.
        d_right = tl.where(from_left, 0.0, previous).to(TYPE)
        tl.store(scratch_rows + column, d_right, mask=is_query[:, None] & (column >= 0) & (column < n_columns))
        for zero in range(tl.maximum(column + BLOCK_N, 0), n_columns, BLOCK_N):
            tl.store(scratch_rows + zero, tl.zeros([BLOCK_M, BLOCK_N], TYPE), mask=is_query[:, None])
        if NORMALIZE:
            weight_sum = tl.where(weight_sum == 0, 1.0, weight_sum)
            total = total / weight_sum[:, None]
            weight_sum = 1 / weight_sum
    else:
        tl.store(d_far + chunk, far_sum, mask=is_query)
    if NORMALIZE:
        tl.store(norm + row, weight_sum, mask=is_query)
    tl.store(d_content_rows, total, mask=is_query[:, None])
