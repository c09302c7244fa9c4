"""Adaptive softmax in Triton. One softmax is z = h W^T + b over the rows of its tokens, sorted by tail on the device;
how many they are, no kernel asks the host: a fixed grid of programs walks over as many tiles as there are.

A tail, and the head where no logits may be in memory, is computed three times and never stored: for the log-sum-exp, in
splits of the columns that are merged in one order; for dh, in the same splits; and for dW, a program for each block of
its rows. The head in training goes in blocks of rows through a workspace: vendor products, and one kernel in place
between them. No atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

SPLIT = 4096  # columns of a split
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _sort(target, ends, head, tail, order, offsets, tokens, tails, ignore_index, DESCENDING: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
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
            # -1: no loss; -2: no class, a loss of NaN
            outside = ((y < 0) | (y >= classes)) & ~ignored
            y = tl.where(ignored, -1, tl.where(outside, -2, y))
            tl.store(head + begin + lanes, y, mask=real & (y < shortlist))


@triton.jit
def _number(x, acc: tl.constexpr):
    """A float argument in the arithmetic type; the interpreter passes plain floats, which a cast takes to fp32."""
    return tl.sum(tl.zeros([1], tl.float64) + x).to(acc)


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
    smoothing, weight = _number(label_smoothing, acc), _number(z_loss, acc)
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
        top = tl.maximum(largest, logits)  # finite: every lane has a first logit, or stands at the maximum below
        top = tl.where(top == float("-inf"), 0.0, top)
        sums = sums * tl.exp(largest - top) + tl.exp(logits - top)
        largest = top
        total += tl.where(inside, logits, 0.0)
    lse = tl.max(largest)
    lse += tl.log(tl.sum(sums * tl.exp(largest - lse)))
    loss = lse - (1 - smoothing) * of_target - smoothing * tl.sum(total) / columns + weight * lse * lse
    tl.store(nll + row, tl.where(y == -1, 0.0, tl.where(y < 0, float("nan"), loss)))
    g = tl.load(grad + row).to(acc)
    # The second time, the row comes from the cache.
    for begin in range(0, columns, BLOCK):
        p = tl.exp(_row(z, bias, begin + lanes, columns, acc, HAS_BIAS) - lse) * (1 + 2 * weight * lse)
        d = g * (p - tl.where(begin + lanes == y, 1 - smoothing, 0.0) - smoothing / columns)
        tl.debug_barrier()  # every thread has read its logits
        tl.store(dz + begin + lanes, tl.where(y < 0, 0.0, d).to(dz.dtype.element_ty), mask=begin + lanes < columns)


@triton.jit
def _row(z, bias, at, columns, acc: tl.constexpr, HAS_BIAS: tl.constexpr):
    logits = tl.load(z + at, mask=at < columns, other=float("-inf")).to(acc)
    if HAS_BIAS:
        logits += tl.load(bias + at, mask=at < columns, other=0.0).to(acc)
    return logits


@triton.jit
def _tile(
    h, weight, cluster, bias, rows, end, at, split, columns, WIDTH: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """z [ROWS, COLUMNS] of these rows of h and columns ``at``, -inf outside."""
    lanes = tl.arange(0, BK)
    w = _piece(weight, cluster, at, split, WIDTH, PIECES)
    z = tl.zeros([rows.shape[0], at.shape[0]], acc)
    for k in range(0, WIDTH, BK):
        inside = k + lanes < WIDTH
        a = tl.load(
            h + rows[:, None] * WIDTH + k + lanes[None, :], mask=(rows < end)[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(w[None, :] + k + lanes[:, None], mask=(at < columns)[None, :] & inside[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=acc)
    if HAS_BIAS:
        z += tl.load(bias + at, mask=at < columns, other=0.0).to(acc)[None, :]
    return tl.where((at < columns)[None, :], z, float("-inf"))


@triton.jit
def _piece(first, second, at, split, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """The addresses of rows ``at`` of a table in one piece or two."""
    rows = first + at.to(tl.int64) * WIDTH
    if PIECES == 2:
        rows = tl.where(at < split, rows, second + (at - split).to(tl.int64) * WIDTH)
    return rows


@triton.jit
def _log_sum(
    h, weight, cluster, bias, order, offsets, column, partials, n, split, columns, length, splits,
    WIDTH: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials [4, splits, n]: the maximum, the sum of exp(z - maximum), the sum of z and the target's logit."""
    acc: tl.constexpr = partials.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    for tile in range(tl.program_id(0), tl.cdiv(end - begin, ROWS) * splits, tl.num_programs(0)):
        part = tile % splits
        rows = (begin + tile // splits * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        y = tl.load(column + tl.load(order + rows, mask=rows < end, other=0), mask=rows < end, other=-1)
        largest = tl.full([ROWS], float("-inf"), acc)
        sum = tl.zeros([ROWS], acc)
        total = tl.zeros([ROWS], acc)
        of_target = tl.zeros([ROWS], acc)
        for c in range(part * length, tl.minimum(part * length + length, columns), COLUMNS):
            at = c + tl.arange(0, COLUMNS)
            z = _tile(
                h, weight, cluster, bias, rows, end, at, split, columns, WIDTH, BK, HAS_BIAS, PIECES, PRECISION, acc
            )
            top = tl.maximum(largest, tl.max(z, 1))
            sum = sum * tl.exp(largest - top) + tl.sum(tl.exp(z - top[:, None]), 1)
            largest = top
            total += tl.sum(tl.where((at < columns)[None, :], z, 0.0), 1)
            of_target += tl.sum(tl.where(at[None, :] == y[:, None], z, 0.0), 1)
        to = partials + tl.cast(part, tl.int64) * n + rows
        tl.store(to, largest, mask=rows < end)
        tl.store(to + splits * n, sum, mask=rows < end)
        tl.store(to + 2 * splits * n, total, mask=rows < end)
        tl.store(to + 3 * splits * n, of_target, mask=rows < end)


@triton.jit
def _finish(
    partials, order, offsets, column, lse_of, nll, n, columns, splits, label_smoothing: tl.float64, z_loss: tl.float64,
    ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Merges the splits of each row: lse_of [n], and the loss into nll, to which a tail adds."""
    acc: tl.constexpr = partials.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    rows = (begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    smoothing = _number(label_smoothing, acc)
    largest = tl.full([ROWS], float("-inf"), acc)
    for part in range(0, splits):
        largest = tl.maximum(largest, tl.load(partials + part * n + rows, mask=inside, other=0.0))
    sum = tl.zeros([ROWS], acc)
    total = tl.zeros([ROWS], acc)
    of_target = tl.zeros([ROWS], acc)
    for part in range(0, splits):
        at = partials + part * n + rows
        sum += tl.exp(tl.load(at, mask=inside, other=0.0) - largest) * tl.load(at + splits * n, mask=inside, other=1.0)
        total += tl.load(at + 2 * splits * n, mask=inside, other=0.0)
        of_target += tl.load(at + 3 * splits * n, mask=inside, other=0.0)
    lse = largest + tl.log(sum)
    loss = lse - (1 - smoothing) * of_target - smoothing * total / columns + _number(z_loss, acc) * lse * lse
    tokens = tl.load(order + rows, mask=inside, other=0)
    tl.store(lse_of + rows, lse, mask=inside)
    if HEAD:
        y = tl.load(column + tokens, mask=inside, other=-1)
        loss = tl.where(y == -1, 0.0, tl.where(y < 0, float("nan"), loss))
    else:
        loss += tl.load(nll + tokens, mask=inside, other=0.0)
    tl.store(nll + tokens, loss, mask=inside)


@triton.jit
def _dz(z, lse_of, order, column, grad, rows, end, at, columns, label_smoothing, z_loss, acc: tl.constexpr):
    """The gradient of a tile of logits; 0 where there is no loss."""
    inside = rows < end
    tokens = tl.load(order + rows, mask=inside, other=0)
    y = tl.load(column + tokens, mask=inside, other=-1)
    g = tl.load(grad + tokens, mask=inside, other=0.0).to(acc)
    lse = tl.load(lse_of + rows, mask=inside, other=0.0)
    smoothing = _number(label_smoothing, acc)
    p = tl.exp(z - lse[:, None]) * (1 + 2 * _number(z_loss, acc) * lse)[:, None]
    d = g[:, None] * (p - tl.where(at[None, :] == y[:, None], 1 - smoothing, 0.0) - smoothing / columns)
    return tl.where((y >= 0)[:, None] & (at < columns)[None, :], d, 0.0)


@triton.jit
def _hidden_gradient(
    h, weight, cluster, bias, order, offsets, column, grad, lse_of, partials, n, split, columns, length, splits,
    label_smoothing: tl.float64, z_loss: tl.float64, WIDTH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials [splits, n, WIDTH]: dh = dz W over the columns of a split."""
    acc: tl.constexpr = partials.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    blocks: tl.constexpr = (WIDTH + BD - 1) // BD
    for tile in range(tl.program_id(0), tl.cdiv(end - begin, ROWS) * splits * blocks, tl.num_programs(0)):
        part = tile // blocks % splits
        features = tile % blocks * BD + tl.arange(0, BD)
        rows = (begin + tile // (blocks * splits) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        dh = tl.zeros([ROWS, BD], acc)
        for c in range(part * length, tl.minimum(part * length + length, columns), COLUMNS):
            at = c + tl.arange(0, COLUMNS)
            z = _tile(
                h, weight, cluster, bias, rows, end, at, split, columns, WIDTH, BK, HAS_BIAS, PIECES, PRECISION, acc
            )
            d = _dz(z, lse_of, order, column, grad, rows, end, at, columns, label_smoothing, z_loss, acc)
            w = _piece(weight, cluster, at, split, WIDTH, PIECES)[:, None] + features[None, :]
            w = tl.load(w, mask=(at < columns)[:, None] & (features < WIDTH)[None, :], other=0.0)
            dh = tl.dot(d.to(w.dtype), w, dh, input_precision=PRECISION, out_dtype=acc)
        to = partials + (tl.cast(part, tl.int64) * n + rows)[:, None] * WIDTH + features[None, :]
        tl.store(to, dh, mask=(rows < end)[:, None] & (features < WIDTH)[None, :])


@triton.jit
def _weight_gradient(
    h, weight, cluster, bias, order, offsets, column, grad, lse_of, d_weight, d_cluster, d_bias, split, columns,
    label_smoothing: tl.float64, z_loss: tl.float64, WIDTH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_CLUSTER: tl.constexpr,
):  # fmt: skip
    """dW = dz^T h and db, of a block of columns and of features."""
    acc: tl.constexpr = lse_of.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    features = tl.program_id(1) * BD + tl.arange(0, BD)
    dw = tl.zeros([COLUMNS, BD], acc)
    db = tl.zeros([COLUMNS], acc)
    for r in range(begin, end, ROWS):
        rows = (r + tl.arange(0, ROWS)).to(tl.int64)
        z = _tile(h, weight, cluster, bias, rows, end, at, split, columns, WIDTH, BK, HAS_BIAS, PIECES, PRECISION, acc)
        d = _dz(z, lse_of, order, column, grad, rows, end, at, columns, label_smoothing, z_loss, acc)
        hidden = tl.load(
            h + rows[:, None] * WIDTH + features[None, :],
            mask=(rows < end)[:, None] & (features < WIDTH)[None, :],
            other=0.0,
        )
        dw = tl.dot(tl.trans(d).to(hidden.dtype), hidden, dw, input_precision=PRECISION, out_dtype=acc)
        db += tl.sum(d, 0)
    wanted = (at < split) & NEED_WEIGHT | (at >= split) & NEED_CLUSTER
    to = _piece(d_weight, d_cluster, at, split, WIDTH, PIECES)[:, None] + features[None, :]
    tl.store(to, dw, mask=((at < columns) & wanted)[:, None] & (features < WIDTH)[None, :])
    if HAS_BIAS:
        tl.store(d_bias + at, db, mask=(at < columns) & (tl.program_id(1) == 0))


@triton.jit
def _merge(partials, dh, order, offsets, n, splits, width, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """dh [n, width], or with ADD the rows of dx to which it is added: the sum of the splits."""
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    features = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for row in range(begin + tl.program_id(1), end, tl.num_programs(1)):
        sum = tl.zeros([BLOCK], partials.dtype.element_ty)
        for part in range(0, splits):
            at = partials + (part * n + tl.cast(row, tl.int64)) * width + features
            sum += tl.load(at, mask=features < width, other=0.0)
        to = dh + (tl.load(order + row) if ADD else tl.cast(row, tl.int64)) * width + features
        if ADD:
            sum += tl.load(to, mask=features < width, other=0.0)
        tl.store(to, sum.to(dh.dtype.element_ty), mask=features < width)


@triton.jit
def _project(
    a, b, c, order, offsets, width, stride_k, stride_n, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """GATHER: c[row] = a[token] b (h = x P^T). Otherwise c[token] += a[row] b (dx += dh P). b is [K, width]."""
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    blocks = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(end - begin, ROWS) * blocks, tl.num_programs(0)):
        rows = (begin + tile // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        tokens = tl.load(order + rows, mask=rows < end, other=0)
        at = tile % blocks * COLUMNS + tl.arange(0, COLUMNS)
        lanes = tl.arange(0, BK)
        sum = tl.zeros([ROWS, COLUMNS], acc)
        for k in range(0, K, BK):
            inside = k + lanes < K
            of_a = (tokens if GATHER else rows)[:, None] * K + k + lanes[None, :]
            left = tl.load(a + of_a, mask=(rows < end)[:, None] & inside[None, :], other=0.0)
            of_b = (k + lanes)[:, None] * stride_k + at[None, :] * stride_n
            right = tl.load(b + of_b, mask=inside[:, None] & (at < width)[None, :], other=0.0)
            sum = tl.dot(left, right, sum, input_precision=PRECISION, out_dtype=acc)
        to = c + (rows if GATHER else tokens)[:, None] * width + at[None, :]
        mask = (rows < end)[:, None] & (at < width)[None, :]
        if not GATHER:
            sum += tl.load(to, mask=mask, other=0.0)
        tl.store(to, sum.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _projection_gradient(
    dh, x, dp, order, offsets, width, features, stride_w, stride_f, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dP [width, features] = dh^T x over the rows."""
    acc: tl.constexpr = dp.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sum = tl.zeros([COLUMNS, COLUMNS], acc)
    for r in range(begin, end, ROWS):
        rows = (r + tl.arange(0, ROWS)).to(tl.int64)
        tokens = tl.load(order + rows, mask=rows < end, other=0)
        left = tl.load(
            dh + rows[None, :] * width + i[:, None], mask=(rows < end)[None, :] & (i < width)[:, None], other=0.0
        )
        right = tl.load(
            x + tokens[:, None] * features + j[None, :], mask=(rows < end)[:, None] & (j < features)[None, :], other=0.0
        )
        sum = tl.dot(left, right, sum, input_precision=PRECISION, out_dtype=acc)
    tl.store(
        dp + i[:, None] * stride_w + j[None, :] * stride_f, sum, mask=(i < width)[:, None] & (j < features)[None, :]
    )


class _Softmax:
    """A softmax as the kernels take it, its gradients to be filled, and the rows of its tokens."""

    def __init__(self, softmax, gradients, order, offsets, column, acc, workspace):
        self.weights = [_readable(w).contiguous() for w in softmax.weights]
        self.projection = None if softmax.projection is None else _readable(softmax.projection)
        self.gradients = gradients
        self.order, self.offsets, self.column, self.acc = order, offsets, column, acc
        sizes = [len(w) for w in self.weights]
        self.split, self.columns, self.width, self.n = sizes[0], sum(sizes), self.weights[0].shape[1], len(column)
        biases = [
            column.new_zeros(size, dtype=acc) if b is None else b.to(acc)
            for b, size in zip(softmax.biases, sizes, strict=True)
        ]
        self.bias = torch.cat(biases) if any(b is not None for b in softmax.biases) else None
        self.d_bias = None if self.bias is None else torch.empty_like(self.bias)
        # Partial sums of dh must not outgrow the workspace.
        most = max(1, workspace // max(1, self.n * self.width * acc.itemsize))
        self.splits = min(triton.cdiv(self.columns, SPLIT), most)
        # Products in full fp32 run without tensor cores, and hold their operands in registers.
        self.tile = 64 if self.weights[0].element_size() == 2 else 32
        self.length = triton.cdiv(triton.cdiv(self.columns, self.splits), self.tile) * self.tile
        self.splits = triton.cdiv(self.columns, self.length)
        self.precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def tables(self):
        bias = self.weights[0] if self.bias is None else self.bias  # an address that is not read
        return self.weights[0], self.weights[-1], bias

    def flags(self):
        return dict(
            WIDTH=self.width, BK=self.depth(self.width), ROWS=self.tile, COLUMNS=self.tile,
            HAS_BIAS=self.bias is not None,
            PIECES=len(self.weights), PRECISION=self.precision,
        )  # fmt: skip

    def depth(self, width):
        """Features that a product takes at a time."""
        return min(self.tile, max(16, triton.next_power_of_2(width)))

    def features(self):
        """Features of a tile of gradients, and the warps that hold it."""
        block = min(4 * self.tile, max(16, triton.next_power_of_2(self.width)))
        return dict(BD=block, num_warps=8 if block > 64 else 4)

    def hidden(self, x):
        """h [n, width], in the order of the rows."""
        if self.projection is None:
            return x.index_select(0, self.order)
        h = x.new_empty(self.n, self.width)
        _project[(_programs(x),)](
            x, self.projection, h, self.order, self.offsets, self.width, self.projection.stride(1),
            self.projection.stride(0), K=x.shape[1], BK=self.depth(x.shape[1]), ROWS=self.tile,
            COLUMNS=self.tile, GATHER=True,
            PRECISION=self.precision, acc=_type(self.acc),
        )  # fmt: skip
        return h

    def losses(self, h, nll, options, head):
        """Adds to ``nll`` (the head writes it); returns the log-sum-exp of each row."""
        partials, lse = nll.new_empty(4, self.splits, self.n), torch.empty_like(nll)
        _log_sum[(_programs(h),)](
            h, *self.tables(), self.order, self.offsets, self.column, partials, self.n, self.split, self.columns,
            self.length, self.splits, **self.flags(), num_warps=8,
        )  # fmt: skip
        _finish[(triton.cdiv(self.n, 128),)](
            partials, self.order, self.offsets, self.column, lse, nll, self.n, self.columns, self.splits,
            options.label_smoothing, options.z_loss, ROWS=128, HEAD=head,
        )  # fmt: skip
        return lse

    def differentiate(self, h, lse, grad, x, dx, options):
        """Fills the gradients of the tables, and adds to ``dx``."""
        d_weights, _, d_projection = self.gradients
        problem = (h, *self.tables(), self.order, self.offsets, self.column, grad, lse)
        smoothing = (options.label_smoothing, options.z_loss)
        if any(d is not None for d in (*d_weights, *self.gradients.biases)):
            grid = (triton.cdiv(self.columns, self.tile), triton.cdiv(self.width, self.features()["BD"]))
            addresses = [lse if d is None else d for d in (d_weights[0], d_weights[-1], self.d_bias)]
            _weight_gradient[grid](
                *problem, *addresses, self.split, self.columns, *smoothing, NEED_WEIGHT=d_weights[0] is not None,
                NEED_CLUSTER=d_weights[-1] is not None, **self.flags(), **self.features(),
            )  # fmt: skip
            self.store_bias_gradients()
        if dx is None and d_projection is None:
            return
        partials = lse.new_empty(self.splits, self.n, self.width)
        _hidden_gradient[(_programs(h),)](
            *problem, partials, self.n, self.split, self.columns, self.length, self.splits, *smoothing, **self.flags(),
            **self.features(),
        )  # fmt: skip
        dh = dx if self.projection is None else torch.empty_like(h)
        block = min(1024, triton.next_power_of_2(self.width))
        _merge[(triton.cdiv(self.width, block), _programs(h))](
            partials, dh, self.order, self.offsets, self.n, self.splits, self.width, BLOCK=block,
            ADD=self.projection is None,
        )  # fmt: skip
        if self.projection is not None:
            self.differentiate_projection(dh, x, dx)

    def differentiate_projection(self, dh, x, dx):
        p, d_projection = self.projection, self.gradients.projection
        rows = (self.order, self.offsets)
        if d_projection is not None:
            grid = (triton.cdiv(self.width, self.tile), triton.cdiv(x.shape[1], self.tile))
            _projection_gradient[grid](
                dh, x, d_projection, *rows, self.width, x.shape[1], *d_projection.stride(), ROWS=self.tile,
                COLUMNS=self.tile,
                PRECISION=self.precision,
            )  # fmt: skip
        if dx is not None:
            _project[(_programs(dh),)](
                dh, p, dx, *rows, x.shape[1], *p.stride(), K=self.width, BK=self.depth(self.width), ROWS=self.tile,
                COLUMNS=self.tile, GATHER=False, PRECISION=self.precision, acc=_type(self.acc),
            )  # fmt: skip

    def store_bias_gradients(self):
        if self.d_bias is not None:
            pieces = self.d_bias.split([len(w) for w in self.weights])
            for d_bias, piece in zip(self.gradients.biases, pieces, strict=True):
                if d_bias is not None:
                    d_bias.copy_(piece)

    def blocks(self, x, grad, nll, dx, options):
        """The head in training: all the rows, in blocks through a workspace of logits."""
        stride = triton.cdiv(self.columns, 64) * 64
        rows = max(1, options.workspace // (stride * self.acc.itemsize))
        rows = min(self.n, rows // 128 * 128 or rows)
        memory = x.new_empty(rows, stride, dtype=self.acc)
        dxs = [None] * triton.cdiv(self.n, rows) if dx is None else dx.split(rows)
        parts = x.split(rows), self.column.split(rows), grad.split(rows), nll.split(rows), dxs
        for i, (block, column, g, losses, block_dx) in enumerate(zip(*parts, strict=True)):
            h = block if self.projection is None else block @ self.projection.t()
            z = memory[: len(block), : self.columns]
            for w, piece in zip(self.weights, self.pieces(z), strict=True):
                _product(piece, h, w.t(), 0)
            dz = memory.view(x.dtype)[: len(block), : self.columns]
            self.rows_in_place(z, dz, column, g, losses, options)
            self.block_gradients(block, h, self.pieces(dz), block_dx, keep=int(i > 0))

    def pieces(self, z):
        return z.split([len(w) for w in self.weights], 1)

    def block_gradients(self, x, h, dz, dx, keep):
        d_weights, d_biases, d_projection = self.gradients
        for d_weight, d_bias, piece in zip(d_weights, d_biases, dz, strict=True):
            if d_weight is not None:
                _product(d_weight, piece.t(), h, keep)
            if d_bias is not None:
                sums = piece.sum(0, dtype=self.acc)
                d_bias.copy_(d_bias + sums if keep else sums)
        if dx is None and d_projection is None:
            return
        dh = dx if self.projection is None else h.new_empty(h.shape, dtype=self.acc)
        for i, (w, piece) in enumerate(zip(self.weights, dz, strict=True)):
            _product(dh, piece, w, int(i > 0))
        if d_projection is not None:
            _product(d_projection, dh.to(x.dtype).t(), x, keep)
        if dx is not None and self.projection is not None:
            _product(dx, dh.to(x.dtype), self.projection, 0)

    def rows_in_place(self, z, dz, column, grad, nll, options):
        block = min(1024, triton.next_power_of_2(self.columns))
        _rows_in_place[(len(z),)](
            z, dz, nll if self.bias is None else self.bias, column, grad, nll, self.columns, z.stride(0), dz.stride(0),
            options.label_smoothing, options.z_loss, BLOCK=block, HAS_BIAS=self.bias is not None,
            num_warps=8 if block == 1024 else 4,  # at 2048 columns a block, sm_90 spills 8 bytes
        )  # fmt: skip


def _product(out, a, b, keep):
    """out = a b + keep * out, in the dtype of ``out``, which the tables may not have."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=keep)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=keep, out=out)
    else:  # the interpreter
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=keep)


def _readable(x):
    """The interpreter computes wrongly in bf16."""
    return x.float() if x.dtype == torch.bfloat16 and INTERPRETED else x


def _type(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _programs(x):
    """Two programs for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def sort(target, options):
    """The target's column in the head (-1: no loss, -2: no class) and in its tail, by token; the tokens sorted by tail,
    and where the tails begin."""
    tails, n = len(options.ends) - 1, len(target)
    head, tail, order = torch.empty_like(target), torch.empty_like(target), torch.zeros_like(target)
    offsets = target.new_empty(tails + 1, dtype=torch.int32)
    # Filled on the device: a copy from the host would make it wait, and a CUDA graph would read freed memory.
    ends = torch.cat([target.new_full((1,), end) for end in (*options.ends, options.ends[-1])])
    _sort[(max(tails, 1),)](
        target,
        ends,
        head,
        tail,
        order,
        offsets,
        n,
        tails,
        options.ignore_index,
        DESCENDING=options.descending,
        BLOCK=1024,
    )
    return head, tail, order, offsets


def run(grad, x, target, softmaxes, gradients, nll, dx, options):
    """Fills ``nll``, and with ``grad`` the gradients and ``dx``; one that is not wanted is None. Returns the target's
    column in the head of each token, -2 for a target that is no class."""
    n, acc, scale = len(x), nll.dtype, None
    target, x = target.contiguous(), _readable(x).contiguous()
    head, tail, order, offsets = sort(target, options)
    if grad is not None and x.dtype == torch.float16:
        # dz keeps its digits in fp16 at a size of 1; the gradients, in fp32, take the rest.
        scale = grad.abs().amax().clamp(min=1e-30) if n else None
        grad = grad if scale is None else grad / scale
    all_tokens, everything = torch.arange(n, device=x.device), n * torch.arange(2, dtype=offsets.dtype, device=x.device)
    for i, (softmax, gradient) in enumerate(zip(softmaxes, gradients, strict=True)):
        rows = (all_tokens, everything, head) if i == 0 else (order, offsets[i - 1 :], tail)
        part = _Softmax(softmax, gradient, *rows, acc, options.workspace)
        if n == 0:
            for d in (*gradient.weights, *gradient.biases, gradient.projection):
                if d is not None:
                    d.zero_()
            continue
        if i == 0 and grad is not None and options.workspace > 0:
            part.blocks(x, grad, nll, dx, options)
            continue
        if i == 0 and dx is not None:
            dx.zero_()
        h = part.hidden(x)
        lse = part.losses(h, nll, options, head=i == 0)
        if grad is not None:
            part.differentiate(h, lse, grad, x, dx, options)
    if scale is not None:
        for d in (dx, *(d for g in gradients for d in (*g.weights, *g.biases, g.projection))):
            if d is not None:
                d.mul_(scale)
    return head
