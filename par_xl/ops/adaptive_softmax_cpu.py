"""Adaptive softmax on the CPU: vendor matrix products over blocks of rows, and C++ (csrc/cpu) for all between them.

The tokens are sorted by tail; the head takes all of them and a tail its own. A block of rows of one softmax is then

    h = x P^T,  z = h W^T  ->  C++: the loss, and dz in the place of z
    ->  dW += dz^T h,  dh = dz W,  dP += dh^T x,  dx += dh P

The logits z of a block are in a workspace that every block reuses: fresh memory would cost a page fault per 4 KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import _C, DTYPES

if TYPE_CHECKING:
    from par_xl.ops.adaptive_tables import Options, Softmax

# Columns of a product z = h W^T; one product over all of a wide softmax runs at two thirds of the speed.
PANEL = 2048


def _sort(target: Tensor, options: Options) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The target's column in the head and in its tail (-1 for none), by token, and the tokens of each tail."""
    target, tails = target.contiguous(), len(options.ends) - 1
    head, tail, order = (torch.empty_like(target) for _ in range(3))
    offsets, ends = target.new_empty(tails + 1), torch.tensor(options.ends)
    arrays = (t.data_ptr() for t in (head, tail, order, offsets))
    bad = _C.adaptive_buckets_cpu(
        _C.AdaptiveBuckets(
            target.data_ptr(), ends.data_ptr(), len(target), tails, options.ignore_index, options.descending, *arrays, 0
        )
    )
    if bad >= 0:
        raise options.target_error(target[bad].item())
    bounds = offsets.tolist()
    return head, tail, [order[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


class _Part:
    """One softmax and its rows: all the tokens, or those given. Everything is in the arithmetic type ``wide``."""

    def __init__(
        self,
        softmax: Softmax,
        gradients: Softmax,
        column: Tensor,
        tokens: Tensor | None,
        wide: torch.dtype,
        workspace: int,
    ):
        self.weights = [w.to(wide) for w in softmax.weights]
        self.projection = None if softmax.projection is None else softmax.projection.to(wide)
        self.gradients, self.column, self.tokens = gradients, column, tokens
        ends = [0]
        for weight in self.weights:
            ends.append(ends[-1] + len(weight))
        self.spans = [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
        self.columns, self.count = ends[-1], len(column) if tokens is None else len(tokens)
        # A row of z starts at a multiple of 64 bytes: a product with other rows runs at two thirds of the speed.
        self.stride = -(-self.columns // 16) * 16
        most = max(16, workspace // (self.stride * wide.itemsize))  # fewer would be no matrix product
        self.rows = -(-self.count // max(1, -(-self.count // most)))  # of a block; a last one of a few would be slow
        self.bias = None
        if any(b is not None for b in softmax.biases):
            self.bias = torch.zeros(self.columns, dtype=wide)
            for bias, span in zip(softmax.biases, self.spans, strict=True):
                if bias is not None:
                    self.bias[span] = bias

    def clear_gradients(self) -> None:
        """Zeros where no product writes: the biases, and everything of a softmax without a row."""
        written = [] if self.count else [*self.gradients.weights, self.gradients.projection]
        for gradient in (*self.gradients.biases, *written):
            if gradient is not None:
                gradient.zero_()

    def block(self, begin: int, memory: Tensor, x: Tensor, grad: Tensor | None, nll: Tensor, dx: Tensor | None,
              options: Options) -> None:  # fmt: skip
        """Adds the losses of a block of rows to ``nll``; with ``grad``, adds to every gradient that is wanted."""
        span = slice(begin, min(begin + self.rows, self.count))
        tokens = None if self.tokens is None else self.tokens[span]
        block_x = x[span] if tokens is None else x[tokens]
        z = memory[: len(block_x) * self.stride].view(-1, self.stride)[:, : self.columns]
        h = block_x if self.projection is None else block_x @ self.projection.t()
        for weight, columns in zip(self.weights, self.spans, strict=True):
            for w, panel in zip(weight.split(PANEL), z[:, columns].split(PANEL, 1), strict=True):
                torch.mm(h, w.t(), out=panel)
        first = begin if tokens is None else 0
        by_token = (None if t is None else t[first:] for t in (self.column, grad, nll))
        addresses = (0 if t is None else t.data_ptr() for t in (self.bias, tokens, *by_token))
        smoothing = options.label_smoothing, options.z_loss
        _C.adaptive_rows_cpu(
            _C.AdaptiveRows(z.data_ptr(), *z.shape, self.stride, *addresses, *smoothing, DTYPES[z.dtype])
        )
        if grad is None:
            return
        block_dx = None if dx is None else dx[span] if tokens is None else torch.empty_like(block_x)
        self._differentiate(z, h, block_x, block_dx, keep=float(begin > 0))
        if dx is not None and tokens is not None and block_dx is not None:
            dx.index_add_(0, tokens, block_dx)

    def _differentiate(self, dz: Tensor, h: Tensor, x: Tensor, dx: Tensor | None, keep: float) -> None:
        """Writes ``dx``, adds to the bias gradients, and to ``keep`` times the others; 0 does not read them."""
        weights, biases, d_projection = self.gradients
        for d_weight, d_bias, span in zip(weights, biases, self.spans, strict=True):
            if d_weight is not None:
                d_weight.addmm_(dz[:, span].t(), h, beta=keep)
            if d_bias is not None:
                d_bias.add_(dz[:, span].sum(0))
        if dx is None and d_projection is None:
            return
        dh = dx if self.projection is None and dx is not None else torch.empty_like(h)
        for i, (weight, span) in enumerate(zip(self.weights, self.spans, strict=True)):
            dh.addmm_(dz[:, span], weight, beta=float(i > 0))
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
    head, tail, tokens = _sort(target, options)
    rows = [(head, None), *((tail, some) for some in tokens)]
    parts = [
        _Part(softmax, gradient, *where, wide, options.workspace)
        for softmax, gradient, where in zip(softmaxes, gradients, rows, strict=True)
    ]
    x, nll = x.to(wide), nll.zero_()
    memory = to_be_filled(torch.empty(max(part.rows * part.stride for part in parts), dtype=wide))
    for part in parts:
        if grad is not None:
            part.clear_gradients()
        for begin in range(0, part.count, max(1, part.rows)):
            part.block(begin, memory, x, grad, nll, dx, options)
