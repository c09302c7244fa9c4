"""The mixture of a stochastic block in Triton. A program holds a tile of whole rows in registers, so that each tensor
is read once; in the backward it walks a strip of such tiles and keeps its sums over rows. The cut into strips depends
on the shape alone and partial sums are added in one order, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

TILE = 1024  # elements
STRIPS = 512  # about two waves of the backward on a large GPU
PARTS, COLUMNS = 32, 32  # the tile of partial sums of _finish


@triton.jit
def _place(first, n_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's rows and columns, where its elements are and which of them there are."""
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    return rows, columns, rows[:, None] * width + columns[None, :], inside


@triton.jit
def _normalised(s, inside, width, eps):
    """The rows of s with mean 0 and variance 1, their means and the reciprocals of their standard deviations."""
    mean = tl.sum(s, 1) / width
    centred = tl.where(inside, s - mean[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _forward(
    x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, out, stats, n_rows, width, eps: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = stats.dtype.element_ty
    epsilon = (tl.zeros([], tl.float64) + eps).to(dtype)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns, places, inside = _place(first, n_rows, width, ROWS, BLOCK)
    v = tl.load(x + places, mask=inside, other=0).to(dtype)
    a = tl.load(attended + places, mask=inside, other=0).to(dtype)
    f = tl.load(dense + places, mask=inside, other=0).to(dtype)
    n_0, mean_0, rstd_0 = _normalised(v + a, inside, width, epsilon)
    n_1, mean_1, rstd_1 = _normalised(v + f, inside, width, epsilon)
    real = columns < width
    g_0 = tl.load(gamma_0 + columns, mask=real, other=0)[None, :]
    g_1 = tl.load(gamma_1 + columns, mask=real, other=0)[None, :]
    b_0 = tl.load(beta_0 + columns, mask=real, other=0)[None, :]
    b_1 = tl.load(beta_1 + columns, mask=real, other=0)[None, :]
    mixed = tl.load(weights) * (n_0 * g_0 + b_0) + tl.load(weights + 1) * (n_1 * g_1 + b_1) + tl.load(weights + 2) * v
    tl.store(out + places, mixed.to(out.dtype.element_ty), mask=inside)
    there = rows < n_rows
    tl.store(stats + 4 * rows, mean_0, mask=there)
    tl.store(stats + 4 * rows + 1, rstd_0, mask=there)
    tl.store(stats + 4 * rows + 2, mean_1, mask=there)
    tl.store(stats + 4 * rows + 3, rstd_1, mask=there)


@triton.jit
def _branch_gradient(h, n, weight, rstd, width):
    """Through the norm and the weight: weight rstd (h - mean(h) - n mean(h n)) in each row."""
    mean = tl.sum(h, 1) / width
    slope = tl.sum(h * n, 1) / width
    return (weight * rstd)[:, None] * (h - mean[:, None] - n * slope[:, None])


@triton.jit
def _backward(
    grad, x, attended, dense, weights, gamma_0, gamma_1, stats, d_x, d_attended, d_dense, sums, n_rows, width, length,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = stats.dtype.element_ty
    strip = tl.program_id(0).to(tl.int64)
    end = tl.minimum((strip + 1) * length, n_rows)
    lanes = tl.arange(0, BLOCK)
    real = lanes < width
    g_0 = tl.load(gamma_0 + lanes, mask=real, other=0)[None, :]
    g_1 = tl.load(gamma_1 + lanes, mask=real, other=0)[None, :]
    w_0, w_1, w_2 = tl.load(weights), tl.load(weights + 1), tl.load(weights + 2)
    sum_n_0 = tl.zeros([BLOCK], dtype)
    sum_n_1 = tl.zeros([BLOCK], dtype)
    sum_1 = tl.zeros([BLOCK], dtype)
    sum_x = tl.zeros([BLOCK], dtype)
    for first in range(strip * length, end, ROWS):
        rows, columns, places, inside = _place(first, end, width, ROWS, BLOCK)
        there = rows < end
        g = tl.load(grad + places, mask=inside, other=0).to(dtype)
        v = tl.load(x + places, mask=inside, other=0).to(dtype)
        a = tl.load(attended + places, mask=inside, other=0).to(dtype)
        f = tl.load(dense + places, mask=inside, other=0).to(dtype)
        mean_0 = tl.load(stats + 4 * rows, mask=there, other=0)
        rstd_0 = tl.load(stats + 4 * rows + 1, mask=there, other=0)
        mean_1 = tl.load(stats + 4 * rows + 2, mask=there, other=0)
        rstd_1 = tl.load(stats + 4 * rows + 3, mask=there, other=0)
        n_0 = (v + a - mean_0[:, None]) * rstd_0[:, None]  # beyond the width g is 0, and what is made of it
        n_1 = (v + f - mean_1[:, None]) * rstd_1[:, None]
        sum_n_0 += tl.sum(g * n_0, 0)
        sum_n_1 += tl.sum(g * n_1, 0)
        sum_1 += tl.sum(g, 0)
        sum_x += tl.sum(g * v, 0)
        d_0 = _branch_gradient(g * g_0, n_0, w_0, rstd_0, width)
        d_1 = _branch_gradient(g * g_1, n_1, w_1, rstd_1, width)
        tl.store(d_attended + places, d_0.to(d_attended.dtype.element_ty), mask=inside)
        tl.store(d_dense + places, d_1.to(d_dense.dtype.element_ty), mask=inside)
        tl.store(d_x + places, (d_0 + d_1 + w_2 * g).to(d_x.dtype.element_ty), mask=inside)
    sums += 4 * strip * width + lanes
    tl.store(sums, sum_n_0, mask=real)
    tl.store(sums + width, sum_n_1, mask=real)
    tl.store(sums + 2 * width, sum_1, mask=real)
    tl.store(sums + 3 * width, sum_x, mask=real)


@triton.jit
def _column_sum(sums, columns, width, n_parts, real, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([PARTS, COLUMNS], sums.dtype.element_ty)
    for first in range(0, n_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        inside = (parts < n_parts)[:, None] & real[None, :]
        total += tl.load(sums + 4 * parts[:, None] * width + columns[None, :], mask=inside, other=0)
    return tl.sum(total, 0)


@triton.jit
def _finish(
    sums, weights, gamma_0, beta_0, gamma_1, beta_1, d_parameters, d_weights, width, n_parts,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of the norms' parameters, and of the weights from these columns."""
    block = tl.program_id(0)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < width
    n_0 = _column_sum(sums, columns, width, n_parts, real, PARTS, COLUMNS)
    n_1 = _column_sum(sums + width, columns, width, n_parts, real, PARTS, COLUMNS)
    g = _column_sum(sums + 2 * width, columns, width, n_parts, real, PARTS, COLUMNS)
    x = _column_sum(sums + 3 * width, columns, width, n_parts, real, PARTS, COLUMNS)
    w_0, w_1 = tl.load(weights), tl.load(weights + 1)
    tl.store(d_parameters + columns, w_0 * n_0, mask=real)
    tl.store(d_parameters + width + columns, w_0 * g, mask=real)
    tl.store(d_parameters + 2 * width + columns, w_1 * n_1, mask=real)
    tl.store(d_parameters + 3 * width + columns, w_1 * g, mask=real)
    g_0 = tl.load(gamma_0 + columns, mask=real, other=0)
    b_0 = tl.load(beta_0 + columns, mask=real, other=0)
    g_1 = tl.load(gamma_1 + columns, mask=real, other=0)
    b_1 = tl.load(beta_1 + columns, mask=real, other=0)
    tl.store(d_weights + 3 * block, tl.sum(g_0 * n_0 + b_0 * g))
    tl.store(d_weights + 3 * block + 1, tl.sum(g_1 * n_1 + b_1 * g))
    tl.store(d_weights + 3 * block + 2, tl.sum(x))


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps."""
    block = triton.next_power_of_2(max(width, 16))
    return max(1, TILE // block), block, min(16, max(4, block // 512))


def forward(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps, out, stats):
    """Fills ``out (rows, d)`` and ``stats (rows, 4)``; all contiguous, the branches of any dtypes."""
    n_rows, width = x.shape
    rows, block, warps = _tile(width)
    if x.numel():
        _forward[(triton.cdiv(n_rows, rows),)](
            x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, out, stats, n_rows, width, eps,
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def backward(
    grad, x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats, d_x, d_attended, d_dense, d_weights,
    d_parameters,
):  # fmt: skip
    """Fills the gradients; ``d_weights (3,)`` and ``d_parameters (4, d)`` of the dtype of ``weights``."""
    n_rows, width = x.shape
    rows, block, warps = _tile(width)
    length = rows * max(1, triton.cdiv(n_rows, rows * STRIPS))
    n_strips = triton.cdiv(n_rows, length) if width else 0
    sums = weights.new_empty(n_strips, 4, width)
    if n_strips:
        _backward[(n_strips,)](
            grad, x, attended, dense, weights, gamma_0, gamma_1, stats, d_x, d_attended, d_dense, sums, n_rows, width,
            length, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    n_blocks = triton.cdiv(width, COLUMNS)
    by_block = weights.new_empty(n_blocks, 3)
    if n_blocks:
        _finish[(n_blocks,)](
            sums, weights, gamma_0, beta_0, gamma_1, beta_1, d_parameters, by_block, width, n_strips,
            PARTS=PARTS, COLUMNS=COLUMNS,
        )  # fmt: skip
    torch.sum(by_block, 0, out=d_weights)
