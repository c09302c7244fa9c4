"""Adaptive softmax's CUDA kernels (csrc/cuda) in the places of two Triton ones; the rest is Triton's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from par_xl.ops.registry import _C, DTYPES

if TYPE_CHECKING:
    from par_xl.ops.adaptive_tables import Options


def sort(target: Tensor, bad: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``sort`` of kernels/adaptive_softmax_rows.py."""
    tails = len(options.ends) - 1
    head, tail, order = torch.empty_like(target), torch.empty_like(target), torch.zeros_like(target)
    offsets, ends = target.new_empty(tails + 1), torch.tensor(options.ends)  # the ends are read by the host
    arrays = (t.data_ptr() for t in (head, tail, order, offsets, bad))
    problem = _C.AdaptiveBuckets(
        target.data_ptr(), ends.data_ptr(), len(target), tails, options.ignore_index, options.descending, *arrays
    )
    counts = target.new_empty(_C.adaptive_bucket_counts_cuda(problem))
    _C.adaptive_buckets_cuda(problem, counts.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return head, tail, order, offsets.int()


def rows_in_place(
    z: Tensor, dz: Tensor, bias: Tensor | None, column: Tensor, grad: Tensor, nll: Tensor, options: Options
) -> None:
    """As ``rows_in_place`` of kernels/adaptive_softmax_rows.py."""
    addresses = (0 if t is None else t.data_ptr() for t in (bias, column, grad, nll))
    smoothing = options.label_smoothing, options.z_loss
    problem = _C.AdaptiveRows(z.data_ptr(), *z.shape, z.stride(0), *addresses, *smoothing, DTYPES[dz.dtype])
    _C.adaptive_rows_cuda(problem, torch.cuda.current_stream().cuda_stream)
