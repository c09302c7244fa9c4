"""The attention that each key receives, from the log-sum-exps that relative attention leaves behind.

    received[j] = sum_i exp(score[i, j] - lse_i)

The scores are those of rel_attention.py, computed again tile by tile and summed over the queries. lse may be that of a
softmax over more keys than these. Nothing of queries times keys is made.
"""

import torch
from torch import Tensor

from par_xl.ops.registry import _C, Op, acc_dtype, no_cuda
from par_xl.ops.rel_attention_inputs import kernel_call, no_fp64_on_a_gpu


def _fake(q, k, r, content_bias, position_bias, k_memory, *_):
    n_memory = 0 if k_memory is None else k_memory.shape[2]
    return q.new_empty(*q.shape[:2], n_memory + k.shape[2], dtype=acc_dtype(q))


# (B, H, K) in fp32 (fp64 for fp64). On a GPU a sequence whose key length lies outside 0..T gives NaN.
RECEIVED = Op(
    "rel_attention_received(Tensor q, Tensor k, Tensor r, Tensor content_bias, Tensor position_bias, Tensor? k_memory,"
    " Tensor? key_lengths, Tensor lse, int left, int right, int clamp_len, float scale, str backend) -> Tensor",
    _fake,
)


@RECEIVED.implement("native", lacks=no_cuda("rel_attention_received"))
def _received_native(q, k, r, content_bias, position_bias, k_memory, key_lengths, lse, *options):
    received, biases = _fake(q, k, r, content_bias, position_bias, k_memory), (content_bias, position_bias)
    # Values, a seed and dropout are not read.
    call = kernel_call(q, k, k, r, *biases, k_memory, k_memory, key_lengths, None, *options, 0.0)
    threads, size, _ = _C.rel_attention_cut_cpu(call, False)
    workspace = lse.new_empty(threads, size)
    _C.rel_attention_received_cpu(call, threads, workspace.data_ptr(), lse.data_ptr(), received.data_ptr())
    return received


@RECEIVED.implement("triton", lacks=no_fp64_on_a_gpu)
def _received_triton(*inputs):
    from par_xl.kernels.rel_attention_received import receive

    received = _fake(*inputs)
    receive(*inputs, received)
    return received


def attention_received(lse: Tensor, inputs: tuple, backend: str) -> Tensor:
    """``inputs`` are those of :class:`par_xl.RelAttention`, up to the scale; the result has no gradient."""
    q, k, _, r, content_bias, position_bias, k_memory, _, key_lengths, _, *options = inputs
    with torch.no_grad():
        return RECEIVED(q, k, r, content_bias, position_bias, k_memory, key_lengths, lse, *options[:4], backend)
