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
from par_xl.kernels.adaptive_softmax_rows import rows_in_place, sort
from par_xl.kernels.adaptive_softmax_tiles import (
    add_splits,
    hidden_gradient,
    log_sum,
    merge_losses,
    project,
    projection_gradient,
    weight_gradient,
)

SPLIT = 4096  # columns of a split
INTERPRETED = triton.knobs.runtime.interpret


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
        self.precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"

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
        project[(_programs(x),)](
            x, self.projection, h, self.order, self.offsets, self.width, self.projection.stride(1),
            self.projection.stride(0), K=x.shape[1], BK=self.depth(x.shape[1]), ROWS=self.tile,
            COLUMNS=self.tile, GATHER=True,
            PRECISION=self.precision, acc=_type(self.acc),
        )  # fmt: skip
        return h

    def losses(self, h, nll, options, head):
        """Adds to ``nll`` (the head writes it); returns the log-sum-exp of each row."""
        partials, lse = nll.new_empty(4, self.splits, self.n), torch.empty_like(nll)
        log_sum[(_programs(h),)](
            h, *self.tables(), self.order, self.offsets, self.column, partials, self.n, self.split, self.columns,
            self.length, self.splits, **self.flags(), num_warps=8,
        )  # fmt: skip
        merge_losses[(triton.cdiv(self.n, 128),)](
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
            weight_gradient[grid](
                *problem, *addresses, self.split, self.columns, *smoothing, NEED_WEIGHT=d_weights[0] is not None,
                NEED_CLUSTER=d_weights[-1] is not None, **self.flags(), **self.features(),
            )  # fmt: skip
            self.store_bias_gradients()
        if dx is None and d_projection is None:
            return
        partials = lse.new_empty(self.splits, self.n, self.width)
        hidden_gradient[(_programs(h),)](
            *problem, partials, self.n, self.split, self.columns, self.length, self.splits, *smoothing, **self.flags(),
            **self.features(),
        )  # fmt: skip
        dh = dx if self.projection is None else torch.empty_like(h)
        block = min(1024, triton.next_power_of_2(self.width))
        add_splits[(triton.cdiv(self.width, block), _programs(h))](
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
            projection_gradient[grid](
                dh, x, d_projection, *rows, self.width, x.shape[1], *d_projection.stride(), ROWS=self.tile,
                COLUMNS=self.tile,
                PRECISION=self.precision,
            )  # fmt: skip
        if dx is not None:
            project[(_programs(dh),)](
                dh, p, dx, *rows, x.shape[1], *p.stride(), K=self.width, BK=self.depth(self.width), ROWS=self.tile,
                COLUMNS=self.tile, GATHER=False, PRECISION=self.precision, acc=_type(self.acc),
            )  # fmt: skip

    def store_bias_gradients(self):
        if self.d_bias is not None:
            pieces = self.d_bias.split([len(w) for w in self.weights])
            for d_bias, piece in zip(self.gradients.biases, pieces, strict=True):
                if d_bias is not None:
                    d_bias.copy_(piece)

    def blocks(self, x, grad, nll, dx, options, rows_in_place):
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
            rows_in_place(z, dz, self.bias, column, g, losses, options)
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


def run(
    grad, x, target, softmaxes, gradients, nll, dx, bad, options, sort=sort, rows_in_place=rows_in_place
):  # fmt: skip
    """Fills ``nll``, and with ``grad`` the gradients and ``dx``; one that is not wanted is None. A target that is no
    class has a loss of NaN, and is written to ``bad``. ``sort`` and ``rows_in_place`` may come from elsewhere."""
    n, acc, scale = len(x), nll.dtype, None
    target, x = target.contiguous(), _readable(x).contiguous()
    head, tail, order, offsets = sort(target, bad, options)
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
            part.blocks(x, grad, nll, dx, options, rows_in_place)
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
