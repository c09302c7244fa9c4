"""AR and TAR: activation regularisation and temporal activation regularisation.

    loss = alpha * mean(output[b, t]^2) + beta * mean((raw[b, t] - raw[b, t-1])^2)

    d_output[b, t] = grad * 2 alpha / n_steps * output[b, t]
    d_raw[b, t]    = grad * 2 beta / n_pairs * ((raw[b, t] - raw[b, t-1]) [t > 0] - (raw[b, t+1] - raw[b, t]) [t < T-1])

Merity, McCann, Socher: Revisiting Activation Regularization for Language RNNs (arXiv 1708.01009).
"""

from typing import Any

import torch
from torch import Tensor

from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import _C, DTYPES, Op, acc_dtype, choose, first_derivative_only, host_can_look, rows


def ar_tar_reference(output: Tensor, raw: Tensor, lengths: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The specification, in plain PyTorch: ``(B, T, d)`` in, 0-d out, in fp32 (fp64 for fp64)."""
    squares = output.to(acc_dtype(output)).square()
    steps = raw.to(acc_dtype(output)).diff(dim=1).square()
    if lengths is None:
        return alpha * squares.sum() / max(squares.numel(), 1) + beta * steps.sum() / max(steps.numel(), 1)
    time = torch.arange(output.shape[1], device=output.device)
    real = (time < lengths[:, None])[..., None]
    # where, not a product: whatever stands in the padding, NaN included, must not reach the sum.
    squares = torch.where(real, squares, 0.0)
    steps = torch.where(real[:, 1:], steps, 0.0)
    n_steps = (real.sum() * output.shape[2]).clamp(min=1).to(squares.dtype)
    n_pairs = (real[:, 1:].sum() * output.shape[2]).clamp(min=1).to(steps.dtype)
    loss = alpha * squares.sum() / n_steps + beta * steps.sum() / n_pairs
    bad = (lengths < 0) | (lengths > output.shape[1])
    return torch.where(bad.any(), torch.nan, loss)  # what a GPU can do without a synchronisation


def _accumulator(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=acc_dtype(x))


def _fake_forward(output, raw, lengths, alpha, beta, backend):
    return _accumulator(output), _accumulator(output, 2)


def _fake_backward(grad, output, raw, lengths, scale, need_output, need_raw, backend):
    d_output = torch.empty_like(output) if need_output else output.new_empty(0)
    d_raw = torch.empty_like(raw) if need_raw and raw is not None else output.new_empty(0)
    return d_output, d_raw


# raw None stands for output itself. scale is (2 alpha / n_steps, 2 beta / n_pairs).
FORWARD = Op(
    "ar_tar_forward(Tensor output, Tensor? raw, Tensor? lengths, float alpha, float beta, str backend)"
    " -> (Tensor loss, Tensor scale)",
    _fake_forward,
)
BACKWARD = Op(
    "ar_tar_backward(Tensor grad, Tensor output, Tensor? raw, Tensor? lengths, Tensor scale, bool need_output,"
    " bool need_raw, str backend) -> (Tensor d_output, Tensor d_raw)",
    _fake_backward,
)


def _problem(output: Tensor, raw: Tensor | None, lengths: Tensor | None) -> Any:
    address = 0 if lengths is None else lengths.data_ptr()
    return _C.ArTar(rows(output), rows(raw), address, *output.shape, DTYPES[output.dtype])


@FORWARD.implement("native")
def _forward_native(output, raw, lengths, alpha, beta):
    _check_length_values(lengths, output.shape[1])
    problem = _problem(output, raw, lengths)
    loss, scale = _accumulator(output), _accumulator(output, 2)
    if output.is_cuda:
        sums = _accumulator(output, 2 * _C.ar_tar_parts_cuda(problem))
        stream = torch.cuda.current_stream().cuda_stream
        _C.ar_tar_forward_cuda(problem, alpha, beta, sums.data_ptr(), loss.data_ptr(), scale.data_ptr(), stream)
    else:
        sums = torch.empty(2 * _C.ar_tar_parts_cpu(problem), dtype=torch.float64)
        _C.ar_tar_forward_cpu(problem, alpha, beta, sums.data_ptr(), loss.data_ptr(), scale.data_ptr())
    return loss, scale


@BACKWARD.implement("native")
def _backward_native(grad, output, raw, lengths, scale, need_output, need_raw):
    d_output, d_raw = map(to_be_filled, _fake_backward(grad, output, raw, lengths, scale, need_output, need_raw, None))
    args = _problem(output, raw, lengths), grad.data_ptr(), scale.data_ptr(), rows(d_output), rows(d_raw)
    if output.is_cuda:
        _C.ar_tar_backward_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        _C.ar_tar_backward_cpu(*args)
    return d_output, d_raw


@FORWARD.implement("triton")
def _forward_triton(output, raw, lengths, alpha, beta):
    from par_xl.kernels.ar_tar import forward

    _check_length_values(lengths, output.shape[1])
    loss, scale = _accumulator(output), _accumulator(output, 2)
    forward(output, raw, lengths, alpha, beta, loss, scale)
    return loss, scale


@BACKWARD.implement("triton")
def _backward_triton(grad, output, raw, lengths, scale, need_output, need_raw):
    from par_xl.kernels.ar_tar import backward

    d_output, d_raw = _fake_backward(grad, output, raw, lengths, scale, need_output, need_raw, None)
    backward(grad, output, raw, lengths, scale, d_output, d_raw)
    return d_output, d_raw


class ArTarLoss(torch.autograd.Function):
    """``ArTarLoss.apply(output, raw or None, lengths or None, alpha, beta, backend)``; see :func:`ar_tar_loss`."""

    @staticmethod
    def forward(ctx, output, raw, lengths, alpha, beta, backend):
        loss, scale = FORWARD(output, raw, lengths, alpha, beta, backend)
        ctx.save_for_backward(output, raw, lengths, scale)
        ctx.backend = backend
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        output, raw, lengths, scale = ctx.saved_tensors
        need_output, need_raw = ctx.needs_input_grad[:2]
        d_output, d_raw = BACKWARD(grad, output, raw, lengths, scale, need_output, need_raw, ctx.backend)
        return d_output if need_output else None, d_raw if need_raw else None, None, None, None, None


def _check(output: Tensor, raw: Tensor | None, lengths: Tensor | None) -> None:
    if output.dim() != 3:
        raise ValueError(f"output must have 3 dimensions, not shape {tuple(output.shape)}")
    if not output.is_floating_point():
        raise TypeError(f"output must be floating point, not {output.dtype}")
    if raw is not None:
        if raw.shape != output.shape:
            raise ValueError(f"raw_output must have the shape of output {tuple(output.shape)}, not {tuple(raw.shape)}")
        if raw.dtype != output.dtype:
            raise TypeError(f"raw_output must have the dtype of output {output.dtype}, not {raw.dtype}")
        if raw.device != output.device:
            raise ValueError(f"raw_output must be on {output.device} as output is, not on {raw.device}")


def _check_lengths(lengths: Tensor, output: Tensor) -> None:
    batch = output.shape[0]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one for each sequence, not {tuple(lengths.shape)}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, not {lengths.dtype}")
    if lengths.device != output.device:
        raise ValueError(f"lengths must be on {output.device} as output is, not on {lengths.device}")


def _check_length_values(lengths: Tensor | None, steps: int) -> None:
    if lengths is not None and host_can_look(lengths):
        for n in lengths.tolist():
            if not 0 <= n <= steps:
                raise ValueError(f"lengths must lie between 0 and {steps}, the number of time steps, not {n}")


def ar_tar_loss(
    output: Tensor,
    raw_output: Tensor | None = None,
    alpha: float = 2.0,
    beta: float = 1.0,
    *,
    lengths: Tensor | None = None,
    batch_first: bool = True,
    backend: str | None = None,
) -> Tensor:
    """AR plus TAR in one pass: ``alpha * mean(output^2) + beta * mean((raw_output[:, 1:] - raw_output[:, :-1])^2)``.

    Equivalent to, in fp32 arithmetic whatever the dtype (fp64 for fp64)::

        alpha * output.pow(2).mean() + beta * raw_output.diff(dim=1).pow(2).mean()

    Args:
        output: the last layer's output after dropout, ``(B, T, d)``, or ``(T, B, d)`` with ``batch_first=False``;
            fp16, bf16, fp32 or fp64, any strides (a last dimension that is not contiguous costs a copy).
        raw_output: the same before dropout, of the same shape and dtype; default: ``output``, which is then read once.
        alpha: weight of AR (awd-lstm-lm: 2).
        beta: weight of TAR (awd-lstm-lm: 1).
        lengths: ``(B,)`` int32 or int64, the number of real steps of each sequence; both means then run over real
            steps (a pair counts when both of its steps are real) and the padding gets gradient 0, whatever it holds.
        batch_first: whether the batch is the first dimension.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose.

    Returns:
        A 0-d tensor, fp32 (fp64 for fp64). A mean over nothing is 0: TAR at T = 1, both for an empty batch.
        Same input, same bits. A second derivative exists on the eager backend alone.

    Raises:
        ValueError: a wrong rank, shape, device, length or backend. On a GPU a length outside 0..T gives NaN instead.
        TypeError: a dtype that is not floating point, or two different ones.

    Source: arXiv 1708.01009; awd-lstm-lm main.py (AR on the dropped output, TAR on the raw one, last layer).
    """
    raw = None if raw_output is output else raw_output
    _check(output, raw, lengths)
    if not batch_first:
        output, raw = output.transpose(0, 1), None if raw is None else raw.transpose(0, 1)
    if lengths is not None:
        _check_lengths(lengths, output)
    chosen = choose(FORWARD, backend, output)
    if chosen == "eager":
        _check_length_values(lengths, output.shape[1])
        return ar_tar_reference(output, output if raw is None else raw, lengths, alpha, beta)
    output = output if output.stride(2) == 1 else output.contiguous()
    raw = raw if raw is None or raw.stride(2) == 1 else raw.contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    return ArTarLoss.apply(output, raw, lengths, float(alpha), float(beta), chosen)
