"""Relative-position attention with memory, as in Transformer-XL.

With K = M + T keys (memory, then segment), query i and key j are d = i + (K - Q) - j steps apart, and row
p = max(far - d, 0) of r belongs to that distance, where far = min(K - 1, clamp_len); without a clamp p = j - i + Q - 1:

    score[i, j] = scale * ((q_i + content_bias) . k_j + (q_i + position_bias) . r_p)    where -right <= d <= left
    out_i       = sum_j dropout(softmax_j(score[i, :])) v_j
    received_j  = sum_i softmax_j(score[i, :])

    delta_i     = grad_i . out_i
    dS[i, j]    = P[i, j] * (keep[i, j] / (1 - dropout_p) * grad_i . v_j - delta_i) * scale,    P = exp(score - lse)
    dq = dS k + dBD r,  dk = dS^T (q + content_bias),  dr = dBD^T (q + position_bias),  dBD[i, p] = sum_j of p dS[i, j]

Dai et al.: Transformer-XL (arXiv 1901.02860); Gulati et al.: Conformer (arXiv 2005.08100).
"""

from typing import Any

import torch
from torch import Tensor

from par_xl.ops.philox import draw_seeds, philox
from par_xl.ops.registry import (
    _C,
    Op,
    acc_dtype,
    choose,
    distinct,
    first_derivative_only,
    under_autocast,
    without_autocast,
)
from par_xl.ops.rel_attention_inputs import (
    bias_of,
    check_key_lengths,
    check_length_values,
    check_tensors,
    clamp_of,
    head_rows,
    kernel_call,
    limits_of,
    no_fp64_on_a_gpu,
)
from par_xl.ops.rel_attention_received import RECEIVED, attention_received

WIDEST = 128  # head width of the CUDA kernel


def masked_scores(
    q: Tensor, k: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor,
    key_lengths: Tensor | None, n_memory: int, left: int, right: int, clamp_len: int, scale: float,
) -> Tensor:  # fmt: skip
    """The scores ``(B, H, Q, K)``, by distance; -inf where a pair is not visible. ``k`` holds memory and segment."""
    n_queries, n_keys, n_positions = q.shape[2], k.shape[2], r.shape[1]
    i = torch.arange(n_queries, device=q.device)[:, None]
    j = torch.arange(n_keys, device=q.device)
    distance = i + (n_keys - n_queries) - j
    visible = ((-right <= distance) & (distance <= left))[None]  # (1 or B, Q, K)
    ends = torch.full((1,), n_keys, device=q.device) if key_lengths is None else n_memory + key_lengths
    visible = visible & (j < ends[:, None, None])
    # where, not a product: whatever stands in rows that no pair uses, NaN included, must not reach sums or gradients.
    q = torch.where(visible.any(2)[:, None, :, None], q, 0.0)
    k = torch.where(visible.any(1)[:, None, :, None], k, 0.0)
    far = min(n_keys - 1, clamp_len)
    row_distance = far - torch.arange(n_positions, device=q.device)
    farthest = torch.where(row_distance == far, n_keys - 1, row_distance).clamp(max=left)  # that the row belongs to
    seen = (farthest[:, None] > n_keys - n_queries - ends) & (ends > 0)
    used = (-right <= farthest) & (row_distance <= farthest) & seen.any(1)
    by_row = (q + position_bias[:, None]) @ torch.where(used[:, None], r, 0.0).mT  # (B, H, Q, P)
    row = (far - distance).clamp(0, n_positions - 1).expand(*q.shape[:2], -1, -1)
    scores = scale * ((q + content_bias[:, None]) @ k.mT + by_row.gather(3, row))
    return torch.where(visible[:, None], scores, -torch.inf)


def dropout_keep(seed: Tensor, offset: Tensor, dropout_p: float) -> Tensor:
    """Whether dropout keeps the element at a 64-bit ``offset``: Triton's ``tl.rand(seed, offset) >= dropout_p``."""
    c0 = philox(seed, offset)[0]
    uniform = torch.where(c0 < 2**31, c0, 0xFFFFFFFF - c0).float() * 4.6566127342e-10
    return uniform >= dropout_p


def rel_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor,
    k_memory: Tensor | None, v_memory: Tensor | None, key_lengths: Tensor | None, seed: Tensor | None,
    left: int, right: int, clamp_len: int, scale: float, dropout_p: float, return_received: bool = False,
) -> Any:  # fmt: skip
    """The specification, in plain PyTorch on any device: fp32 arithmetic (fp64 for fp64), rounded once to q's dtype."""
    dtype, wide, n_memory = q.dtype, acc_dtype(q), 0
    if k_memory is not None and v_memory is not None:
        n_memory = k_memory.shape[2]
        k, v = torch.cat((k_memory, k), 2), torch.cat((v_memory, v), 2)
    q, k, v, r, content_bias, position_bias = (x.to(wide) for x in (q, k, v, r, content_bias, position_bias))
    limits = left, right, clamp_len
    scores = masked_scores(q, k, r, content_bias, position_bias, key_lengths, n_memory, *limits, scale)
    visible = scores.detach() != -torch.inf
    real_row = visible.any(3, keepdim=True)
    probabilities = torch.where(real_row, scores, 0.0).softmax(3)
    received = torch.where(real_row, probabilities.detach(), 0.0).sum(2) if return_received else None
    if dropout_p > 0:
        assert seed is not None
        offset = torch.arange(scores.numel(), device=q.device).view(scores.shape)
        keep = dropout_keep(seed, offset, dropout_p)
        probabilities = torch.where(keep, probabilities / (1 - dropout_p), 0.0)
    v = torch.where(visible.any(2)[..., None], v, 0.0)
    out = torch.where(real_row, probabilities @ v, 0.0).to(dtype)
    if key_lengths is not None:  # what a GPU can do about a bad length without a synchronisation
        bad = (key_lengths < 0) | (key_lengths > k.shape[2] - n_memory)
        out = torch.where(bad[:, None, None, None], torch.nan, out)
    return out if received is None else (out, received)


def _fake_forward(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=acc_dtype(q))


def _fake_backward(grad, q, k, v, r, content_bias, position_bias, k_memory, v_memory, *_):
    inputs = (q, k, v, r, content_bias, position_bias, k_memory, v_memory)
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x) for x in inputs)


# lse (B, H, Q) is the natural logarithm of the sum of exp(score), -inf for a row without a visible key, in fp32 (fp64
# for fp64). seed (1,) is None without dropout. Every tensor but grad has a contiguous last dimension. An absent memory
# has empty gradients. On a GPU a sequence whose key length lies outside 0..T gives NaN. With `part`, the backward
# is given out and lse of a softmax over more keys than these.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor r, Tensor content_bias, Tensor position_bias, Tensor? k_memory,"
    " Tensor? v_memory, Tensor? key_lengths, Tensor? seed"
)
_OPTIONS = "int left, int right, int clamp_len, float scale, float dropout_p, str backend"
FORWARD = Op(f"rel_attention_forward({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)", _fake_forward)
BACKWARD = Op(
    f"rel_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse, bool part, {_OPTIONS}) -> (Tensor dq,"
    " Tensor dk, Tensor dv, Tensor dr, Tensor d_content_bias, Tensor d_position_bias, Tensor dk_memory,"
    " Tensor dv_memory)",
    _fake_backward,
)


def _half_on_a_gpu(device: str, dtype: torch.dtype) -> str:
    half = dtype in (torch.float16, torch.bfloat16)
    return "" if device == "cpu" or half else f"rel_attention's CUDA kernel takes fp16 and bf16, not {dtype}"


def _no_backward_on_a_gpu(device: str, dtype: torch.dtype) -> str:
    return "" if device == "cpu" else 'rel_attention has no CUDA backward, but "triton" has; torch.no_grad() needs none'


@FORWARD.implement("native", lacks=_half_on_a_gpu, by_name=("cuda",))
def _forward_native(*inputs):
    q, k, key_lengths = inputs[0], inputs[1], inputs[8]
    check_length_values(key_lengths, k.shape[2])
    call = kernel_call(*inputs)
    out, lse = _fake_forward(q)
    if q.is_cuda:
        stream = torch.cuda.current_stream().cuda_stream
        _C.rel_attention_forward_cuda(call, head_rows(out), lse.data_ptr(), stream)
        return out, lse
    threads, size, _ = _C.rel_attention_cut_cpu(call, False)
    workspace = lse.new_empty(threads, size)
    _C.rel_attention_forward_cpu(call, threads, workspace.data_ptr(), head_rows(out), lse.data_ptr())
    return out, lse


@BACKWARD.implement("native", lacks=_no_backward_on_a_gpu)
def _backward_native(grad, *inputs):
    if grad.is_cuda:  # a call of RelAttention or of the registered op itself
        raise RuntimeError(_no_backward_on_a_gpu("cuda", grad.dtype))
    tensors, (out, lse, part), options = inputs[:10], inputs[10:13], inputs[13:]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    call = kernel_call(*tensors, *options)
    gradients = _fake_backward(grad, *tensors)
    dq, dk, dv, dr, d_content_bias, d_position_bias, dk_memory, dv_memory = gradients
    threads, size, parts = _C.rel_attention_cut_cpu(call, True)
    workspace = lse.new_empty(threads, size)
    heads, positions, width = dr.shape
    # One summand for each part of the batch; a single one may be the gradient itself.
    padded = -(-width // 16) * 16
    in_place = parts == 1 and padded == width and dr.dtype == lse.dtype and dr.is_contiguous()
    dr_parts = dr[None] if in_place else lse.new_empty(parts, heads, positions, padded)
    d_biases = lse.new_empty(parts, heads, 2, padded)
    d_keys_values = tuple(head_rows(x) for x in (dk, dv, dk_memory, dv_memory))
    whole = (head_rows(out), lse.data_ptr()) if part else (head_rows(None), 0)
    addresses = dr_parts.data_ptr(), d_biases.data_ptr()
    _C.rel_attention_backward_cpu(
        call, threads, workspace.data_ptr(), *whole, head_rows(grad), head_rows(dq), d_keys_values, *addresses
    )
    if not in_place:
        dr.copy_(dr_parts.sum(0)[..., :width])
    d_content_bias.copy_(d_biases.sum(0)[:, 0, :width])
    d_position_bias.copy_(d_biases.sum(0)[:, 1, :width])
    return gradients


@FORWARD.implement("triton", lacks=no_fp64_on_a_gpu)
def _forward_triton(*inputs):
    from par_xl.kernels.rel_attention import forward

    check_length_values(inputs[8], inputs[1].shape[2])
    out, lse = _fake_forward(inputs[0])
    forward(*inputs, out, lse)
    return out, lse


@BACKWARD.implement("triton", lacks=no_fp64_on_a_gpu)
def _backward_triton(grad, *inputs):
    from par_xl.kernels.rel_attention_backward import backward

    gradients = _fake_backward(grad, *inputs)
    backward(grad, *inputs, *gradients)
    return gradients


class RelAttention(torch.autograd.Function):
    """The fused op, see :func:`rel_attention`; with the log-sum-exp of each query's scores, ``(B, H, Q)``, not
    differentiable.

    ``RelAttention.apply(q, k, v, r, content_bias, position_bias, k_memory or None, v_memory or None,
    key_lengths or None, seed or None, left, right, clamp_len, scale, dropout_p, backend)``
    """

    @staticmethod
    def forward(ctx, *args):
        out, lse = FORWARD(*args)
        ctx.save_for_backward(*args[:10], out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.options = args[10:]
        return out, lse

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad, _):
        gradients = BACKWARD(grad, *ctx.saved_tensors, False, *ctx.options)
        wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad[:8], strict=True))
        return *wanted, *[None] * 8


def choose_kernels(backend: str | None, q: Tensor, *others: Tensor | None, return_received: bool = False) -> str:
    """The backend for these inputs; an error where the one asked for by name lacks what they need."""
    chosen = choose(FORWARD, backend, q)
    if return_received:
        choose(RECEIVED, chosen, q)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others)):
        choose(BACKWARD, chosen, q)
    if chosen == "native" and q.is_cuda and q.shape[3] > WIDEST:
        raise ValueError(f'backend="native" takes widths up to {WIDEST} on cuda, not {q.shape[3]}; "triton" takes any')
    return chosen


def rel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    clamp_len: int | None = None,
    return_received: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention with relative positions over memory and segment: softmax of content plus position scores, times values.

    With ``j`` counted over memory, then segment, ``K = M + T``, ``d = i + (K - Q) - j`` and ``far = K - 1``, or
    ``min(K - 1, clamp_len)``::

        score[i, j] = scale * ((q[i] + content_bias) . k[j] + (q[i] + position_bias) . r[max(far - d, 0)])
        out[i] = sum_j dropout(softmax_j(score[i, :]))[j] * v[j]

    Equivalent, for a causal language model without a clamp (``P == K``), to this, which allocates several
    ``(B, H, Q, K)`` tensors::

        k, v = (torch.cat((m, x), dim=2) for m, x in zip(memory, (k, v)))
        position = F.pad((q + position_bias[:, None]) @ r.mT, (1, 0)).view(B, H, K + 1, Q)[:, :, 1:].reshape(B, H, Q, K)
        score = ((q + content_bias[:, None]) @ k.mT + position) * scale
        future = torch.ones(Q, K, dtype=torch.bool).triu(1 + K - Q)
        out = score.masked_fill(future, -torch.inf).softmax(3) @ v

    Args:
        q: queries, ``(B, H, Q, D)``; fp16, bf16, fp32 or fp64; arithmetic is fp32 (fp64 for fp64). Any strides, as of
            every tensor here: ``[len, batch, head, width]`` permuted is fine (a last dimension that is not contiguous
            costs a copy).
        k, v: keys and values of the segment, ``(B, H, T, D)``.
        r: position rows, ``(H, P, D)``; row ``far - d`` belongs to distance ``d``, so row ``far`` is distance 0, and
            row 0 every distance from ``far`` on. ``P >= far + 1 + min(Q - 1, right)``: without a clamp ``K`` for a
            causal language model, ``K + Q - 1`` for a bidirectional one.
        content_bias, position_bias: ``(H, D)``, added to the queries of the two products (u and v in the papers); in
            q's dtype or fp32, which is then rounded to q's dtype. Default: zeros.
        memory: keys and values in front of the segment's, each ``(B, H, M, D)``; never concatenated to them.
        causal: whether a query sees only keys at ``d >= 0``.
        window: ``(left, right)`` keeps ``-right <= d <= left``; None is unlimited; ``left = -1`` with ``causal`` keeps
            nothing. Transformer-XL's ``same_length`` is ``(mem_len - 1, 0)`` in the original's PyTorch code and
            ``(mem_len, 0)`` in its TensorFlow code.
        key_lengths: ``(B,)`` int32 or int64, the number of real keys of each segment; the other keys and values may
            hold anything, NaN included, and get gradient 0.
        scale: factor of the scores; default: ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight, in ``[0, 1)``; the weights that stay are divided by
            ``1 - dropout_p``. The mask follows torch's generator of q's device and is the same on every backend.
        clamp_len: distances beyond it count as it, and have no rows in ``r``: Transformer-XL's ``clamp_len``. In C++
            and Triton keys that far away cost no product with positions. Negative distances, of keys ahead, are not
            clamped. Default: none is.
        return_received: also return the attention that each key received: the weights summed over the queries, before
            dropout, ``(B, H, K)`` in fp32 (fp64 for fp64), without a gradient. The kernels compute it from the
            forward's log-sum-exps, without a tensor of queries times keys.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose. On a GPU
            "native" is a forward alone, for fp16 and bf16 and D up to 128, and not in "auto": no GPU has run it yet.

    Returns:
        ``(B, H, Q, D)`` in q's dtype; with ``return_received`` that and the attention received. Under torch.autocast in
        that dtype, to which all floats but fp64 are rounded, as by torch's scaled_dot_product_attention. A query that
        sees no key gives 0 and no gradient. Same input, same bits. A second derivative exists on the eager backend
        alone.

    Raises:
        ValueError: a wrong rank, shape, device, window, scale, length, probability, clamp or backend, or one that has
            no kernels for the call (a call that needs a gradient, on "native" and a GPU). On a GPU a length outside
            0..T gives NaN for its sequence instead.
        TypeError: a dtype that is not floating point, or two different ones (under torch.autocast, fp64 beside
            others); a clamp that is not an int.

    Source: arXiv 1901.02860 (github.com/kimiyoung/transformer-xl, RelPartialLearnableMultiHeadAttn), arXiv 2005.08100.
    """
    left, right = limits_of(causal, window)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale < 0:
        raise ValueError(f"scale must not be negative, not {scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), not {dropout_p}")
    q, k, v, r, *old = under_autocast(q, k, v, r, *(memory or ()))
    check_tensors(q, k, v, r, old)
    k_memory, v_memory = old or (None, None)
    content_bias, position_bias = bias_of("content_bias", content_bias, q), bias_of("position_bias", position_bias, q)
    n_keys = k.shape[2] + (0 if k_memory is None else k_memory.shape[2])
    clamp = clamp_of(clamp_len)
    needed = min(n_keys, clamp + 1) + min(q.shape[2] - 1, right)
    if r.shape[1] < needed:
        clamped = "" if clamp_len is None else f" and clamp_len {clamp_len}"
        raise ValueError(f"r must have at least {needed} positions for {n_keys} keys{clamped}, not {r.shape[1]}")
    if key_lengths is not None:
        check_key_lengths(key_lengths, q)
        key_lengths = key_lengths.long().contiguous()
    seed = draw_seeds(q.device) if dropout_p > 0 else None
    options = left, right, clamp, scale, float(dropout_p)
    given = q, k, v, r, content_bias, position_bias, k_memory, v_memory
    chosen = choose_kernels(backend, *given, return_received=return_received)
    if chosen == "eager":
        check_length_values(key_lengths, k.shape[2])
        with without_autocast(q):
            return rel_attention_reference(*given, key_lengths, seed, *options, return_received)
    tensors = distinct(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in given)
    inputs = *tensors, key_lengths, seed, *options
    out, lse = RelAttention.apply(*inputs, chosen)
    return (out, attention_received(lse, inputs, chosen)) if return_received else out
