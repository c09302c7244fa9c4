"""AR/TAR in Triton. A program owns BLOCK columns of one sequence and walks a strip of consecutive steps, the previous
row in registers: one read of each tensor forward, one read and one write backward. The cut into strips depends on the
shape alone and partial sums are added in one order, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

UNROLL = tl.constexpr(4)  # steps whose loads are in flight together
PROGRAMS = 2048  # about one wave of a large GPU at 128 threads each


@triton.jit
def _strip(lengths, steps, width, n_strips, length, BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """This program's sequence, columns, first step, end of the strip and number of real steps."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(width, BLOCK)
    columns = pid % n_blocks * BLOCK + tl.arange(0, BLOCK)
    b = (pid // (n_blocks * n_strips)).to(tl.int64)
    begin = (pid // n_blocks % n_strips).to(tl.int64) * length
    real = steps
    if HAS_LENGTHS:
        # For memory safety; a bad length makes the loss NaN in _finish.
        real = tl.minimum(tl.maximum(tl.load(lengths + b), 0), steps)
    return b, columns, begin, tl.minimum(begin + length, steps), real


@triton.jit
def _sum_strips(
    output, raw, lengths, sums, steps, width, output_b, output_t, raw_b, raw_t, n_strips, length,
    BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    b, columns, begin, end, real = _strip(lengths, steps, width, n_strips, length, BLOCK, HAS_LENGTHS)
    end = tl.minimum(end, real)
    dtype: tl.constexpr = sums.dtype.element_ty
    inside = columns < width
    output += b * output_b + begin * output_t + columns  # [BLOCK]
    raw += b * raw_b + begin * raw_t + columns
    ar = tl.zeros([BLOCK], dtype)
    tar = tl.zeros([BLOCK], dtype)
    # The first step of a sequence is its own predecessor: a step of 0.
    before = tl.load(raw - tl.where(begin > 0, raw_t, 0), mask=inside & (begin < end), other=0).to(dtype)
    for t in range(begin, end, UNROLL):
        for k in tl.static_range(UNROLL):
            mask = inside & (t + k < end)
            x = tl.load(raw, mask=mask, other=0).to(dtype)
            o = x if SHARED else tl.load(output, mask=mask, other=0).to(dtype)
            step = tl.where(mask, x - before, 0)
            ar += o * o
            tar += step * step
            before = x
            output += output_t
            raw += raw_t
    tl.store(sums + 2 * tl.program_id(0), tl.sum(ar))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(tar))


@triton.jit
def _finish(
    sums, lengths, loss, scale, alpha: tl.float64, beta: tl.float64, n_parts, batch, steps, width,
    BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = sums.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    ar = tl.zeros([BLOCK], dtype)
    tar = tl.zeros([BLOCK], dtype)
    for i in range(0, n_parts, BLOCK):
        ar += tl.load(sums + 2 * (i + lanes), mask=i + lanes < n_parts, other=0)
        tar += tl.load(sums + 2 * (i + lanes) + 1, mask=i + lanes < n_parts, other=0)
    rows = tl.zeros([BLOCK], tl.float64)
    pairs = tl.zeros([BLOCK], tl.float64)
    for i in range(0, batch, BLOCK):
        inside = i + lanes < batch
        n = tl.zeros([BLOCK], tl.int64) + steps
        if HAS_LENGTHS:
            n = tl.load(lengths + i + lanes, mask=inside, other=0)
        bad = (n < 0) | (n > steps)  # a bad length: NaN instead of a host synchronisation
        rows += tl.where(inside, tl.where(bad, float("nan"), n.to(tl.float64)), 0)
        pairs += tl.where(inside & (n > 1), (n - 1).to(tl.float64), 0)
    n_rows = tl.sum(rows) * width
    n_pairs = tl.sum(pairs) * width
    # A mean over nothing is 0.
    per_row = tl.where(n_rows == 0, 0.0, alpha / tl.where(n_rows == 0, 1.0, n_rows))
    per_pair = tl.where(n_pairs == 0, 0.0, beta / tl.where(n_pairs == 0, 1.0, n_pairs))
    total = per_row * tl.sum(ar).to(tl.float64) + per_pair * tl.sum(tar).to(tl.float64)
    tl.store(loss, total.to(dtype))
    tl.store(scale, (2 * per_row).to(dtype))
    tl.store(scale + 1, (2 * per_pair).to(dtype))


@triton.jit
def _differentiate(
    grad, scale, output, raw, lengths, d_output, d_raw, steps, width, output_b, output_t, raw_b, raw_t,
    d_output_b, d_output_t, d_raw_b, d_raw_t, n_strips, length,
    BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    NEED_OUTPUT: tl.constexpr, NEED_RAW: tl.constexpr,
):  # fmt: skip
    b, columns, begin, end, real = _strip(lengths, steps, width, n_strips, length, BLOCK, HAS_LENGTHS)
    dtype: tl.constexpr = scale.dtype.element_ty
    inside = columns < width
    g = tl.load(grad)
    ar = g * tl.load(scale)
    tar = g * tl.load(scale + 1)
    output += b * output_b + begin * output_t + columns  # [BLOCK]
    raw += b * raw_b + begin * raw_t + columns
    d_output += b * d_output_b + begin * d_output_t + columns
    d_raw += b * d_raw_b + begin * d_raw_t + columns
    if NEED_RAW:
        started = inside & (begin < real)
        before = tl.load(raw - tl.where(begin > 0, raw_t, 0), mask=started, other=0).to(dtype)
        x = tl.load(raw, mask=started, other=0).to(dtype)
    for t in range(begin, end, UNROLL):
        for k in tl.static_range(UNROLL):
            written = inside & (t + k < end)
            read = written & (t + k < real)  # padding has gradient 0
            if NEED_OUTPUT and not SHARED:
                d = ar * tl.load(output, mask=read, other=0).to(dtype)
                tl.store(d_output, tl.where(read, d, 0).to(output.dtype.element_ty), mask=written)
            if NEED_RAW:
                # At an end of the sequence the neighbour is the row itself.
                after = tl.load(raw + tl.where(t + k + 1 < real, raw_t, 0), mask=read, other=0).to(dtype)
                d = tar * ((x - before) - (after - x))
                if SHARED:
                    d += ar * x
                tl.store(d_raw, tl.where(read, d, 0).to(raw.dtype.element_ty), mask=written)
                before = x
                x = after
            output += output_t
            raw += raw_t
            d_output += d_output_t
            d_raw += d_raw_t


def _cut(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Columns of a block, warps, strips of a sequence, steps of a strip, programs."""
    batch, steps, width = x.shape
    block = min(triton.next_power_of_2(max(width, 32)), 4096 // x.element_size() // 2)
    n_blocks = triton.cdiv(width, block)
    strips = min(triton.cdiv(PROGRAMS, max(batch * n_blocks, 1)), triton.cdiv(steps, UNROLL.value))
    length = triton.cdiv(steps, max(strips, 1))
    n_strips = triton.cdiv(steps, max(length, 1))
    return block, max(1, min(4, block // 256)), n_strips, length, batch * n_blocks * n_strips


def forward(output, raw, lengths, alpha, beta, loss, scale):
    """Fills ``loss ()`` and ``scale (2,)``; ``raw`` None stands for ``output``."""
    batch, steps, width = output.shape
    block, warps, n_strips, length, programs = _cut(output)
    sums = loss.new_empty(2 * programs)
    other = output if raw is None else raw
    flags = dict(HAS_LENGTHS=lengths is not None)
    lengths = sums if lengths is None else lengths  # an address that is not read
    if programs:
        _sum_strips[(programs,)](
            output, other, lengths, sums, steps, width, *output.stride()[:2], *other.stride()[:2], n_strips, length,
            BLOCK=block, SHARED=raw is None, num_warps=warps, **flags,
        )  # fmt: skip
    _finish[(1,)](sums, lengths, loss, scale, alpha, beta, programs, batch, steps, width, BLOCK=1024, **flags)


def backward(grad, output, raw, lengths, scale, d_output, d_raw):
    """Fills ``d_output`` and ``d_raw`` (an empty one is not wanted); ``raw`` None: ``d_output`` takes both terms."""
    _, steps, width = output.shape
    block, warps, n_strips, length, programs = _cut(output)
    if programs == 0:
        return
    shared = raw is None
    other, d_other = (output, d_output) if shared else (raw, d_raw)
    need_output, need_raw = d_output.numel() > 0, d_other.numel() > 0
    d_output, d_other = (x if x.numel() else output for x in (d_output, d_other))  # addresses that are not written
    _differentiate[(programs,)](
        grad, scale, output, other, scale if lengths is None else lengths, d_output, d_other, steps, width,
        *output.stride()[:2], *other.stride()[:2], *d_output.stride()[:2], *d_other.stride()[:2], n_strips, length,
        BLOCK=block, SHARED=shared, HAS_LENGTHS=lengths is not None, NEED_OUTPUT=need_output, NEED_RAW=need_raw,
        num_warps=warps,
    )  # fmt: skip
