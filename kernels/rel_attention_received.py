"""The attention that each key receives, in Triton: received_j = sum_i exp(score[i, j] - lse_i), without atomics.

A program owns keys and walks over queries, on the transposed tiles of the backward's kernel that owns keys.
"""

import triton
import triton.language as tl
from par_xl.kernels.rel_attention import (
    capability,
    clamped,
    count_keys,
    flatten_tile,
    head_rows,
    key_rows,
    load_rows,
    padded,
    place_in_tile,
    product,
    products,
    seen_keys,
    strided,
    without_bf16,
)
from par_xl.kernels.rel_attention_backward import backward_tiles, prepare
from par_xl.kernels.rel_attention_keys import position_scores, seen_by


@triton.jit
def _receive(
    content_q, position_q, k, r, k_memory, lengths, peak, received,
    n_blocks, n_heads, n_queries, n_memory, n_keys, n_positions, left, right, far,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_CLAMP: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    h = pid % n_heads
    b = pid // n_heads // n_blocks
    n0 = pid // n_heads % n_blocks * BLOCK_N  # the first keys, which most queries see, go first
    wide: tl.constexpr = peak.dtype.element_ty

    a = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    j = n0 + c
    end, possible = count_keys(lengths, b, n_memory, n_keys, HAS_LENGTHS)
    k_tile = load_rows(key_rows(k_memory, k, b, h, j, n_memory, HAS_MEMORY), j < end, TYPE, WIDTH, BLOCK_D)  # [N, D]
    begin, _ = seen_by(n0, n_queries, n_keys, left, right)
    _, stop = seen_by(tl.minimum(n0 + BLOCK_N, end) - 1, n_queries, n_keys, left, right)
    stop = tl.where(n0 < end, stop, 0)
    from_left = c[:, None] >= BLOCK_N - 1 - a[None, :]
    places = flatten_tile(place_in_tile((c[:, None] + (BLOCK_N - 1 - a[None, :])) % BLOCK_N, a[None, :], BLOCK_M))
    head = (b.to(tl.int64) * n_heads + h) * n_queries

    zeros = tl.zeros([BLOCK_N, BLOCK_M], wide)
    total = tl.zeros([BLOCK_N], wide)
    for m0 in range(begin, stop, BLOCK_M):
        i = m0 + a
        first, last = seen_keys(i, n_queries, n_keys, end, left, right)
        is_query = (i < stop) & (first < last)
        content = load_rows(head_rows(content_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)  # [M, D]
        position = load_rows(head_rows(position_q, b, h, i), is_query, TYPE, BLOCK_D, BLOCK_D)
        row_peak = tl.load(peak + head + i, mask=is_query, other=float("inf"))
        p = n0 - m0 + far + 1 - (n_keys - n_queries) - BLOCK_N + c
        scores = position_scores(
            position, r, h, p, n_positions, from_left, places, zeros, m0 >= stop, HAS_CLAMP, TYPE, WIDTH, PRECISION
        )
        scores = product(k_tile, content.T, scores, PRECISION)
        visible = (j[:, None] >= first[None, :]) & (j[:, None] < last[None, :]) & is_query[None, :]
        total += tl.sum(tl.where(visible, tl.math.exp2(scores - row_peak[None, :]), 0.0), 1)
    row = (b.to(tl.int64) * n_heads + h) * n_keys + j
    tl.store(received + row, tl.where(possible, total, float("nan")), mask=j < n_keys)


@without_bf16(1)
def receive(
    q, k, r, content_bias, position_bias, k_memory, key_lengths, lse, left, right, clamp_len, scale, received
):  # fmt: skip
    """Fills ``received (B, H, K)``."""
    batch, heads, n_queries, width = q.shape
    n_keys = received.shape[2]
    n_memory = n_keys - k.shape[2]
    if not q.numel() or not n_keys:
        received.zero_()
        return
    far, has_clamp = clamped(clamp_len, left, n_keys)
    block_d = padded(width)
    content_q, position_q, peak, *_ = prepare(q, r, content_bias, position_bias, lse, scale)
    tiles = backward_tiles(n_queries, block_d, q.dtype, capability(), False)
    n_blocks = triton.cdiv(n_keys, tiles.columns)
    _receive[(batch * heads * n_blocks,)](
        strided(content_q), strided(position_q), strided(k), strided(r), strided(k if k_memory is None else k_memory),
        lse if key_lengths is None else key_lengths, peak, received,
        n_blocks, heads, n_queries, n_memory, n_keys, r.shape[1], min(left, n_keys), min(right, max(n_queries - 1, 0)),
        far, WIDTH=width, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_D=block_d, HAS_MEMORY=n_memory > 0,
        HAS_LENGTHS=key_lengths is not None, HAS_CLAMP=has_clamp, **products(q.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
