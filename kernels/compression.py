"""Compression of memory rows in Triton, and the update of a compressive memory. A program owns BLOCK columns of one
output row (of one group of rows, backward): one read and one write of each element, no atomics.
"""

import torch
import triton
import triton.language as tl

UNROLL = tl.constexpr(4)  # rows whose loads are in flight together
TERMS = tl.constexpr(16)  # rows that are added one after the other; then these sums: the error grows with rate / 16
NO_ROW = tl.constexpr(-1)


@triton.jit
def _place(n_rows, width, BLOCK: tl.constexpr):
    """This program's sequence, row and columns."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(width, BLOCK)
    columns = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    return (pid // (n_blocks * n_rows)).to(tl.int64), (pid // n_blocks % n_rows).to(tl.int64), columns


@triton.jit
def _fold_max(best, at, x, j, read):
    """The maximum so far and its row: the first of equals stays, and so does the first NaN."""
    better = read & ~(x <= best) & (best == best)
    return tl.where(better, x, best), tl.where(better, j, at)


@triton.jit
def _pool(
    memory, compressed, choice, groups, width, memory_b, memory_t, compressed_b, compressed_t, rate,
    BLOCK: tl.constexpr, MAX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """compressed[b, n] = mean or max over j < rate of memory[b, n rate + j]"""
    b, n, columns = _place(groups, width, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    inside = columns < width
    memory += b * memory_b + n * rate * memory_t + columns  # [BLOCK]
    total = tl.full([BLOCK], float("-inf") if MAX else 0.0, dtype)
    at = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rate, TERMS):
        part = tl.zeros([BLOCK], dtype)
        for j in range(first, tl.minimum(first + TERMS, rate), UNROLL):
            for k in tl.static_range(UNROLL):
                read = inside & (j + k < rate)
                x = tl.load(memory, mask=read, other=0).to(dtype)
                if MAX:
                    total, at = _fold_max(total, at, x, j + k, read)
                else:
                    part += x
                memory += memory_t
        if not MAX:
            total += part
    if MAX:
        tl.store(choice + (b * groups + n) * width + columns, at.to(choice.dtype.element_ty), mask=inside)
    else:
        total = total / rate
    out = compressed + b * compressed_b + n * compressed_t + columns
    tl.store(out, total.to(compressed.dtype.element_ty), mask=inside)


@triton.jit
def _unpool(
    grad, choice, d_memory, groups, width, grad_b, grad_t, d_memory_b, d_memory_t, rate,
    BLOCK: tl.constexpr, MAX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """d_memory[b, n rate + j] = grad[b, n] / rate, or grad[b, n] where row j was chosen"""
    b, n, columns = _place(groups, width, BLOCK)
    inside = columns < width
    g = tl.load(grad + b * grad_b + n * grad_t + columns, mask=inside, other=0)
    if MAX:
        at = tl.load(choice + (b * groups + n) * width + columns, mask=inside, other=0)
    else:
        g = (g.to(tl.float64 if WIDE else tl.float32) / rate).to(grad.dtype.element_ty)
    d_memory += b * d_memory_b + n * rate * d_memory_t + columns
    for j in range(0, rate):
        tl.store(d_memory, tl.where(at == j, g, 0.0) if MAX else g, mask=inside)
        d_memory += d_memory_t


@triton.jit
def _sort_key(usage, inside):
    """An integer in 0 .. 2^32 - 1 in the order of the floats: -0 equals 0 and NaN is the largest."""
    x = tl.load(usage, mask=inside, other=0)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return tl.where(x == x, key, 0xFFFFFFFF)


@triton.jit
def _count_from(usage, steps, threshold, BLOCK: tl.constexpr):
    count = tl.zeros([BLOCK], tl.int32)
    for t in range(0, steps, BLOCK):
        inside = t + tl.arange(0, BLOCK) < steps
        key = _sort_key(usage + t + tl.arange(0, BLOCK), inside)
        count += (inside & (key >= threshold)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _select(usage, slots, steps, keep, BLOCK: tl.constexpr):
    """slots[b, t] = the place of step t among the ``keep`` most used in time order, or -1.

    The threshold is the keep-th largest key, found bit by bit; of the steps at the threshold, the older ones are kept.
    """
    b = tl.program_id(0).to(tl.int64)
    usage += b * steps
    slots += b * steps
    threshold = tl.zeros([], tl.int64)
    bit = tl.full([], 1 << 31, tl.int64)
    for _ in range(0, 32):
        enough = _count_from(usage, steps, threshold | bit, BLOCK) >= keep
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    ties = keep - _count_from(usage, steps, threshold + 1, BLOCK)
    kept_before = tl.zeros([], tl.int32)
    ties_before = tl.zeros([], tl.int32)
    for t in range(0, steps, BLOCK):
        columns = t + tl.arange(0, BLOCK)
        inside = columns < steps
        key = _sort_key(usage + columns, inside)
        tie = (inside & (key == threshold)).to(tl.int32)
        kept = inside & ((key > threshold) | ((tie > 0) & (ties_before + tl.cumsum(tie, 0) <= ties)))
        slot = kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(slots + columns, tl.where(kept, slot, NO_ROW), mask=inside)
        kept_before += tl.sum(kept.to(tl.int32))
        ties_before += tl.sum(tie)


@triton.jit
def _keep(
    memory, slots, compressed, steps, width, memory_b, memory_t, compressed_b, compressed_t,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """compressed[b, slots[b, t]] = memory[b, t] for the steps kept; backward, the other way, and 0 for the rest"""
    b, t, columns = _place(steps, width, BLOCK)
    inside = columns < width
    slot = tl.load(slots + b * steps + t).to(tl.int64)
    memory += b * memory_b + t * memory_t + columns  # [BLOCK]
    compressed += b * compressed_b + slot * compressed_t + columns
    kept = inside & (slot != NO_ROW)
    if BACKWARD:
        tl.store(memory, tl.load(compressed, mask=kept, other=0), mask=inside)
    else:
        tl.store(compressed, tl.load(memory, mask=kept, other=0), mask=kept)


@triton.jit
def _update(
    state, hidden, fresh, out, width, state_b, state_t, hidden_b, hidden_t, fresh_b, fresh_t, out_b, out_t,
    old_compressed, old_memory, segment, new_compressed, new_memory, fresh_rows, rate,
    BLOCK: tl.constexpr, MAX: tl.constexpr, GIVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row of out = [the newest compressed rows | the newest rows of memory and segment]"""
    b, r, columns = _place(new_compressed + new_memory, width, BLOCK)
    inside = columns < width
    state += b * state_b + columns  # [BLOCK]
    hidden += b * hidden_b + columns
    out += b * out_b + r * out_t + columns
    left = old_memory + segment - new_memory  # rows that leave the memory
    n = fresh_rows - new_compressed + r  # the fresh row, if 0 <= n < fresh_rows
    if r >= new_compressed:
        source = left + r - new_compressed
        if source < old_memory:
            row = tl.load(state + (old_compressed + source) * state_t, mask=inside)
        else:
            row = tl.load(hidden + (source - old_memory) * hidden_t, mask=inside)
        tl.store(out, row, mask=inside)
    elif n < 0:
        tl.store(out, tl.load(state + (old_compressed + n) * state_t, mask=inside), mask=inside)
    elif GIVEN:
        tl.store(out, tl.load(fresh + b * fresh_b + n * fresh_t + columns, mask=inside), mask=inside)
    else:
        dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
        total = tl.full([BLOCK], float("-inf") if MAX else 0.0, dtype)
        at = tl.zeros([BLOCK], tl.int32)
        # Of the rows that leave, the oldest ones that fill no group are dropped.
        source = left + (n - fresh_rows) * rate
        for first in range(0, rate, TERMS):
            part = tl.zeros([BLOCK], dtype)
            for j in range(first, tl.minimum(first + TERMS, rate), UNROLL):
                for k in tl.static_range(UNROLL):
                    read = inside & (j + k < rate)
                    old = source + j + k < old_memory
                    x = tl.load(state + (old_compressed + source + j + k) * state_t, mask=read & old, other=0).to(dtype)
                    new = hidden + (source + j + k - old_memory) * hidden_t
                    x += tl.load(new, mask=read & ~old, other=0).to(dtype)
                    if MAX:
                        total, at = _fold_max(total, at, x, j + k, read)
                    else:
                        part += x
            if not MAX:
                total += part
        tl.store(out, (total if MAX else total / rate).to(out.dtype.element_ty), mask=inside)


def _launch(kernel, x: torch.Tensor, n_rows: int, *args, **flags) -> None:
    """One program for each row of each sequence and each block of columns: 16 bytes a thread."""
    batch, _, width = x.shape
    block = min(triton.next_power_of_2(max(width, 32)), 2048 // x.element_size())
    programs = batch * n_rows * triton.cdiv(width, block)
    if programs:
        kernel[(programs,)](*args, BLOCK=block, num_warps=max(1, block * x.element_size() // 512), **flags)


def _flags(x: torch.Tensor, mode: str) -> dict[str, bool]:
    return dict(MAX=mode == "max", WIDE=x.dtype == torch.float64)


def forward(memory, usage, rate, mode, compressed, choice):
    """Fills ``compressed`` and ``choice``."""
    _, steps, width = memory.shape
    strides = *memory.stride()[:2], *compressed.stride()[:2]
    if mode == "most_used":
        if choice.numel():
            _select[(memory.shape[0],)](usage, choice, steps, steps // rate, BLOCK=1024, num_warps=8)
        _launch(_keep, memory, steps, memory, choice, compressed, steps, width, *strides, BACKWARD=False)
    else:
        groups = steps // rate
        args = memory, compressed, choice, groups, width, *strides, rate
        _launch(_pool, memory, groups, *args, **_flags(memory, mode))


def backward(grad, choice, rate, mode, d_memory):
    """Fills ``d_memory``."""
    _, groups, width = grad.shape
    if mode == "most_used":
        steps, strides = groups * rate, (*d_memory.stride()[:2], *grad.stride()[:2])
        _launch(_keep, d_memory, steps, d_memory, choice, grad, steps, width, *strides, BACKWARD=True)
    else:
        args = grad, choice, d_memory, groups, width, *grad.stride()[:2], *d_memory.stride()[:2], rate
        _launch(_unpool, grad, groups, *args, **_flags(grad, mode))


def update(state, hidden, fresh, out, sizes, rate, mode):
    """Fills ``out``; ``sizes`` as in csrc/ops.h, MemoryUpdate: old_compressed to fresh_rows."""
    given = fresh if fresh is not None else hidden  # an address that is not read
    strides = *state.stride()[:2], *hidden.stride()[:2], *given.stride()[:2], *out.stride()[:2]
    args = state, hidden, given, out, out.shape[2], *strides, *sizes, rate
    _launch(_update, out, out.shape[1], *args, GIVEN=fresh is not None, **_flags(out, mode))
