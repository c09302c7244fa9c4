"""Relative attention in Triton, backward: deterministic, without atomics, with a scratch of a fixed size.

Two kernels recompute the weights, see rel_attention.py for the layout of a tile. One owns queries and walks over keys:

    dS = P * (grad v^T - delta),  dq = scale * (dS k + dBD r)

where dBD is dS moved back to the columns p of r. Per row that is a rotation, whose columns belong to this tile's left
rows of r or to its right ones, which are the next tile's left: a block of N columns is complete when it comes as left.
It goes to a scratch (heads, sequences, queries, positions), from which the vendor's product makes dr = dBD^T (q +
position_bias), and those of dq; heads, sequences and queries take turns in it. The other kernel owns keys and walks
over queries, on transposed tiles: dk = dS^T (q + content_bias), dv = P^T grad.

Where distances are clamped, launches of their own, without products of positions, take what lies beyond: of the first
kernel whole tiles, before the others of the same queries, whose dS they sum for row 0 of r; of the second the keys that
no query is near. (Two loops in one kernel spill.) The columns of the first tile that is not beyond altogether precede
those of r in the scratch, for row 0 too.
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
    clamped,
    far_scores,
    head_rows,
    load_rows,
    padded,
    products,
    store_rows,
    strided,
    without_bf16,
)
from par_xl.kernels.rel_attention_keys import differentiate_keys
from par_xl.kernels.rel_attention_queries import differentiate_queries

SCRATCH_BYTES = 2**28


@triton.jit
def _prepare(
    q, r, content_bias, position_bias, out, grad, lse, content_q, position_q, peak, delta, far_score,
    n_heads, n_queries, factor: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_CLAMP: tl.constexpr,
):  # fmt: skip
    """Both queries in the forward's rounding, peak = lse in powers of two, delta = grad . out if there is a gradient,
    and the position score beyond the clamp."""
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
    content = biased(rows, content_bias, h, factor, dtype, WIDTH, BLOCK_D)
    position = biased(rows, position_bias, h, factor, dtype, WIDTH, BLOCK_D)
    store_rows(head_rows(content_q, b, h, i), content, is_query, BLOCK_D)
    store_rows(head_rows(position_q, b, h, i), position, is_query, BLOCK_D)
    tl.store(
        peak + row, tl.where(sees, (top.to(tl.float64) * 1.4426950408889634).to(wide), float("inf")), mask=is_query
    )
    if HAS_GRAD:
        d_out = load_rows(head_rows(grad, b, h, i), sees, wide, WIDTH, BLOCK_D)
        product = load_rows(head_rows(out, b, h, i), sees, wide, WIDTH, BLOCK_D) * d_out
        tl.store(delta + row, tl.sum(product, 1), mask=is_query)
    if HAS_CLAMP:
        tl.store((far_score + row)[:, None], far_scores(position, r, h, wide, WIDTH, BLOCK_D), mask=is_query[:, None])


def prepare(q, r, content_bias, position_bias, lse, scale, has_clamp=False, out=None, grad=None):
    """content_q and position_q ``(B, H, Q, BLOCK_D)``; peak, delta and far_score ``(B, H, Q)``, see _prepare."""
    batch, heads, n_queries, width = q.shape
    block_d = padded(width)
    queries = q.new_empty(2, heads, batch, n_queries, block_d).transpose(1, 2).unbind()
    rows = lse.new_empty(3, *lse.shape).unbind()
    if q.numel():
        _prepare[(batch * heads * triton.cdiv(n_queries, 16),)](
            strided(q), strided(r), strided(content_bias), strided(position_bias),
            strided(q if out is None else out), strided(q if grad is None else grad), lse,
            *map(strided, queries), *rows, heads, n_queries, scale * LOG2_E,
            WIDTH=width, BLOCK_M=16, BLOCK_D=block_d, HAS_GRAD=grad is not None, HAS_CLAMP=has_clamp,
        )  # fmt: skip
    return *queries, *rows


def backward_tiles(n_queries: int, block_d: int, dtype: torch.dtype, arch: int, dropout: bool) -> Tiles:
    if n_queries <= 16:
        return Tiles(16, 32 if dtype == torch.float32 else 64, 4, 2)
    if dtype == torch.float32 and arch:
        return Tiles(16, 32 if block_d <= 64 else 16, 4, 1)
    if 0 < arch < 90:
        return Tiles(32, 32, 4 if block_d <= 64 else 8, 2)
    return Tiles(32 if dropout and arch else 64, 64, 8, 2)  # the mask takes registers: more rows would spill


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
    """Rows [low, high) of r, row 0 for those before it, and zeros from n_seen on, where rows belong to no pair and may
    hold anything."""
    position = torch.arange(low, high, device=r.device).clamp(min=0)
    rows = r[:, position]
    if n_seen is not None:
        rows = torch.where(position[:, None] < n_seen, rows, 0)
    return torch.nn.functional.pad(rows, (0, block_d - r.shape[2], 0, n_columns - (high - low)))


@without_bf16(8)
def backward(
    grad, q, k, v, r, content_bias, position_bias, k_memory, v_memory, key_lengths, seed, out, lse,
    part, left, right, clamp_len, scale, dropout_p,
    dq, dk, dv, dr, d_content_bias, d_position_bias, dk_memory, dv_memory,
):  # fmt: skip
    """Fills the gradients of the forward's inputs; those of an absent memory are not touched."""
    batch, heads, n_queries, width = q.shape
    absent = k_memory is None
    n_memory = 0 if absent else k_memory.shape[2]
    n_keys = n_memory + k.shape[2]
    far, has_clamp = clamped(clamp_len, left, n_keys)
    left, right = min(left, n_keys), min(right, max(n_queries - 1, 0))
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    block_d = padded(width)
    prepared = prepare(q, r, content_bias, position_bias, lse, scale, has_clamp, out, grad)
    content_q, position_q, peak, delta, far_score = prepared
    norm = torch.empty_like(lse)
    tensors = (
        strided(content_q), strided(position_q), strided(k), strided(v), strided(r),
        strided(k if absent else k_memory), strided(v if absent else v_memory),
        lse if key_lengths is None else key_lengths, lse if seed is None else seed, strided(grad), peak, delta,
        far_score,
    )  # fmt: skip
    tiles = backward_tiles(n_queries, block_d, q.dtype, capability(), dropout_p > 0)
    flags = dict(
        WIDTH=width, BLOCK_D=block_d, HAS_MEMORY=n_memory > 0, HAS_LENGTHS=key_lengths is not None,
        HAS_DROPOUT=dropout_p > 0, HAS_CLAMP=has_clamp, PART=part, **products(q.dtype),
        BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip

    # The rows of r that a window reaches are the columns of the scratch, rounded up to whole tiles.
    # In front of them are the columns of a tile's distances beyond the clamp.
    low = -tiles.columns if has_clamp else max(far - left, 0)
    high = max(min(far + 1 + right, r.shape[1]), low)
    n_columns = max(triton.cdiv(high - low, tiles.columns), 1) * tiles.columns
    n_seen = None
    if key_lengths is not None and batch:
        seen = n_memory + key_lengths.max()
        n_seen = torch.where(seen > 0, (far - (n_keys - n_queries) + seen).clamp(min=1), 0)
    rows = _used_rows(r, low, high, n_columns, block_d, n_seen)
    d_rows = peak.new_zeros(heads, n_columns, block_d)
    d_biases = peak.new_zeros(2, heads, block_d)
    row_bytes = n_columns * q.element_size() + 2 * block_d * peak.element_size()
    for h, b, i in _chunks(batch, heads, n_queries, row_bytes, tiles.rows) if q.numel() else ():
        d_position_scores = q.new_empty(len(h), len(b) * len(i), n_columns)
        d_content = peak.new_empty(len(h), len(b) * len(i), block_d)
        d_far = peak.new_empty(len(h), len(b) * len(i))
        for near in (False, True) if has_clamp else (True,):
            differentiate_queries[(len(h) * len(b) * triton.cdiv(len(i), tiles.rows),)](
                *tensors, norm, d_content, d_far, d_position_scores, h.start, b.start, i.start, len(h), len(b), len(i),
                heads, n_queries, n_memory, n_keys, r.shape[1], low, n_columns, left, right, far, dropout_p, NEAR=near,
                **flags,
            )  # fmt: skip
        if has_clamp:
            d_position_scores[..., 0] += d_far
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
    n_blocks = triton.cdiv(n_keys, tiles.columns)
    n_far = max(n_keys - n_queries - far + 1, 0) // tiles.columns if has_clamp else 0  # blocks of keys no query is near
    for near, blocks in (False, range(n_far)), (True, range(n_far, n_blocks)):
        if batch * heads * len(blocks):
            differentiate_keys[(batch * heads * len(blocks),)](
                *tensors, norm, strided(dk), strided(dv),
                strided(dk if absent else dk_memory), strided(dv if absent else dv_memory), blocks.start, len(blocks),
                heads, n_queries, n_memory, n_keys, r.shape[1], left, right, far, dropout_p, NEAR=near, **flags,
            )  # fmt: skip
    beyond = max(-low, 0)
    if beyond:
        d_rows[:, beyond] += d_rows[:, :beyond].sum(1)
    dr.zero_()
    # position_q holds the scale, in powers of two.
    dr[:, low + beyond : high] = d_rows[:, beyond : high - low, :width] / LOG2_E
    d_content_bias.copy_(d_biases[0, :, :width] * scale)
    d_position_bias.copy_(d_biases[1, :, :width] * scale)
