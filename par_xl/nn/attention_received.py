"""How much attention each key receives: what the most_used compression keeps by, and what the paper plots."""

from collections.abc import Sequence

import torch
from torch import Tensor

from par_xl.ops.compressed_attention import Part, joint_scores

QUERIES = 64  # of a block: the weights of one block of queries are in memory at a time


@torch.no_grad()
def attention_received(q: Tensor, content_bias: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """The attention weights of a call, summed over queries and averaged over heads, ``(B, K)`` in fp32 (fp64 for fp64).

    The fused kernels sum over keys and keep no weights: this is a second pass over the projections that they had, a
    block of queries at a time. Dropout is left out. Each sequence's values sum to the number of queries.

    Args:
        q: ``(B, H, Q, D)``.
        content_bias: ``(H, D)``.
        parts: of the keys, in order: each ``k (B, H, n, D)``, ``r (H, P, D)``, ``position_bias (H, D)`` and the limits
            ``(left, right)`` of the distances that see each other, as in :func:`par_xl.rel_attention`.
        scale: of the scores.
    """
    n_keys = sum(part[0].shape[2] for part in parts)
    received = torch.zeros(q.shape[0], n_keys, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for begin in range(0, q.shape[2], QUERIES):
        block = q[:, :, begin : begin + QUERIES]
        scores = joint_scores(block, content_bias, parts, scale, first_query=begin, n_queries=q.shape[2])
        received += scores.softmax(3).sum(2).mean(1)
    return received
