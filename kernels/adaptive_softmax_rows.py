"""The adaptive softmax kernels that take whole rows: the sort of the tokens by tail, and a row of logits in place."""

import torch
import triton
import triton.language as tl

# A target's column in the head where it has none: an ignored token, and a target that is no class, whose loss is NaN.
NO_LOSS = tl.constexpr(-1)
NO_CLASS = tl.constexpr(-2)


@triton.jit
def _sort(
    target, ends, head, tail, order, offsets, bad, tokens, tails, ignore_index, DESCENDING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i collects the tokens of tail i, in their order, behind those of the tails before it."""
    i = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    first, last, shortlist = tl.load(ends + i), tl.load(ends + i + 1), tl.load(ends)
    classes = tl.load(ends + tails)
    before = 0
    inside = 0
    for begin in range(0, tokens, BLOCK):
        y = tl.load(target + begin + lanes, mask=begin + lanes < tokens, other=-1)
        y = tl.where(y == ignore_index, -1, y)
        before += tl.sum(((y >= shortlist) & (y < first)).to(tl.int32))
        inside += tl.sum(((y >= first) & (y < last)).to(tl.int32))
    tl.store(offsets + i, before)
    tl.store(offsets + i + 1, before + inside, mask=i == tails - 1)
    for begin in range(0, tokens, BLOCK):
        real = begin + lanes < tokens
        y = tl.load(target + begin + lanes, mask=real, other=-1)
        ignored = y == ignore_index
        here = real & (y >= first) & (y < last) & ~ignored
        rank = tl.cumsum(here.to(tl.int32), 0)
        tl.store(order + before + rank - 1, (begin + lanes).to(tl.int64), mask=here)
        before += tl.sum(here.to(tl.int32))
        column = shortlist + (tails - 1 - i if DESCENDING else i)
        tl.store(tail + begin + lanes, y - first, mask=here)
        tl.store(head + begin + lanes, tl.zeros([BLOCK], tl.int64) + column, mask=here)
        if i == 0:
            outside = ((y < 0) | (y >= classes)) & ~ignored
            last_outside = tl.max(tl.where(outside & real, lanes, -1))
            tl.store(bad, tl.sum(tl.where(lanes == last_outside, y, 0)), mask=last_outside >= 0)
            y = tl.where(ignored, NO_LOSS, tl.where(outside, NO_CLASS, y))
            tl.store(head + begin + lanes, y, mask=real & (y < shortlist))


@triton.jit
def number(x, acc: tl.constexpr):
    """A float argument in the arithmetic type; the interpreter passes plain floats, which a cast takes to fp32."""
    return tl.sum(tl.zeros([1], tl.float64) + x).to(acc)


@triton.jit
def row_loss(lse, of_target, total, columns, smoothing, weight):
    """The loss of rows from their log-sum-exp, their target's logit and the sum of their logits, which may be -inf."""
    smooth = tl.where(smoothing == 0, 0.0, smoothing * total / columns)
    return lse - (1 - smoothing) * of_target - smooth + tl.where(weight == 0, 0.0, weight * lse * lse)


@triton.jit
def without_target(loss, y):
    """The head's loss where the target's column says that there is none."""
    return tl.where(y == NO_LOSS, 0.0, tl.where(y == NO_CLASS, float("nan"), loss))


@triton.jit
def logit_gradient(z, lse, hit, columns, smoothing, weight):
    """d loss / d z, where ``hit`` marks the targets."""
    p = tl.exp(z - lse) * (1 + 2 * weight * lse)
    return p - tl.where(hit, 1 - smoothing, 0.0) - smoothing / columns


@triton.jit
def _rows_in_place(
    z, dz, bias, column, grad, nll, columns, stride, dz_stride, label_smoothing: tl.float64, z_loss: tl.float64,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """nll of a row, and dz = g (softmax(z) (1 + 2 w lse) - (1 - s) [c = y] - s / C) in the place of z.

    z is fp32 and dz of the tables' type: the dz of a block lie over logits that have been read.
    """
    acc: tl.constexpr = nll.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    dz += row * dz_stride
    y = tl.load(column + row)
    smoothing, weight = number(label_smoothing, acc), number(z_loss, acc)
    lanes = tl.arange(0, BLOCK)
    of_target = tl.load(z + tl.maximum(y, 0)).to(acc)
    if HAS_BIAS:
        of_target += tl.load(bias + tl.maximum(y, 0)).to(acc)
    largest = tl.full([BLOCK], float("-inf"), acc)
    sums = tl.zeros([BLOCK], acc)
    total = tl.zeros([BLOCK], acc)
    for begin in range(0, columns, BLOCK):
        inside = begin + lanes < columns
        logits = _row(z, bias, begin + lanes, columns, acc, HAS_BIAS)
        new = tl.maximum(largest, logits)
        base = tl.where(new == float("-inf"), 0.0, new)  # of a lane that has had no logit: its sum stays 0
        sums = sums * tl.exp(largest - base) + tl.exp(logits - base)
        largest = new
        total += tl.where(inside, logits, 0.0)
    lse = tl.max(largest)
    lse += tl.log(tl.sum(sums * tl.exp(largest - lse)))
    loss = row_loss(lse, of_target, tl.sum(total), columns, smoothing, weight)
    tl.store(nll + row, without_target(loss, y))
    g = tl.load(grad + row).to(acc)
    # The second time, the row comes from the cache.
    for begin in range(0, columns, BLOCK):
        logits = _row(z, bias, begin + lanes, columns, acc, HAS_BIAS)
        d = g * logit_gradient(logits, lse, begin + lanes == y, columns, smoothing, weight)
        tl.debug_barrier()  # every thread has read its logits
        tl.store(dz + begin + lanes, tl.where(y < 0, 0.0, d).to(dz.dtype.element_ty), mask=begin + lanes < columns)


@triton.jit
def _row(z, bias, at, columns, acc: tl.constexpr, HAS_BIAS: tl.constexpr):
    logits = tl.load(z + at, mask=at < columns, other=float("-inf")).to(acc)
    if HAS_BIAS:
        logits += tl.load(bias + at, mask=at < columns, other=0.0).to(acc)
    return logits


def sort(target, bad, options):
    """The target's column in the head (NO_LOSS and NO_CLASS for none) and in its tail, by token; the tokens sorted by
    tail, and where the tails begin. A target that is no class is written to ``bad``, which may be pinned memory."""
    tails, n = len(options.ends) - 1, len(target)
    head, tail, order = torch.empty_like(target), torch.empty_like(target), torch.zeros_like(target)
    offsets = target.new_empty(tails + 1, dtype=torch.int32)
    # Filled on the device: a copy from the host would make it wait, and a CUDA graph would read freed memory.
    ends = torch.cat([target.new_full((1,), end) for end in (*options.ends, options.ends[-1])])
    _sort[(max(tails, 1),)](
        target, ends, head, tail, order, offsets, bad, n, tails, options.ignore_index, DESCENDING=options.descending,
        BLOCK=1024,
    )  # fmt: skip
    return head, tail, order, offsets


def rows_in_place(z, dz, bias, column, grad, nll, options):
    """The losses of rows of logits ``z`` into ``nll``, and their gradients into ``dz``, which lies over ``z``."""
    columns = z.shape[1]
    block = min(1024, triton.next_power_of_2(columns))
    _rows_in_place[(len(z),)](
        z, dz, nll if bias is None else bias, column, grad, nll, columns, z.stride(0), dz.stride(0),
        options.label_smoothing, options.z_loss, BLOCK=block, HAS_BIAS=bias is not None,
        num_warps=8 if block == 1024 else 4,  # at 2048 columns a block, sm_90 spills 8 bytes
    )  # fmt: skip
