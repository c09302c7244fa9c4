"""Dropout, alone or after a ReLU, that makes its mask again in the backward instead of keeping it.

    y_i  = keep_i f(x_i) / (1 - p)                      f(x) = x or max(x, 0)
    dx_i = keep_i grad_i / (1 - p), or with the ReLU    dx_i = [y_i > 0] grad_i / (1 - p)

Element ``i = w Q + c`` of n, ``Q = n / 4`` rounded up to a multiple of 16, is kept if word w of Philox4x32-7 at the
counter c is at least ``2^32 p``: one evaluation serves four elements, and each word's elements are contiguous.

Srivastava et al.: Dropout (JMLR 2014).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from par_xl.ops.large_results import to_be_filled
from par_xl.ops.philox import draw_seeds, philox
from par_xl.ops.registry import _C, DTYPES, Op, acc_dtype, choose, first_derivative_only, no_cuda

ROUNDS = 7


def plane(size: int) -> int:
    """Q, the elements of each word."""
    return -(-size // 64) * 16


def threshold(p: float) -> int:
    """The smallest word that keeps its element."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_reference(x: Tensor, seed: Tensor, p: float, relu: bool) -> Tensor:
    """The specification, in plain PyTorch: fp32 arithmetic (fp64 for fp64), rounded once to x's dtype."""
    words = philox(seed, torch.arange(plane(x.numel()), device=x.device), ROUNDS)
    keep = (torch.cat(words)[: x.numel()] >= threshold(p)).view(x.shape)
    value = x.to(acc_dtype(x))
    return torch.where(keep, (value.relu() if relu else value) * (1 / (1 - p)), 0.0).to(x.dtype)


# x, grad and out: contiguous. With out, that of a forward with the ReLU, the seed is not read.
FORWARD = Op(
    "dropout_forward(Tensor x, Tensor seed, float p, bool relu, str backend) -> Tensor",
    lambda x, seed, p, relu, backend: torch.empty_like(x),
)
BACKWARD = Op(
    "dropout_backward(Tensor grad, Tensor seed, Tensor? out, float p, str backend) -> Tensor",
    lambda grad, seed, out, p, backend: torch.empty_like(grad),
)


@FORWARD.implement("native", lacks=no_cuda("dropout"))
def _forward_native(x, seed, p, relu):
    y = to_be_filled(torch.empty_like(x))
    sizes = x.numel(), plane(x.numel()), DTYPES[x.dtype]
    _C.dropout_cpu(x.data_ptr(), y.data_ptr(), seed.data_ptr(), *sizes, threshold(p), 1 / (1 - p), relu)
    return y


@BACKWARD.implement("native", lacks=no_cuda("dropout"))
def _backward_native(grad, seed, out, p):
    if out is None:
        return _forward_native(grad, seed, p, False)
    dx = to_be_filled(torch.empty_like(grad))
    _C.relu_dropout_backward_cpu(
        grad.data_ptr(), out.data_ptr(), dx.data_ptr(), grad.numel(), DTYPES[grad.dtype], 1 / (1 - p)
    )
    return dx


@FORWARD.implement("triton")
def _forward_triton(x, seed, p, relu):
    from par_xl.kernels.dropout import forward

    y = torch.empty_like(x)
    forward(x, seed, y, plane(x.numel()), threshold(p), 1 / (1 - p), relu, ROUNDS)
    return y


@BACKWARD.implement("triton")
def _backward_triton(grad, seed, out, p):
    from par_xl.kernels.dropout import relu_backward

    if out is None:
        return _forward_triton(grad, seed, p, False)
    dx = torch.empty_like(grad)
    relu_backward(grad, out, dx, 1 / (1 - p))
    return dx


class Dropout(torch.autograd.Function):
    """``Dropout.apply(x, seed, p, relu, backend)``; see :func:`dropout`."""

    @staticmethod
    def forward(ctx, x, seed, p, relu, backend):
        out = FORWARD(x, seed, p, relu, backend)
        ctx.save_for_backward(seed, out if relu else None)
        ctx.p, ctx.backend = p, backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        return BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.p, ctx.backend), None, None, None, None


def _check_seed(seed: Tensor, x: Tensor) -> None:
    if seed.shape != (1,):
        raise ValueError(f"seed must have shape (1,), not {tuple(seed.shape)}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, not {seed.dtype}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on {x.device} as x is, not on {seed.device}")


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    relu: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``F.dropout(x, p, training)``, or with ``relu`` ``F.dropout(F.relu(x), p, training)`` in one pass.

    No mask is kept for the backward, which makes it again from a seed, or, with ``relu``, reads it off the result.

    Args:
        x: any shape and strides; fp16, bf16, fp32 or fp64.
        p: probability of dropping an element, in ``[0, 1]``; those that stay are divided by ``1 - p``.
        training: False drops nothing.
        seed: ``(1,)`` int64 on x's device, of the mask, which is then the same on every backend. Default: from torch's
            generator of the device; "eager" is then torch's own dropout, with its own mask.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose.

    Returns:
        Like x.

    Raises:
        ValueError: a probability outside ``[0, 1]``, a seed of another shape or device, a backend that cannot run.
        TypeError: x is not floating point, or the seed not int64.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], not {p}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if seed is not None:
        _check_seed(seed, x)
    if not training or p == 0:
        return F.relu(x) if relu else x
    chosen = choose(FORWARD, backend, x)
    if p == 1:
        return F.dropout(x, 1.0)
    if chosen == "eager":
        return F.dropout(F.relu(x) if relu else x, p) if seed is None else dropout_reference(x, seed, float(p), relu)
    seed = draw_seeds(x.device) if seed is None else seed
    return Dropout.apply(x.contiguous(), seed, float(p), relu, chosen)
