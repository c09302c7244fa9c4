"""Relative attention in Triton, forward; what the backward shares stands here too.

A program owns BLOCK_M queries i = m0 + a of one head and walks over tiles of N = BLOCK_N keys j = n0 + b. A pair's
position score is column p = far - d = j - i + far - (K - Q) of the product with all rows of r, hence column
c = b - a + N - 1 of the 2N columns that start at p0 = n0 - m0 + far + 1 - (K - Q) - N:

    left = qp r[p0 : p0+N]^T,  right = qp r[p0+N : p0+2N]^T           the next tile's left is this tile's right
    shifted[a, b] = mixed[a, (b + N - 1 - a) % N],  mixed[a, c] = left[a, c] if c >= N - 1 - a else right[a, c]
    score = qc k^T + shifted                                         qc, qp = (q + bias) * scale * log2(e), rounded once

so a tile costs three products, one of them for the positions, and one rotation of each row. Needs BLOCK_M <= BLOCK_N.
Where distances are clamped, p < 0 is row 0, and a whole tile of those needs no such product: its position scores are
one number for each query.
A tensor argument is a tuple (pointer, strides of all dimensions but the last, which is contiguous).
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def flatten_tile(x):
    """[M, N] -> [M * N] such that a warp's 32 accumulator lanes are neighbours, each in a memory bank of its own."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    return x.reshape(M // 8, 8, N // 8, 4, 2).permute(0, 2, 4, 1, 3).reshape(M * N)


@triton.jit
def place_in_tile(row, column, N: tl.constexpr):
    """Where ``flatten_tile`` puts an element."""
    return ((((row // 8) * (N // 8) + column // 8) * 2 + column % 2) * 8 + row % 8) * 4 + column // 2 % 4


@triton.jit
def permute_tile(x, places):
    """x[M, N] with the element at ``places`` (M * N, in the order of ``flatten_tile``) moved to each element.

    A rank-1 gather, which costs one store and one load of shared memory for each element; Triton lowers a gather of
    higher rank to many shuffles between the lanes of a warp.
    """
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    moved = tl.gather(flatten_tile(x), places, 0)
    return moved.reshape(M // 8, N // 8, 2, 8, 4).permute(0, 3, 1, 4, 2).reshape(M, N)


@triton.jit
def end_chain(x, never):
    """x itself. From a product that leads to another in straight code Triton takes all warps to one row each, and two
    groups of four compute the same 64 rows twice; a branch hides the other product, even one that is never taken."""
    if never:
        x = x * 0
    return x


@triton.jit
def product(x, y, sum, PRECISION: tl.constexpr):
    """sum + x y. In full fp32, with few queries, in sums of 16 products: one long chain of additions for each score has
    several times the error of the matrix-vector product that eager PyTorch takes there."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    N: tl.constexpr = y.shape[1]
    if K > 16 and (M <= 16 or N <= 16) and x.dtype == tl.float32 and PRECISION == "ieee":
        x = x.reshape(M, K // 16, 16).permute(1, 0, 2)
        parts = tl.dot(x, y.reshape(K // 16, 16, N), input_precision=PRECISION, out_dtype=sum.dtype)
        sum += tl.sum(parts, 0)
    else:
        sum = tl.dot(x, y, acc=sum, input_precision=PRECISION, out_dtype=sum.dtype)
    return sum


@triton.jit
def head_rows(x, b, h, rows):
    """Pointers to rows [N, 1] of x (B, H, rows, D)."""
    return x[0] + b.to(tl.int64) * x[1] + h.to(tl.int64) * x[2] + rows.to(tl.int64)[:, None] * x[3]


@triton.jit
def position_rows(
    r, h, rows, n_positions, HAS_CLAMP: tl.constexpr, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows [N, BLOCK_D] of r (H, P, D), zeros outside it; before it row 0 if distances are clamped."""
    if HAS_CLAMP:
        rows = tl.maximum(rows, 0)
    pointers = r[0] + h.to(tl.int64) * r[1] + rows.to(tl.int64)[:, None] * r[2]
    return load_rows(pointers, (rows >= 0) & (rows < n_positions), dtype, WIDTH, BLOCK_D)


@triton.jit
def key_rows(memory, segment, b, h, rows, n_memory, HAS_MEMORY: tl.constexpr):
    """Pointers [N, 1] to rows that are counted over the memory, then the segment."""
    pointers = head_rows(segment, b, h, rows - n_memory)
    if HAS_MEMORY:
        pointers = tl.where((rows < n_memory)[:, None], head_rows(memory, b, h, rows), pointers)
    return pointers


@triton.jit
def load_rows(pointers, valid, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D], zeros in rows that are not valid and in columns past the head width."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None]
    if WIDTH < BLOCK_D:
        mask = mask & (columns < WIDTH)
    return tl.load(pointers + columns, mask=mask, other=0).to(dtype)


@triton.jit
def store_rows(pointers, x, valid, WIDTH: tl.constexpr):
    columns = tl.arange(0, x.shape[1])[None, :]
    tl.store(pointers + columns, x.to(pointers.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH))


@triton.jit
def biased(rows, bias, h, factor, dtype: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows [N, D] + bias[h]) * factor, rounded once to ``dtype``, for a bias (H, D)."""
    columns = tl.arange(0, BLOCK_D)
    row = tl.load(bias[0] + h * bias[1] + columns, mask=columns < WIDTH, other=0).to(tl.float64)
    return ((rows.to(tl.float64) + row[None, :]) * tl.full([1, 1], factor, tl.float64)).to(dtype)


@triton.jit
def count_keys(lengths, b, n_memory, n_keys, HAS_LENGTHS: tl.constexpr):
    """The real keys of a sequence, memory included, and whether its length is a possible one."""
    end = n_keys
    possible = True
    if HAS_LENGTHS:
        length = tl.load(lengths + b)
        possible = (length >= 0) & (length <= n_keys - n_memory)
        end = tl.minimum(tl.maximum(n_memory + length, n_memory), n_keys).to(tl.int32)
    return end, possible


@triton.jit
def seen_keys(i, n_queries, n_keys, end, left, right):
    """The keys [first, last) of queries i: -right <= i + (K - Q) - j <= left, j < end."""
    middle = i + n_keys - n_queries
    return tl.maximum(middle - left, 0), tl.minimum(middle + right + 1, end)


@triton.jit
def kept(i, j, dropout):
    """Dropout's mask of queries i and keys j: the same for every tile size, and on every backend."""
    seed, dropout_p, b, h, n_heads, n_queries, n_keys = dropout
    row = ((b.to(tl.int64) * n_heads + h) * n_queries + i) * n_keys
    return tl.rand(tl.load(seed), row + j) >= tl.full([1, 1], dropout_p, tl.float32)


@triton.jit
def far_scores(position_q, r, h, wide: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The position scores [M, 1] of queries [M, D] beyond the clamp: the products with row 0 of r."""
    columns = tl.arange(0, BLOCK_D)
    row = tl.load(r[0] + h.to(tl.int64) * r[1] + columns, mask=columns < WIDTH, other=0)
    return tl.sum(position_q.to(wide) * row.to(wide)[None, :], 1)[:, None]


@triton.jit
def attend(
    scores, v_tile, i, j, first, last, masked, top, total, mean, dropout,
    HAS_DROPOUT: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax with one more tile: of each query the largest score, the sum of weights, and of values."""
    if masked:
        scores = tl.where((j[None, :] >= first[:, None]) & (j[None, :] < last[:, None]), scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen no key yet
    weights = tl.math.exp2(scores - base[:, None])
    shrink = tl.math.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    if HAS_DROPOUT:
        weights = tl.where(kept(i[:, None], j[None, :], dropout), weights, 0.0)
    mean = product(weights.to(TYPE), v_tile, mean * shrink[:, None], PRECISION)
    return new_top, total, mean


@triton.jit
def _forward(
    q, k, v, r, content_bias, position_bias, k_memory, v_memory, lengths, seed, out, lse,
    n_heads, n_queries, n_memory, n_keys, n_positions, left, right, far,
    factor: tl.float64, dropout_p: tl.float64,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MEMORY: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_CLAMP: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The heads of a sequence are neighbours and share r; its last queries, which see most, go first.
    n_blocks = tl.cdiv(n_queries, BLOCK_M)
    pid = tl.program_id(0)
    h = pid % n_heads
    b = pid // n_heads // n_blocks
    m0 = (n_blocks - 1 - pid // n_heads % n_blocks) * BLOCK_M
    wide: tl.constexpr = lse.dtype.element_ty

    a = tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_N)
    i = m0 + a
    is_query = i < n_queries
    rows = load_rows(head_rows(q, b, h, i), is_query, TYPE, WIDTH, BLOCK_D)  # [M, D]
    content_q = biased(rows, content_bias, h, factor, TYPE, WIDTH, BLOCK_D)
    position_q = biased(rows, position_bias, h, factor, TYPE, WIDTH, BLOCK_D)

    end, possible = count_keys(lengths, b, n_memory, n_keys, HAS_LENGTHS)
    first, last = seen_keys(i, n_queries, n_keys, end, left, right)  # of each query
    last_query = tl.minimum(m0 + BLOCK_M, n_queries) - 1
    begin, all_end = seen_keys(m0, n_queries, n_keys, end, left, right)
    all_begin, stop = seen_keys(last_query, n_queries, n_keys, end, left, right)

    top = tl.full([BLOCK_M], -float("inf"), wide)
    total = tl.zeros([BLOCK_M], wide)
    mean = tl.zeros([BLOCK_M, BLOCK_D], wide)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], wide)
    dropout = (seed, dropout_p, b, h, n_heads, n_queries, n_keys)
    near = begin
    if HAS_CLAMP:  # whole tiles of farther keys come before it
        near += tl.maximum(m0 + n_keys - n_queries - far + 1 - begin, 0) // BLOCK_N * BLOCK_N
    from_left = c[None, :] >= BLOCK_N - 1 - a[:, None]
    places = flatten_tile(place_in_tile(a[:, None], (c[None, :] + (BLOCK_N - 1 - a[:, None])) % BLOCK_N, BLOCK_N))

    for NEAR in tl.static_range(1 - HAS_CLAMP, 2):
        if NEAR:
            position = near - m0 + far + 1 - (n_keys - n_queries) - BLOCK_N + c  # [N], the rows of left
            left_r = position_rows(r, h, position, n_positions, HAS_CLAMP, TYPE, WIDTH, BLOCK_D)
            left_scores = product(position_q, left_r.T, zeros, PRECISION)  # [M, N]
        else:
            constant = zeros + far_scores(position_q, r, h, wide, WIDTH, BLOCK_D)
        for n0 in range(near if NEAR else begin, stop if NEAR else tl.minimum(near, stop), BLOCK_N):
            j = n0 + c
            is_key = j < stop
            k_tile = load_rows(key_rows(k_memory, k, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
            v_tile = load_rows(key_rows(v_memory, v, b, h, j, n_memory, HAS_MEMORY), is_key, TYPE, WIDTH, BLOCK_D)
            if NEAR:
                position += BLOCK_N
                r_tile = position_rows(r, h, position, n_positions, HAS_CLAMP, TYPE, WIDTH, BLOCK_D)
                right_scores = product(position_q, r_tile.T, zeros, PRECISION)
                right_scores = end_chain(right_scores, n0 >= stop)
                scores = permute_tile(tl.where(from_left, left_scores, right_scores), places)
                left_scores = right_scores
            else:
                scores = constant
            scores = product(content_q, k_tile.T, scores, PRECISION)
            masked = (n0 < all_begin) | (n0 + BLOCK_N > all_end)
            top, total, mean = attend(
                scores, v_tile, i, j, first, last, masked, top, total, mean, dropout, HAS_DROPOUT, TYPE, PRECISION
            )

    total = tl.where(total == 0, 1.0, total)  # a row that sees no key: 0, and a logarithm of -inf
    result = mean / (total[:, None] * tl.full([1, 1], 1 - dropout_p, wide))
    store_rows(head_rows(out, b, h, i), tl.where(possible, result, float("nan")), is_query, WIDTH)
    row = (b.to(tl.int64) * n_heads + h) * n_queries + i
    # Rounded once: an error here is an error of every weight that the backward recomputes.
    exact = (top.to(tl.float64) + tl.math.log2(total).to(tl.float64)) * 0.6931471805599453
    tl.store(lse + row, exact.to(wide), mask=is_query)


class Tiles(NamedTuple):
    """How a kernel is cut and launched."""

    rows: int
    columns: int
    warps: int
    stages: int


def capability() -> int:
    """The architecture that kernels are compiled for, as 10 * major + minor; 0 in the interpreter."""
    return 0 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


def forward_tiles(n_queries: int, width: int, dtype: torch.dtype, arch: int) -> Tiles:
    if n_queries <= 16:
        return Tiles(16, 32 if dtype == torch.float32 else 64, 4, 2)
    if dtype == torch.float32 and arch:
        return Tiles(32, 32, 8, 1)
    # Four warps spill where rows are not whole tiles, and their loads need masks.
    return Tiles(64, 64, 4 if width == padded(width) <= 64 and arch == 90 else 8, 2)


def clamped(clamp_len: int, left: int, n_keys: int) -> tuple[int, bool]:
    """The distance of row 0 of r, and whether a query may see farther than that."""
    far = min(n_keys - 1, clamp_len)
    return far, far < min(n_keys - 1, left)


def padded(width: int) -> int:
    """The columns of a tile that holds the head width: a power of two, at least the depth of one product."""
    return max(triton.next_power_of_2(width), 16)


def strided(x):
    """A tensor as the kernels take it."""
    return x, *x.stride()[:-1]


def products(dtype: torch.dtype) -> dict:
    """The type and precision of the products' operands."""
    full = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return dict(TYPE=getattr(tl, str(dtype).removeprefix("torch.")), PRECISION="ieee" if full else "tf32")


def without_bf16(n_results: int) -> Callable:
    """Let a launcher that fills its last ``n_results`` arguments see fp32 for bf16 in the interpreter, which would
    compute with the bits of bf16 as integers."""

    def decorate(launch):
        @wraps(launch)
        def wrapper(*args):
            bf16 = [isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args]
            if not (triton.knobs.runtime.interpret and any(bf16)):
                return launch(*args)
            wide = [x.float() if is_bf16 else x for x, is_bf16 in zip(args, bf16, strict=True)]
            launch(*wide)
            for x, result in zip(args[-n_results:], wide[-n_results:], strict=True):
                x.copy_(result)

        return wrapper

    return decorate


@without_bf16(2)
def forward(
    q, k, v, r, content_bias, position_bias, k_memory, v_memory, key_lengths, seed,
    left, right, clamp_len, scale, dropout_p, out, lse,
):  # fmt: skip
    """Fills ``out (B, H, Q, D)`` and ``lse (B, H, Q)``."""
    batch, heads, n_queries, width = q.shape
    n_memory = 0 if k_memory is None else k_memory.shape[2]
    n_keys = n_memory + k.shape[2]
    block_d = padded(width)
    far, has_clamp = clamped(clamp_len, left, n_keys)
    tiles = forward_tiles(n_queries, width, q.dtype, capability())
    programs = batch * heads * triton.cdiv(n_queries, tiles.rows)
    if programs == 0:
        return
    memory = (strided(k if k_memory is None else k_memory), strided(v if v_memory is None else v_memory))
    _forward[(programs,)](
        strided(q), strided(k), strided(v), strided(r), strided(content_bias), strided(position_bias), *memory,
        lse if key_lengths is None else key_lengths, lse if seed is None else seed, strided(out), lse,
        heads, n_queries, n_memory, n_keys, r.shape[1], min(left, n_keys), min(right, max(n_queries - 1, 0)),
        far, scale * LOG2_E, dropout_p,
        WIDTH=width, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, BLOCK_D=block_d, HAS_MEMORY=n_memory > 0,
        HAS_LENGTHS=key_lengths is not None, HAS_DROPOUT=dropout_p > 0, HAS_CLAMP=has_clamp, **products(q.dtype),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
