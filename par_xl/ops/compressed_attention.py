"""Attention over ``[compressed | memory | segment]`` in which the compressed steps have position rows of their own.

With C compressed keys and Q queries, query i and compressed key c are d = i + C - c slots apart, as if the compressed
steps stood directly in front of the segment, and row p = c - i + Q - 1 of r_compressed belongs to that distance:

    score[i, c] = scale * ((q_i + content_bias) . k_c + (q_i + compressed_bias) . r_compressed_p)
    score[i, j] = that of rel_attention for a key of memory and segment, with r and position_bias
    out_i       = sum over both of dropout(softmax(score[i, :])) v

Two calls of rel_attention's kernels, a = compressed and b = memory and segment, joined by their log-sum-exps; in the
backward each part is given the output and log-sum-exp of the whole:

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

Rae et al. (arXiv 1911.05507); sonnet v1 ``nets/transformer.py``, ``MultiheadAttention`` with two positional encodings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from par_xl.ops.philox import draw_seeds
from par_xl.ops.registry import acc_dtype, first_derivative_only, under_autocast, without_autocast
from par_xl.ops.rel_attention import (
    BACKWARD,
    FORWARD,
    choose_kernels,
    dropout_keep,
    masked_scores,
)
from par_xl.ops.rel_attention_inputs import UNLIMITED, bias_of, check_tensor, check_tensors
from par_xl.ops.rel_attention_received import attention_received

COMPRESSED = UNLIMITED, UNLIMITED, UNLIMITED  # every query sees every compressed key
RECENT = UNLIMITED, 0, UNLIMITED
Part = tuple[Tensor, Tensor, Tensor, tuple[int, int, int]]  # keys, position rows and bias, (left, right, clamp_len)


def joint_scores(q: Tensor, content_bias: Tensor, parts: Sequence[Part], scale: float) -> Tensor:
    """The scores ``(B, H, Q, K)`` of several parts of the keys side by side."""
    wide = acc_dtype(q)
    scores = []
    for part in parts:
        x, k, r, u, v = (x.to(wide) for x in (q, part[0], part[1], content_bias, part[2]))
        scores.append(masked_scores(x, k, r, u, v, None, 0, *part[3], scale))
    return torch.cat(scores, 3)


def compressed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor,
    k_memory: Tensor | None, v_memory: Tensor | None, k_compressed: Tensor, v_compressed: Tensor,
    r_compressed: Tensor, compressed_bias: Tensor, seeds: Tensor | None, scale: float, dropout_p: float,
    return_received: bool,
) -> Any:  # fmt: skip
    """The specification, in plain PyTorch: the scores of both parts side by side, and one softmax."""
    if k_memory is not None and v_memory is not None:
        k, v = torch.cat((k_memory, k), 2), torch.cat((v_memory, v), 2)
    parts = [(k_compressed, r_compressed, compressed_bias, COMPRESSED), (k, r, position_bias, RECENT)]
    weights = joint_scores(q, content_bias, parts, scale).softmax(3)
    received = weights.detach().sum(2) if return_received else None
    if seeds is not None:
        pieces = zip(weights.split([k_compressed.shape[2], k.shape[2]], 3), seeds.split(1), strict=True)
        offsets = ((x, seed, torch.arange(x.numel(), device=q.device).view(x.shape)) for x, seed in pieces)
        kept = [torch.where(dropout_keep(seed, at, dropout_p), x, 0.0) for x, seed, at in offsets]
        weights = torch.cat(kept, 3) / (1 - dropout_p)
    out = (weights @ torch.cat((v_compressed, v), 2).to(weights.dtype)).to(q.dtype)
    return out if received is None else (out, received)


class CompressedAttention(torch.autograd.Function):
    """The fused op, see :func:`compressed_attention`; with the log-sum-exps as in RelAttention.

    ``CompressedAttention.apply(q, k, v, r, content_bias, position_bias, k_memory or None, v_memory or None,
    k_compressed, v_compressed, r_compressed, compressed_bias, seeds or None, scale, dropout_p, backend)``
    """

    @staticmethod
    def forward(ctx, *args):
        tensors, options = args[:13], args[13:]
        (out_a, lse_a), (out_b, lse_b) = (FORWARD(*part, *options) for part in _parts(*tensors))
        lse = torch.logaddexp(lse_a, lse_b)
        share_a, share_b = ((x - lse).exp()[..., None] for x in (lse_a, lse_b))
        out = (out_a * share_a + out_b * share_b).to(out_a.dtype)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.options = options
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad, _):
        *tensors, out, lse = ctx.saved_tensors
        a, b = (BACKWARD(grad, *part[:10], out, lse, True, *part[10:], *ctx.options) for part in _parts(*tensors))
        memory = (None, None) if tensors[6] is None else b[6:]
        gradients = a[0] + b[0], *b[1:4], a[4] + b[4], b[5], *memory, *a[1:4], a[5]
        return *gradients, *[None] * 4


def _parts(
    q, k, v, r, content_bias, position_bias, k_memory, v_memory, k_compressed, v_compressed, r_compressed,
    compressed_bias, seeds,
):  # fmt: skip
    """The two calls of rel_attention: their tensors, the last of which is the seed, and their limits."""
    seed_a, seed_b = (None, None) if seeds is None else seeds.split(1)
    none = None, None, None  # memory and lengths
    compressed = q, k_compressed, v_compressed, r_compressed, content_bias, compressed_bias, *none, seed_a
    recent = q, k, v, r, content_bias, position_bias, k_memory, v_memory, None, seed_b
    return (*compressed, *COMPRESSED), (*recent, *RECENT)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    compressed: tuple[Tensor, Tensor],
    compressed_r: Tensor,
    compressed_bias: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_received: bool = False,
    backend: str | None = None,
) -> Any:
    """Causal :func:`par_xl.rel_attention` with compressed steps in front, which have position rows of their own.

    Nothing is concatenated and nothing of queries times keys is made: each part is one call of rel_attention's kernels.

    Args:
        q, k, v, r, content_bias, position_bias, memory, scale, dropout_p, return_received, backend: as in
            rel_attention, without the compressed steps; these come first in the attention received.
        compressed: their keys and values, each ``(B, H, C, D)`` with ``C > 0``.
        compressed_r: ``(H, C + Q - 1, D)``, the rows of the distances C + Q - 1 to 1.
        compressed_bias: ``(H, D)``, added to the queries of their product. Default: zeros.

    Returns:
        ``(B, H, Q, D)`` in q's dtype, or in torch.autocast's as in rel_attention; with ``return_received`` that and the
        attention received. Same input, same bits. A second derivative exists on the eager backend alone.

    Raises:
        ValueError: a wrong rank, shape, device, scale, probability or backend.
        TypeError: a dtype that is not floating point, or two different ones, as in rel_attention.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0 or not 0 <= dropout_p < 1:
        raise ValueError(f"scale must not be negative and dropout_p lie in [0, 1), not {scale} and {dropout_p}")
    q, k, v, r, compressed_r, *old = under_autocast(q, k, v, r, compressed_r, *(memory or ()))
    own = under_autocast(*compressed)
    check_tensors(q, k, v, r, old)
    batch, heads, n_queries, width = q.shape
    n_compressed = own[0].shape[-2]
    if n_compressed == 0:
        raise ValueError(f"compressed must hold keys, not shape {tuple(own[0].shape)}")
    for i, x in enumerate(own):
        check_tensor(f"compressed[{i}]", x, q, (batch, heads, n_compressed, width), "(B, H, C, D)")
    wanted = heads, n_compressed + n_queries - 1, width
    check_tensor("compressed_r", compressed_r, q, wanted, "(H, C + Q - 1, D)")
    n_keys = k.shape[2] + (old[0].shape[2] if old else 0)
    if r.shape[1] < n_keys or n_keys < n_queries:
        raise ValueError(f"r must have at least {n_keys} positions and k as many keys as queries, not {r.shape[1]}")
    biases = bias_of("content_bias", content_bias, q), bias_of("position_bias", position_bias, q)
    own_rows = compressed_r, bias_of("compressed_bias", compressed_bias, q)
    (k_memory, v_memory), (k_compressed, v_compressed) = old or (None, None), own
    given = q, k, v, r, *biases, k_memory, v_memory, k_compressed, v_compressed, *own_rows
    seeds = draw_seeds(q.device, 2) if dropout_p > 0 else None
    chosen = choose_kernels(backend, *given, return_received=return_received)
    options = scale, float(dropout_p)
    if chosen == "eager":
        with without_autocast(q):
            return compressed_attention_reference(*given, seeds, *options, return_received)
    tensors = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in given)
    inputs = *tensors, seeds
    out, lse = CompressedAttention.apply(*inputs, *options, chosen)
    if not return_received:
        return out
    parts = ((*part, *options) for part in _parts(*inputs))
    return out, torch.cat([attention_received(lse, part, chosen) for part in parts], 2)
