"""The adaptive softmax kernels that take tiles of a softmax z = h W^T + b, over the rows ``order[offsets[0] ..
offsets[1]]`` of its tokens. A fixed grid of programs walks over as many tiles as there are; nothing of z is stored."""

import triton
import triton.language as tl
from par_xl.kernels.adaptive_softmax_rows import logit_gradient, number, row_loss, without_target


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
def log_sum(
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
            # The sum stays 0 where a row's logits so far are all -inf.
            base = tl.where(top == float("-inf"), 0.0, top)
            sum = sum * tl.exp(largest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            largest = top
            total += tl.sum(tl.where((at < columns)[None, :], z, 0.0), 1)
            of_target += tl.sum(tl.where(at[None, :] == y[:, None], z, 0.0), 1)
        to = partials + tl.cast(part, tl.int64) * n + rows
        tl.store(to, largest, mask=rows < end)
        tl.store(to + splits * n, sum, mask=rows < end)
        tl.store(to + 2 * splits * n, total, mask=rows < end)
        tl.store(to + 3 * splits * n, of_target, mask=rows < end)


@triton.jit
def merge_losses(
    partials, order, offsets, column, lse_of, nll, n, columns, splits, label_smoothing: tl.float64, z_loss: tl.float64,
    ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Merges the splits of each row: lse_of [n], and the loss into nll, to which a tail adds."""
    acc: tl.constexpr = partials.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    rows = (begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = rows < end
    largest = tl.full([ROWS], float("-inf"), acc)
    for part in range(0, splits):
        largest = tl.maximum(largest, tl.load(partials + part * n + rows, mask=inside, other=0.0))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    sum = tl.zeros([ROWS], acc)
    total = tl.zeros([ROWS], acc)
    of_target = tl.zeros([ROWS], acc)
    for part in range(0, splits):
        at = partials + part * n + rows
        sum += tl.exp(tl.load(at, mask=inside, other=0.0) - base) * tl.load(at + splits * n, mask=inside, other=1.0)
        total += tl.load(at + 2 * splits * n, mask=inside, other=0.0)
        of_target += tl.load(at + 3 * splits * n, mask=inside, other=0.0)
    lse = largest + tl.log(sum)
    loss = row_loss(lse, of_target, total, columns, number(label_smoothing, acc), number(z_loss, acc))
    tokens = tl.load(order + rows, mask=inside, other=0)
    tl.store(lse_of + rows, lse, mask=inside)
    if HEAD:
        y = tl.load(column + tokens, mask=inside, other=-1)
        loss = without_target(loss, y)
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
    smoothing, weight = number(label_smoothing, acc), number(z_loss, acc)
    d = g[:, None] * logit_gradient(z, lse[:, None], at[None, :] == y[:, None], columns, smoothing, weight)
    return tl.where((y >= 0)[:, None] & (at < columns)[None, :], d, 0.0)


@triton.jit
def hidden_gradient(
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
def weight_gradient(
    h, weight, cluster, bias, order, offsets, column, grad, lse_of, d_weight, d_cluster, d_bias, split, columns,
    label_smoothing: tl.float64, z_loss: tl.float64, WIDTH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, NEED_CLUSTER: tl.constexpr,
):  # fmt: skip
    """dW = dz^T h and db, of a block of columns and of features. Rare classes have the same dz in most rows, and each
    addition to db would round alike: what it lost is added with the next."""
    acc: tl.constexpr = lse_of.dtype.element_ty
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    features = tl.program_id(1) * BD + tl.arange(0, BD)
    dw = tl.zeros([COLUMNS, BD], acc)
    db = tl.zeros([COLUMNS], acc)
    lost = tl.zeros([COLUMNS], acc)
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
        added = tl.sum(d, 0) - lost
        sum = db + added
        lost = (sum - db) - added
        db = sum
    wanted = (at < split) & NEED_WEIGHT | (at >= split) & NEED_CLUSTER
    to = _piece(d_weight, d_cluster, at, split, WIDTH, PIECES)[:, None] + features[None, :]
    tl.store(to, dw, mask=((at < columns) & wanted)[:, None] & (features < WIDTH)[None, :])
    if HAS_BIAS:
        tl.store(d_bias + at, db, mask=(at < columns) & (tl.program_id(1) == 0))


@triton.jit
def add_splits(partials, dh, order, offsets, n, splits, width, BLOCK: tl.constexpr, ADD: tl.constexpr):
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
def project(
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
            of_b = (k + lanes).to(tl.int64)[:, None] * stride_k + at.to(tl.int64)[None, :] * stride_n
            right = tl.load(b + of_b, mask=inside[:, None] & (at < width)[None, :], other=0.0)
            sum = tl.dot(left, right, sum, input_precision=PRECISION, out_dtype=acc)
        to = c + (rows if GATHER else tokens)[:, None] * width + at[None, :]
        mask = (rows < end)[:, None] & (at < width)[None, :]
        if not GATHER:
            sum += tl.load(to, mask=mask, other=0.0)
        tl.store(to, sum.to(c.dtype.element_ty), mask=mask)


@triton.jit
def projection_gradient(
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
