"""Adaptive softmax on the CPU: C++ (csrc/cpu) for each softmax, vendor products for the projections around it.

The tokens are sorted by tail; the head takes all that are not ignored and a tail its own. One softmax is then

    h = x P^T  ->  C++: the losses, dW, db and dh  ->  dP = dh^T x,  dx += dh P
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


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _lines(x: Tensor) -> Tensor:
    """The same values with the elements of a row next to each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def _bf16_parts(softmax: Softmax) -> int:
    """Of a number, where the processor multiplies bf16 (AMX); one for a bf16 input that no projection changes."""
    dtype = softmax.weights[0].dtype
    if dtype == torch.float32:
        precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # the module replaces itself
        return {"tf32": 2, "bf16": 1}.get(precision, 3)
    return 1 if dtype == torch.bfloat16 and softmax.projection is None else 2


def _take(
    h: Tensor, dh: Tensor | None, tokens: Tensor | None, column: Tensor, softmax: Softmax, gradients: Softmax,
    grad: Tensor | None, nll: Tensor, options: Options,
) -> None:  # fmt: skip
    """Adds the losses of the rows ``h`` to ``nll``; with ``grad``, fills the tables' gradients and ``dh``."""
    weights = [_lines(w) for w in softmax.weights]
    biases = [None if b is None else b.contiguous() for b in softmax.biases]
    pieces = [
        _C.AdaptivePiece(w.data_ptr(), _address(b), len(w), w.stride(0), _address(dw), _address(db))
        for w, b, dw, db in zip(weights, biases, gradients.weights, gradients.biases, strict=True)
    ]
    sizes = (*h.shape, h.stride(0), options.workspace, _bf16_parts(softmax))
    problem = _C.AdaptiveSoftmax(
        pieces, [_address(t) for t in (h, dh, tokens, column, grad, nll)], sizes, options.label_smoothing,
        options.z_loss, DTYPES[weights[0].dtype],
    )  # fmt: skip
    size = -(-_C.adaptive_softmax_memory_cpu(problem) // h.itemsize)
    memory = to_be_filled(torch.empty(size, dtype=h.dtype))
    _C.adaptive_softmax_cpu(problem, memory.data_ptr())


def _backward_of_projection(
    dh: Tensor, x: Tensor, tokens: Tensor | None, projection: Tensor | None, gradient: Tensor | None, dx: Tensor | None
) -> None:
    """Fills ``gradient`` and adds to ``dx``, which the head (``tokens`` None) writes."""
    if gradient is not None:
        torch.mm(dh.t(), x, out=gradient)
    if dx is None:
        return
    if tokens is not None:
        dx.index_add_(0, tokens, dh if projection is None else dh @ projection)
    elif projection is not None:
        torch.mm(dh, projection, out=dx)


def run(
    grad: Tensor | None, x: Tensor, target: Tensor, softmaxes: Sequence[Softmax], gradients: Sequence[Softmax],
    nll: Tensor, dx: Tensor | None, options: Options,
) -> None:  # fmt: skip
    """Fills ``nll``, and with ``grad`` the gradients and ``dx``; one that is not wanted is None."""
    wide = nll.dtype
    head, tail, tokens_of_tails = _sort(target, options)
    valid = head >= 0
    kept = None if valid.all() else valid.nonzero()[:, 0]
    x, nll = _lines(x.to(wide)), nll.zero_()
    if dx is not None and kept is not None:
        dx.zero_()
    rows = [(head, kept), *((tail, tokens) for tokens in tokens_of_tails)]
    for softmax, gradient, (column, tokens) in zip(softmaxes, gradients, rows, strict=True):
        own = x if tokens is None else x.index_select(0, tokens)
        if len(own) == 0:
            for g in (*gradient.weights, *gradient.biases, gradient.projection):
                if g is not None:
                    g.zero_()
            continue
        projection = None if softmax.projection is None else softmax.projection.to(wide)
        h = own if projection is None else own @ projection.t()
        dh = None
        if dx is not None or gradient.projection is not None:
            dh = dx if tokens is None and projection is None else torch.empty_like(h)
        _take(h, dh, tokens, column, softmax, gradient, grad, nll, options)
        if dh is not None:
            _backward_of_projection(dh, own, tokens, projection, gradient.projection, dx)
