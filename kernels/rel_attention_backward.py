"""Relative attention in Triton, backward: deterministic, without atomics, with a scratch of a fixed size.

Two kernels recompute the weights, see rel_attention.py for the layout of a tile. One owns queries and walks over keys:

    dS = P * (grad v^T - delta),  dq = scale * (dS k + dBD r)

where dBD is dS moved back to the columns p of r. Per row that is a rotation, whose columns belong to this tile's left
rows of r or to its right ones, which are the next tile's left: a block of N columns is complete when it comes as left.
It goes to a scratch (heads, sequences, queries, positions), from which the vendor's product makes dr = dBD^T (q +
position_bias), and those of dq; heads, sequences and queries take turns in it. The other kernel owns keys and walks
over queries, on transposed tiles: dk = dS^T (q + content_bias), dv = P^T grad.
"""

import itertools

import torch
import triton
import triton.language as tl
from par_xl.kernels.rel_attention import (
    LOG2_E,
    Tiles,
    biased,
    capability,
    count_keys,
    end_chain,
    flatten_tile,
    head_rows,
    kept,
    key_rows,
    load_rows,
    padded,
    permute_tile,
    place_in_tile,
    position_rows,
    product,
    products,
    seen_keys,
    store_rows,
    strided,
    without_bf16,
)

SCRATCH_BYTES = 2**28


@triton.jit
def _prepare(
    q, content_bias, position_bias, out, grad, lse, content_q, position_q, peak, delta,
    n_heads, n_queries, factor: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Both queries in the forward's rounding, delta = grad . out, and peak = lse in powers of two."""
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    h = pid // n_blocks % n_heads
    b = pid // n_blocks // n_heads
    dtype: tl.constexpr = q[0].dtype.element_ty
    wide: tl.constexpr = lse.dtype.element_ty
    i = pid % n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = i < n_queries
    row = (b.to(tl.int64) * n_heads + h) * n_queries + i
    top = tl.load(lse + row, mask=is_query, other=-float("inf"))
    sees = top != -float("inf")  # a row that sees no key has no gradient, whatever it holds
    rows = load_rows(head_rows(q, b, h, i), sees, dtype, WIDTH, BLOCK_D)  # [M, D]
    d_out = load_rows(head_rows(grad, b, h, i), sees, wide, WIDTH, BLOCK_D)
    product = load_rows(head_rows(out, b, h, i), sees, wide, WIDTH, BLOCK_D) * d_out
    content = biased(rows, content_bias, h, factor, dtype, WIDTH, BLOCK_D)
    position = biased(rows, position_bias, h, factor, dtype, WIDTH, BLOCK_D)
    store_rows(head_rows(content_q, b, h, i), content, is_query, BLOCK_D)
    store_rows(head_rows(position_q, b, h, i), position, is_query, BLOCK_D)
    tl.store(
        peak + row, tl.where(sees, (top.to(tl.float64) * 1.4426950408889634).to(wide), float("inf")), mask=is_query
    )
    tl.store(delta + row, tl.sum(product, 1), mask=is_query)


@triton.jit
def in_accumulators(x, dtype: tl.constexpr):
    """x itself, where a product leaves it. Triton would else gather it in the layout of the store, which has many bank
    conflicts, and once more for each other use."""
    if dtype.primitive_bitwidth == 16:
        x = tl.dot(tl.zeros([x.shape[0], 16], dtype), tl.zeros([16, x.shape[1]], dtype), acc=x)
    return x


@triton.jit
def _differentiate_queries(
    content_q, position_q, k, v, r, k_memory, v_memory, lengths, seed, grad, peak, delta,
    norm, d_content, scratch,
    first_head, first_sequence, first_query, chunk_heads, chunk_sequences, chunk_queries,
    n_heads, n_queries, n_memory, n_keys, n_positions, first_position, n_columns, left, right,
    dropout_p: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PART: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
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
    position = load_rows(head_rows(position_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)
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

    # Tiles start where the first row of left stands at a multiple of BLOCK_N in the scratch.
    column = (begin - m0 + n_queries - first_position) // BLOCK_N * BLOCK_N - BLOCK_N
    start = column + first_position + m0 - n_queries + BLOCK_N
    p = first_position + column + c  # [N], the rows of left
    left_r = position_rows(r, h, p, n_positions, TYPE, WIDTH, BLOCK_D)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], wide)
    left_scores = product(position, left_r.T, zeros, PRECISION)  # [M, N]
    from_left = c[None, :] >= BLOCK_N - 1 - a[:, None]
    places = flatten_tile(place_in_tile(a[:, None], (c[None, :] + (BLOCK_N - 1 - a[:, None])) % BLOCK_N, BLOCK_N))
    places_back = flatten_tile(place_in_tile(a[:, None], (c[None, :] + a[:, None] + 1) % BLOCK_N, BLOCK_N))

    chunk = (chunk_h.to(tl.int64) * chunk_sequences + chunk_b) * chunk_queries + chunk_row + a
    scratch_rows = scratch + chunk[:, None] * n_columns + c[None, :]
    for zero in range(0, tl.minimum(tl.maximum(column, 0), n_columns), BLOCK_N):
        tl.store(scratch_rows + zero, tl.zeros([BLOCK_M, BLOCK_N], TYPE), mask=is_query[:, None])

    previous = tl.zeros([BLOCK_M, BLOCK_N], wide)
    total = tl.zeros([BLOCK_M, BLOCK_D], wide)
    weight_sum = tl.zeros([BLOCK_M], wide)
    for n0 in range(start, stop, BLOCK_N):
        j = n0 + c
        is_key = (j >= begin) & (j < stop)
        p += BLOCK_N
        right_r = position_rows(r, h, p, n_positions, TYPE, WIDTH, BLOCK_D)
        k_tile = load_rows(key_rows(k_memory, k, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
        v_tile = load_rows(key_rows(v_memory, v, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
        right_scores = product(position, right_r.T, zeros, PRECISION)
        right_scores = end_chain(right_scores, n0 >= stop)
        scores = permute_tile(tl.where(from_left, left_scores, right_scores), places)
        scores = product(content, k_tile.T, scores, PRECISION)
        left_scores = right_scores
        weights = tl.math.exp2(scores - row_peak)
        d_weights = product(d_out, v_tile.T, zeros, PRECISION)
        if HAS_DROPOUT:
            keep = kept(seed, i[:, None], j[None, :], b, h, n_heads, n_queries, n_keys, dropout_p)
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
        rotated = in_accumulators(permute_tile(d_scores, places_back), TYPE)
        d_left = tl.where(from_left, rotated, previous).to(TYPE)
        tl.store(scratch_rows + column, d_left, mask=is_query[:, None] & (column >= 0))
        previous = rotated
        column += BLOCK_N
    # What is left of the last tile belongs to its right rows.
    d_right = tl.where(from_left, 0.0, previous).to(TYPE)
    tl.store(scratch_rows + column, d_right, mask=is_query[:, None] & (column >= 0) & (column < n_columns))
    for zero in range(tl.maximum(column + BLOCK_N, 0), n_columns, BLOCK_N):
        tl.store(scratch_rows + zero, tl.zeros([BLOCK_M, BLOCK_N], TYPE), mask=is_query[:, None])

    if NORMALIZE:
        weight_sum = tl.where(weight_sum == 0, 1.0, weight_sum)
        tl.store(norm + row, 1 / weight_sum, mask=is_query)
        total = total / weight_sum[:, None]
    d_columns = tl.arange(0, BLOCK_D)
    tl.store(d_content + chunk[:, None] * BLOCK_D + d_columns, total, mask=is_query[:, None])


@triton.jit
def seen_by(j, n_queries, n_keys, left, right):
    """The queries [first, last) that see keys j."""
    middle = j - (n_keys - n_queries)
    return tl.maximum(middle - right, 0), tl.minimum(middle + left + 1, n_queries)


@triton.jit
def _differentiate_keys(
    content_q, position_q, k, v, r, k_memory, v_memory, lengths, seed, grad, peak, delta,
    norm, dk, dv, dk_memory, dv_memory,
    n_heads, n_queries, n_memory, n_keys, n_positions, left, right, dropout_p: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PART: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_keys, BLOCK_N)
    pid = tl.program_id(0)
    h = pid % n_heads
    b = pid // n_heads // n_blocks
    n0 = pid // n_heads % n_blocks * BLOCK_N  # the first keys, which most queries see, go first
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
        p = n0 - m0 + n_queries - BLOCK_N + c  # [N], the rows of left
        left_r = position_rows(r, h, p, n_positions, TYPE, WIDTH, BLOCK_D)
        p += BLOCK_N
        right_r = position_rows(r, h, p, n_positions, TYPE, WIDTH, BLOCK_D)
        position = load_rows(head_rows(position_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)  # [M, D]
        content = load_rows(head_rows(content_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)
        d_out = load_rows(head_rows(grad, b, h, i), is_query, TYPE, WIDTH, BLOCK_D)
        row_peak = tl.load(peak + head + i, mask=is_query, other=float("inf"))[None, :]
        row_delta = tl.load(delta + head + i, mask=is_query, other=0)[None, :]
        left_scores = product(left_r, position.T, zeros, PRECISION)  # [N, M]
        right_scores = product(right_r, position.T, zeros, PRECISION)
        left_scores = end_chain(left_scores, m0 >= stop)
        right_scores = end_chain(right_scores, m0 >= stop)
        scores = permute_tile(tl.where(from_left, left_scores, right_scores), places)
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
            keep = kept(seed, i[None, :], j[:, None], b, h, n_heads, n_queries, n_keys, dropout_p)
            d_weights = tl.where(keep, d_weights / tl.full([1, 1], 1 - dropout_p, wide), 0.0)
            dropped = tl.where(keep, weights, 0.0)
        dv_tile = product(dropped.to(TYPE), d_out, dv_tile, PRECISION)
        d_scores = weights * (d_weights - row_delta)
        if masked:
            d_scores = tl.where(visible & ((last - first > 1) | PART)[None, :], d_scores, 0.0)  # a single key's is 1
        dk_tile = product(d_scores.to(TYPE), content, dk_tile, PRECISION)

    dk_tile *= tl.full([1, 1], 0.6931471805599453, wide)  # content_q holds the scale, in powers of two
    dv_tile /= tl.full([1, 1], 1 - dropout_p, wide)
    is_key = j < n_keys
    store_rows(key_rows(dk_memory, dk, b, h, j, n_memory, HAS_MEMORY), dk_tile, is_key, WIDTH)
    store_rows(key_rows(dv_memory, dv, b, h, j, n_memory, HAS_MEMORY), dv_tile, is_key, WIDTH)


def backward_tiles(n_queries: int, block_d: int, dtype: torch.dtype, arch: int) -> Tiles:
    if n_queries <= 16:
        return Tiles(16, 32 if dtype == torch.float32 else 64, 4, 2)
    if dtype == torch.float32 and arch:
        return Tiles(16, 32 if block_d <= 64 else 16, 4, 1)
    return Tiles(32, 32, 4 if block_d <= 64 else 8, 2) if 0 < arch < 90 else Tiles(64, 64, 8, 2)


def _product(x, y, wide):
    """x y in a wider type than theirs, which on the CPU, for the interpreter, torch has no product for."""
    if x.is_cuda and x.dtype != wide:
        return torch.bmm(x, y, out_dtype=wide)
    return torch.bmm(x.to(wide), y.to(wide))


def _chunks(batch, heads, n_queries, row_bytes, block_m):
    """Cuts of the problem whose scratch stays within its budget: ranges of heads, sequences and queries."""
    queries = min(n_queries, max(SCRATCH_BYTES // row_bytes // block_m, 1) * block_m)
    sequences = min(batch, max(SCRATCH_BYTES // (row_bytes * queries), 1))
    together = min(heads, max(SCRATCH_BYTES // (row_bytes * queries * sequences), 1))
    cuts = (heads, together), (batch, sequences), (n_queries, queries)
    return itertools.product(*[[range(x, min(x + n, size)) for x in range(0, size, n)] for size, n in cuts])


def _used_rows(r, low, high, n_columns, block_d, n_seen):
    """Rows [low, high) of r, zeros for those from n_seen on, which belong to no pair and may hold anything."""
    rows = r[:, low:high]
    if n_seen is not None:
        rows = torch.where(torch.arange(low, high, device=r.device)[:, None] < n_seen, rows, 0)
    return torch.nn.functional.pad(rows, (0, block_d - r.shape[2], 0, n_columns - (high - low)))


@without_bf16(8)
def backward(
    grad, q, k, v, r, content_bias, position_bias, k_memory, v_memory, key_lengths, seed, out, lse,
    part, left, right, scale, dropout_p, dq, dk, dv, dr, d_content_bias, d_position_bias, dk_memory, dv_memory,
):  # fmt: skip
    """Fills the gradients of the forward's inputs; those of an absent memory are not touched."""
    batch, heads, n_queries, width = q.shape
    absent = k_memory is None
    n_memory = 0 if absent else k_memory.shape[2]
    n_keys = n_memory + k.shape[2]
    left, right = min(left, n_keys), min(right, max(n_queries - 1, 0))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    block_d = padded(width)
    content_q, position_q = q.new_empty(2, heads, batch, n_queries, block_d).transpose(1, 2).unbind()
    peak, delta, norm = lse.new_empty(3, *lse.shape).unbind()
    if q.numel():
        _prepare[(batch * heads * triton.cdiv(n_queries, 16),)](
            strided(q), strided(content_bias), strided(position_bias), strided(out), strided(grad), lse,
            strided(content_q), strided(position_q), peak, delta, heads, n_queries, scale * LOG2_E,
            WIDTH=width, BLOCK_M=16, BLOCK_D=block_d,
        )  # fmt: skip
    tensors = (
        strided(content_q), strided(position_q), strided(k), strided(v), strided(r),
        strided(k if absent else k_memory), strided(v if absent else v_memory),
        lse if key_lengths is None else key_lengths, lse if seed is None else seed, strided(grad), peak, delta,
    )  # fmt: skip
    flags = dict(
        WIDTH=width, BLOCK_D=block_d, HAS_MEMORY=n_memory > 0, HAS_LENGTHS=key_lengths is not None,
        HAS_DROPOUT=dropout_p > 0, PART=part, **products(q.dtype),
    )  # fmt: skip

    tiles = backward_tiles(n_queries, block_d, q.dtype, capability())
    # The rows of r that a window reaches are the columns of the scratch, rounded up to whole tiles.
    low = max(n_keys - 1 - left, 0)
    high = max(min(n_keys + right, r.shape[1]), low)
    n_columns = max(triton.cdiv(high - low, tiles.columns), 1) * tiles.columns
    n_seen = None if key_lengths is None or not batch else n_queries - 1 + n_memory + key_lengths.max()
    rows = _used_rows(r, low, high, n_columns, block_d, n_seen)
    d_rows = peak.new_zeros(heads, n_columns, block_d)
    d_biases = peak.new_zeros(2, heads, block_d)
    row_bytes = n_columns * q.element_size() + 2 * block_d * peak.element_size()
    for h, b, i in _chunks(batch, heads, n_queries, row_bytes, tiles.rows) if q.numel() else ():
        d_position_scores = q.new_empty(len(h), len(b) * len(i), n_columns)
        d_content = peak.new_empty(len(h), len(b) * len(i), block_d)
        _differentiate_queries[(len(h) * len(b) * triton.cdiv(len(i), tiles.rows),)](
            *tensors, norm, d_content, d_position_scores, h.start, b.start, i.start, len(h), len(b), len(i),
            heads, n_queries, n_memory, n_keys, r.shape[1], low, n_columns, left, right, dropout_p,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
        of_heads, of_batch, of_queries = (slice(x.start, x.stop) for x in (h, b, i))
        queries = position_q.transpose(0, 1)[of_heads, of_batch, of_queries].reshape(len(h), -1, block_d)
        d_position = _product(d_position_scores, rows[of_heads], peak.dtype)
        if q.dtype == norm.dtype and not part:
            of_rows = norm.transpose(0, 1)[of_heads, of_batch, of_queries].reshape(len(h), -1, 1)
            queries, d_position = queries * of_rows, d_position * of_rows
        d_rows[of_heads] += _product(d_position_scores.mT, queries, peak.dtype)
        for sums, d in zip(d_biases, (d_content, d_position), strict=True):
            sums[of_heads] += d.sum(1)
        d_queries = (d_content.add_(d_position) * scale).view(len(h), len(b), len(i), block_d)
        dq[of_batch, of_heads, of_queries] = d_queries[..., :width].transpose(0, 1)
    programs = batch * heads * triton.cdiv(n_keys, tiles.columns)
    if programs:
        _differentiate_keys[(programs,)](
            *tensors, norm, strided(dk), strided(dv),
            strided(dk if absent else dk_memory), strided(dv if absent else dv_memory),
            heads, n_queries, n_memory, n_keys, r.shape[1], left, right, dropout_p,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **flags,
        )  # fmt: skip
    dr.zero_()
    dr[:, low:high] = d_rows[:, : high - low, :width] / LOG2_E  # position_q holds the scale, in powers of two
    d_content_bias.copy_(d_biases[0, :, :width] * scale)
    d_position_bias.copy_(d_biases[1, :, :width] * scale)
