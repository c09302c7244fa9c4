"""Adaptive softmax on the CPU: vendor matrix products over blocks of rows, and C++ (csrc/cpu) for all between them.

The tokens are sorted by tail; the head takes all of them and a tail its own. A block of rows of one softmax is then

    h = x P^T,  z = h W^T  ->  C++: the loss, and dz in the place of z  ->  dW += dz^T h,  dh = dz W,  dP += dh^T x,  dx += dh P

The logits z of a block are in a workspace that every block reuses: fresh memory would cost a page fault per 4 KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from par_xl.ops.registry import _C, DTYPES

if TYPE_CHECKING:
    from par_xl.ops.adaptive_softmax import Options, Softmax

# Columns of a product z = h W^T; one product over all of a wide softmax runs at two thirds of the speed.
PANEL = 2048


def _sort(
    target: Tensor, ends: Sequence[int], descending: bool, ignore_index: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The target's column in the head and in its tail (-1 for none), by token, and the tokens of each tail."""
    target, tails = target.contiguous(), len(ends) - 1
    head, tail, order = (torch.empty_like(target) for _ in range(3))
    offsets, last = target.new_empty(tails + 1), torch.tensor(ends)
    results = (t.data_ptr() for t in (head, tail, order, offsets))
    bad = _C.adaptive_buckets_cpu(
        target.data_ptr(), len(target), last.data_ptr(), tails, descending, ignore_index, *results
    )
    if bad >= 0:
        raise ValueError(f"target must lie between 0 and {ends[-1] - 1} or be {ignore_index}, not {target[bad].item()}")
    bounds = offsets.tolist()
    return head, tail, [order[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


class _Rows:
    """One softmax over blocks of rows. Everything is in the arithmetic type; a gradient that is not wanted is None."""

    def __init__(self, softmax: Softmax, gradients: Softmax, wide: torch.dtype):
        self.weights = [w.to(wide) for w in softmax.weights]
        self.projection = None if softmax.projection is None else softmax.projection.to(wide)
        self.gradients = gradients
        ends = torch.tensor([0] + [len(w) for w in self.weights]).cumsum(0).tolist()
        self.spans = [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
        self.columns = ends[-1]
        self.bias = None
        if any(b is not None for b in softmax.biases):
            self.bias = torch.zeros(self.columns, dtype=wide)
            for bias, span in zip(softmax.biases, self.spans, strict=True):
                if bias is not None:
                    self.bias[span] = bias

    def cut(self, rows: int, workspace: int) -> tuple[Tensor, int]:
        """The workspace ``(rows of a block, columns)`` and its rows."""
        # A row starts at a multiple of 64 bytes: a product with other rows runs at two thirds of the speed.
        stride = -(-self.columns // 16) * 16
        size = torch.finfo(self.weights[0].dtype).bits // 8
        n = min(rows, max(1, workspace // (stride * size)))
        # Blocks of one size: a last one of a few rows would be slow.
        n = -(-rows // -(-rows // n))
        return torch.empty(n, stride, dtype=self.weights[0].dtype)[:, : self.columns], n

    def clear(self) -> None:
        """The gradients of a softmax without a row."""
        for gradient in (*self.gradients.weights, self.gradients.projection):
            if gradient is not None:
                gradient.zero_()

    def products(self, z: Tensor, x: Tensor) -> Tensor:
        """Fills z; returns h."""
        h = x if self.projection is None else x @ self.projection.t()
        for weight, span in zip(self.weights, self.spans, strict=True):
            for w, panel in zip(weight.split(PANEL), z[:, span].split(PANEL, 1), strict=True):
                torch.mm(h, w.t(), out=panel)
        return h

    def differentiate(self, z: Tensor, h: Tensor, x: Tensor, dx: Tensor | None, first: bool) -> None:
        """Writes ``dx`` and adds to the other gradients; z is dz by now."""
        keep = 0.0 if first else 1.0  # a product with beta = 0 does not read what its output held
        for d_weight, d_bias, span in zip(self.gradients.weights, self.gradients.biases, self.spans, strict=True):
            if d_weight is not None:
                d_weight.addmm_(z[:, span].t(), h, beta=keep)
            if d_bias is not None:
                d_bias.add_(z[:, span].sum(0))
        d_projection = self.gradients.projection
        if dx is None and d_projection is None:
            return
        dh = dx if self.projection is None else torch.empty_like(h)
        for i, (weight, span) in enumerate(zip(self.weights, self.spans, strict=True)):
            dh.addmm_(z[:, span], weight, beta=float(i > 0))
        if d_projection is not None:
            d_projection.addmm_(dh.t(), x, beta=keep)
        if dx is not None and self.projection is not None:
            torch.mm(dh, self.projection, out=dx)


def run(
    grad: Tensor | None, x: Tensor, target: Tensor, softmaxes: Sequence[Softmax], gradients: Sequence[Softmax],
    nll: Tensor, dx: Tensor | None, options: Options,
) -> None:  # fmt: skip
    """Fills ``nll``, and with ``grad`` the gradients and ``dx``; one that is not wanted is None."""
    wide = nll.dtype
    head, tail, tokens_of = _sort(target, options.ends, options.descending, options.ignore_index)
    x, nll = x.to(wide), nll.zero_()
    for i, (softmax, gradient) in enumerate(zip(softmaxes, gradients, strict=True)):
        rows, column = _Rows(softmax, gradient, wide), tail if i else head
        every = tokens_of[i - 1] if i else None
        count = len(x) if every is None else len(every)
        if grad is not None:
            for d_bias in gradient.biases:
                if d_bias is not None:
                    d_bias.zero_()
            if count == 0:
                rows.clear()
        if count == 0:
            continue
        workspace_z, size = rows.cut(count, options.workspace)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            tokens = None if every is None else every[begin:end]
            z, some = workspace_z[: end - begin], slice(begin, end) if tokens is None else slice(None)
            block_x = x[some] if tokens is None else x[tokens]
            h = rows.products(z, block_x)
            by_token = (None if t is None else t[some] for t in (grad, nll))
            addresses = [0 if t is None else t.data_ptr() for t in (rows.bias, tokens, column[some], *by_token)]
            _C.adaptive_rows_cpu(
                z.data_ptr(), *z.shape, z.stride(0), *addresses, options.label_smoothing, options.z_loss, DTYPES[wide]
            )
            if grad is None:
                continue
            block_dx = None
            if dx is not None:
                block_dx = dx[some] if tokens is None else torch.empty_like(block_x)
            rows.differentiate(z, h, block_x, block_dx, begin == 0)
            if tokens is not None and block_dx is not None:
                dx.index_add_(0, tokens, block_dx)
