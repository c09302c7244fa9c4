"""The mixture of a stochastic block: two branches with their residual connections and norms, and the input itself.

    out = w_0 N(x + a; gamma_0, beta_0) + w_1 N(x + f; gamma_1, beta_1) + w_2 x        over the last dimension
    N(s; gamma, beta) = n gamma + beta,  n = (s - mean(s)) rstd,  rstd = (var(s) + eps)^(-1/2)

    d_a = w_0 rstd_0 (h - mean(h) - n_0 mean(h n_0)),  h = grad gamma_0;  d_f likewise;  d_x = d_a + d_f + w_2 grad
    d_gamma_0 = w_0 sum(grad n_0),  d_beta_0 = w_0 sum(grad),  d_w_0 = sum(gamma_0 sum(grad n_0) + beta_0 sum(grad)),
    d_w_2 = sum(grad x)

Each pass reads every tensor once. The backward makes n_0 and n_1 again from x, a, f and a mean and an rstd a row.

Mandava, Migacz, Florea: Pay Attention when Required (arXiv 2009.04534).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import _C, DTYPES, Op, acc_dtype, choose, first_derivative_only, no_cuda


def mix_reference(
    x: Tensor, attended: Tensor, dense: Tensor, weights: Tensor, gamma_0: Tensor, beta_0: Tensor, gamma_1: Tensor,
    beta_1: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The specification, in plain PyTorch: ``(..., d)`` to ``(..., d)``, in fp32 (fp64 for fp64)."""
    dtype = acc_dtype(x.dtype)
    wide, a, f, w, g_0, b_0, g_1, b_1 = (
        t.to(dtype) for t in (x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1)
    )
    first = F.layer_norm(wide + a, g_0.shape, g_0, b_0, eps)
    second = F.layer_norm(wide + f, g_1.shape, g_1, b_1, eps)
    return (w[0] * first + w[1] * second + w[2] * wide).to(x.dtype)


def _fake_forward(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps, backend):
    return torch.empty_like(x), weights.new_empty(x.shape[0], 4)


def _fake_backward(grad, x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats, backend):
    d_parameters = weights.new_empty(4, x.shape[1])
    return *(torch.empty_like(t) for t in (x, attended, dense)), torch.empty_like(weights), d_parameters


# x, attended and dense: contiguous (rows, d); weights (3,), gammas and betas (d,), in fp32 (fp64 for fp64).
# stats (rows, 4): mean and rstd of x + attended, then of x + dense. d_parameters (4, d): in the order of the arguments.
FORWARD = Op(
    "mix_forward(Tensor x, Tensor attended, Tensor dense, Tensor weights, Tensor gamma_0, Tensor beta_0,"
    " Tensor gamma_1, Tensor beta_1, float eps, str backend) -> (Tensor out, Tensor stats)",
    _fake_forward,
)
BACKWARD = Op(
    "mix_backward(Tensor grad, Tensor x, Tensor attended, Tensor dense, Tensor weights, Tensor gamma_0, Tensor beta_0,"
    " Tensor gamma_1, Tensor beta_1, Tensor stats, str backend)"
    " -> (Tensor d_x, Tensor d_attended, Tensor d_dense, Tensor d_weights, Tensor d_parameters)",
    _fake_backward,
)


def _problem(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats):
    tensors = (x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats)
    return _C.Mix([t.data_ptr() for t in tensors], *x.shape, DTYPES[x.dtype])


@FORWARD.implement("native", lacks=no_cuda("mix"))
def _forward_native(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps):
    args = x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1
    out, stats = map(to_be_filled, _fake_forward(*args, eps, None))
    _C.mix_forward_cpu(_problem(*args, stats), eps, out.data_ptr())
    return out, stats


@BACKWARD.implement("native", lacks=no_cuda("mix"))
def _backward_native(grad, x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats):
    args = x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats
    results = tuple(map(to_be_filled, _fake_backward(grad, *args, None)))
    problem = _problem(*args)
    sums = weights.new_empty(_C.mix_parts_cpu(problem), 4, x.shape[1])
    _C.mix_backward_cpu(problem, grad.data_ptr(), sums.data_ptr(), [t.data_ptr() for t in results])
    return results


@FORWARD.implement("triton")
def _forward_triton(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps):
    from par_xl.kernels.mix import forward

    args = x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1
    out, stats = _fake_forward(*args, eps, None)
    forward(*args, eps, out, stats)
    return out, stats


@BACKWARD.implement("triton")
def _backward_triton(grad, x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats):
    from par_xl.kernels.mix import backward

    args = x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, stats
    results = _fake_backward(grad, *args, None)
    backward(grad, *args, *results)
    return results


class Mix(torch.autograd.Function):
    """``Mix.apply(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps, backend)``; see :func:`mix`."""

    @staticmethod
    def forward(ctx, x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps, backend):
        args = x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1
        out, stats = FORWARD(*args, eps, backend)
        ctx.save_for_backward(*args, stats)
        ctx.backend = backend
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        *gradients, d_parameters = BACKWARD(grad.contiguous(), *ctx.saved_tensors, ctx.backend)
        return *gradients, *d_parameters.unbind(0), None, None


def _check(x: Tensor, others: dict[str, Tensor], weights: Tensor, parameters: dict[str, Tensor]) -> None:
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension, not none")
    shapes = {
        "x": x.shape,
        **dict.fromkeys(others, x.shape),
        "weights": (3,),
        **dict.fromkeys(parameters, x.shape[-1:]),
    }
    for name, t in {"x": x, **others, "weights": weights, **parameters}.items():
        if t.shape != torch.Size(shapes[name]):
            raise ValueError(f"{name} must have shape {tuple(shapes[name])}, not {tuple(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, not {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, not on {t.device}")


def mix(
    x: Tensor,
    attended: Tensor,
    dense: Tensor,
    weights: Tensor,
    gamma_0: Tensor,
    beta_0: Tensor,
    gamma_1: Tensor,
    beta_1: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """A stochastic block's mixture of attention, dense and identity, fused with residual connections and norms.

    Equivalent to, in fp32 arithmetic whatever the dtype (fp64 for fp64)::

        weights[0] * F.layer_norm(x + attended, (d,), gamma_0, beta_0, eps)
        + weights[1] * F.layer_norm(x + dense, (d,), gamma_1, beta_1, eps) + weights[2] * x

    Args:
        x, attended, dense: the block's input and what its two branches add to it, ``(..., d)``; fp16, bf16, fp32 or
            fp64, any strides (a copy where they are not contiguous). Different dtypes are promoted, as by ``+``.
        weights: ``(3,)``, of any floating dtype.
        gamma_0, beta_0, gamma_1, beta_1: ``(d,)``, weight and bias of the branches' layer norms, of any floating dtype.
        eps: added to the variances.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose.

    Returns:
        ``(..., d)``, in the promoted dtype of ``x``, ``attended`` and ``dense``. Same input, same bits. Gradients for
        all tensors; a second derivative exists on the eager backend alone.

    Raises:
        ValueError: a wrong shape, device or backend.
        TypeError: a dtype that is not floating point.

    Source: arXiv 2009.04534; github.com/Jmkernes/PAR-Transformer-XL, StochasticBlock.
    """
    parameters = {"gamma_0": gamma_0, "beta_0": beta_0, "gamma_1": gamma_1, "beta_1": beta_1}
    _check(x, {"attended": attended, "dense": dense}, weights, parameters)
    dtype = torch.promote_types(x.dtype, torch.promote_types(attended.dtype, dense.dtype))
    x = x.to(dtype)
    chosen = choose(FORWARD, backend, x)
    if chosen == "eager":
        return mix_reference(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1, eps)
    if chosen == "native":  # Triton's kernels read branches of another dtype as they are
        attended, dense = attended.to(dtype), dense.to(dtype)
    rows = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, attended, dense))
    wide = (t.to(acc_dtype(dtype)).contiguous() for t in (weights, *parameters.values()))
    return Mix.apply(*rows, *wide, float(eps), chosen).view(x.shape)
