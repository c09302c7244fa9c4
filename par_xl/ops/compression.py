"""Compression of a memory: every group of ``rate`` consecutive steps becomes one.

    mean          out[b, n] = mean over j < rate of memory[b, n rate + j]
    max           the same with the maximum; its gradient goes to the first step that attains it
    conv          out[b, n] = bias + sum over j of weight[:, :, j] memory[b, n rate + j]
    dilated_conv  conv of the last x, where each layer takes x[b, t] to
                  relu(bias + weight[:, :, 0] x[b, t - dilation] + weight[:, :, 1] x[b, t])
    most_used     the N / rate steps of the largest usage, in time order

Rae et al.: Compressive Transformers for Long-Range Sequence Modelling (arXiv 1911.05507), section 3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import _C, DTYPES, Op, choose, first_derivative_only, rows

# The modes that have kernels, and their codes in csrc/ops.h; a convolution is a matrix product, which is torch's.
MODES = {"mean": 0, "max": 1, "most_used": 2}
CONVOLUTIONS = ("conv", "dilated_conv")


def compress_reference(memory: Tensor, usage: Tensor | None, rate: int, mode: str) -> Tensor:
    """The specification of ``mean``, ``max``, ``most_used`` in plain PyTorch: ``(B, N, d)`` to ``(B, N/rate, d)``."""
    if mode == "most_used":
        keep = memory.shape[1] // rate
        most = usage.float().sort(dim=1, descending=True, stable=True).indices[:, :keep]  # type: ignore[union-attr]
        return memory.gather(1, most.sort(dim=1).values[..., None].expand(-1, -1, memory.shape[2]))
    groups = memory.unflatten(1, (memory.shape[1] // rate, rate))
    return groups.mean(dim=2) if mode == "mean" else groups.max(dim=2).values


def convolve(
    memory: Tensor, rate: int, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dilations: Sequence[int]
) -> Tensor:
    """``conv`` (one weight, no dilation) and ``dilated_conv`` on every backend: torch's matrix products, one a layer.

    Of a contiguous memory, a group of rows is one long row in place.
    """
    x = memory
    *layers, last = zip(weights, biases, strict=True)
    for (weight, bias), dilation in zip(layers, dilations, strict=True):
        # One product over both steps: in half precision, two would be rounded apart.
        before = F.pad(x, (0, 0, dilation, 0))[:, : x.shape[1]]
        x = F.linear(torch.cat([before, x], dim=2), weight.transpose(1, 2).flatten(1), bias).relu()
    groups = x.reshape(x.shape[0], x.shape[1] // rate, rate * x.shape[2])
    return F.linear(groups, last[0].transpose(1, 2).flatten(1), last[1])


def _choice(memory: Tensor, groups: int, rate: int, mode: str) -> Tensor:
    """Where each output came from: csrc/ops.h, Compression.choice."""
    batch, steps, width = memory.shape
    if mode == "max":
        return memory.new_empty(batch, groups, width, dtype=torch.uint8 if rate <= 256 else torch.int32)
    return memory.new_empty((batch, steps) if mode == "most_used" else (0,), dtype=torch.int32)


def _fake_forward(memory, usage, rate, mode, backend):
    batch, steps, width = memory.shape
    return memory.new_empty(batch, steps // rate, width), _choice(memory, steps // rate, rate, mode)


def _fake_backward(grad, choice, rate, mode, backend):
    batch, groups, width = grad.shape
    return grad.new_empty(batch, groups * rate, width)


FORWARD = Op(
    "compress_forward(Tensor memory, Tensor? usage, int rate, str mode, str backend)"
    " -> (Tensor compressed, Tensor choice)",
    _fake_forward,
)
BACKWARD = Op(
    "compress_backward(Tensor grad, Tensor choice, int rate, str mode, str backend) -> Tensor",
    _fake_backward,
)


def _problem(memory: Tensor, compressed: Tensor, choice: Tensor, rate: int, mode: str) -> Any:
    tensors = rows(memory), rows(compressed), choice.data_ptr()
    return _C.Compression(*tensors, *memory.shape, rate, MODES[mode], DTYPES[memory.dtype])


@FORWARD.implement("native")
def _forward_native(memory, usage, rate, mode):
    compressed, choice = _fake_forward(memory, usage, rate, mode, None)
    problem, address = _problem(memory, compressed, choice, rate, mode), 0 if usage is None else usage.data_ptr()
    if memory.is_cuda:
        _C.compress_forward_cuda(problem, address, torch.cuda.current_stream().cuda_stream)
    else:
        _C.compress_forward_cpu(problem, address)
    return compressed, choice


@BACKWARD.implement("native")
def _backward_native(grad, choice, rate, mode):
    d_memory = to_be_filled(_fake_backward(grad, choice, rate, mode, None))
    problem = _problem(d_memory, grad, choice, rate, mode)
    if grad.is_cuda:
        _C.compress_backward_cuda(problem, torch.cuda.current_stream().cuda_stream)
    else:
        _C.compress_backward_cpu(problem)
    return d_memory


@FORWARD.implement("triton")
def _forward_triton(memory, usage, rate, mode):
    from par_xl.kernels.compression import forward

    compressed, choice = _fake_forward(memory, usage, rate, mode, None)
    forward(memory, usage, rate, mode, compressed, choice)
    return compressed, choice


@BACKWARD.implement("triton")
def _backward_triton(grad, choice, rate, mode):
    from par_xl.kernels.compression import backward

    d_memory = _fake_backward(grad, choice, rate, mode, None)
    backward(grad, choice, rate, mode, d_memory)
    return d_memory


class Compress(torch.autograd.Function):
    """``Compress.apply(memory, usage or None, rate, mode, backend)`` for mean, max, most_used; see :func:`compress`.

    Nothing of the memory is kept for the backward: where the maxima were (a byte each), or which steps were kept.
    """

    @staticmethod
    def forward(ctx, memory, usage, rate, mode, backend):
        _check_usage(usage, memory, mode)
        memory = memory if memory.stride(2) == 1 else memory.contiguous()
        usage = None if usage is None else usage.float().contiguous()
        compressed, choice = FORWARD(memory, usage, rate, mode, backend)
        ctx.save_for_backward(choice)
        ctx.options = rate, mode, backend
        return compressed

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        (choice,) = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        return BACKWARD(grad, choice, *ctx.options), None, None, None, None


def check_options(rate: int, mode: str, dilation: Sequence[int] | None) -> None:
    check_rate(rate)
    if mode not in MODES and mode not in CONVOLUTIONS:
        raise ValueError(f"mode must be one of {', '.join([*MODES, *CONVOLUTIONS])}, not {mode!r}")
    _check_given("dilation", dilation, mode, "dilated_conv")
    if any(not isinstance(step, int) or step < 1 for step in dilation or ()):
        raise ValueError(f"dilation must hold positive integers, not {dilation}")


def check_rate(rate: int) -> None:
    if not isinstance(rate, int) or rate < 1:
        raise ValueError(f"rate must be a positive integer, not {rate!r}")


def _check_given(name: str, value: Any, mode: str, wanted: str) -> None:
    if (value is None) == (mode == wanted):
        other = "" if mode == wanted else f" and no other, not with {mode}"
        raise ValueError(f"{name} must be given with mode {wanted}{other}")


def _check_memory(memory: Tensor, rate: int) -> None:
    if memory.dim() != 3:
        raise ValueError(f"memory must have 3 dimensions, not shape {tuple(memory.shape)}")
    if not memory.is_floating_point():
        raise TypeError(f"memory must be floating point, not {memory.dtype}")
    if memory.shape[1] % rate:
        raise ValueError(f"memory must have a number of steps divisible by rate {rate}, not {memory.shape[1]}")


def _check_usage(usage: Tensor | None, memory: Tensor, mode: str) -> None:
    _check_given("usage", usage, mode, "most_used")
    if usage is not None:
        if usage.shape != memory.shape[:2]:
            raise ValueError(f"usage must have shape {tuple(memory.shape[:2])}, not {tuple(usage.shape)}")
        if not usage.is_floating_point():
            raise TypeError(f"usage must be floating point, not {usage.dtype}")
        if usage.device != memory.device:
            raise ValueError(f"usage must be on {memory.device} as memory is, not on {usage.device}")


def _as_list(x: Any) -> list:
    return [x] if x is None or isinstance(x, Tensor) else list(x)


def _check_layers(
    memory: Tensor, rate: int, mode: str, weight: Any, bias: Any, dilation: Any
) -> tuple[list, list, list]:
    """Weights, biases and dilations as lists: those of the dilated layers, and the last weight and bias."""
    if mode not in CONVOLUTIONS:
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                raise ValueError(f"{name} must not be given with mode {mode}")
        return [], [], []
    weights, dilations = _as_list(weight), [] if dilation is None else list(dilation)
    biases = [None] * len(weights) if bias is None else _as_list(bias)
    if len(weights) != len(dilations) + 1 or len(biases) != len(weights):
        raise ValueError(
            f"weight and bias must each have {len(dilations) + 1} tensors, one for each dilated layer and one for the"
            f" last, not {len(weights)} and {len(biases)}"
        )
    width = memory.shape[2]
    for kernel, one_weight, one_bias in zip([2] * len(dilations) + [rate], weights, biases, strict=True):
        _check_parameter("weight", one_weight, (width, width, kernel), memory)
        if one_bias is not None:
            _check_parameter("bias", one_bias, (width,), memory)
    return weights, biases, dilations


def _check_parameter(name: str, x: Tensor | None, shape: tuple[int, ...], memory: Tensor) -> None:
    if x is None or x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {None if x is None else tuple(x.shape)}")
    if x.dtype != memory.dtype and not torch.is_autocast_enabled(memory.device.type):
        raise TypeError(f"{name} must have the dtype of memory {memory.dtype}, not {x.dtype}")
    if x.device != memory.device:
        raise ValueError(f"{name} must be on {memory.device} as memory is, not on {x.device}")


def compress(
    memory: Tensor,
    rate: int,
    mode: str = "mean",
    *,
    weight: Tensor | Sequence[Tensor] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    dilation: Sequence[int] | None = None,
    usage: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compress every ``rate`` consecutive steps of a memory to one: ``(B, N, d)``, oldest first, to ``(B, N/rate, d)``.

    Equivalent, with ``x = memory.unflatten(1, (-1, rate))`` and ``m = memory.transpose(1, 2)``, to

    ==============  ===================================================================================
    mean            ``x.mean(2)``, in fp32 arithmetic (fp64 for fp64)
    max             ``x.max(2).values``: the first of equal maxima gets the gradient; NaN wins
    conv            ``F.conv1d(m, weight, bias, stride=rate).transpose(1, 2)``, as one matrix product
    dilated_conv    ``m = F.conv1d(F.pad(m, (step, 0)), weight[i], bias[i], dilation=step).relu()`` for each
                    ``i, step`` of ``dilation``, then conv with ``weight[-1], bias[-1]``
    most_used       ``memory`` at ``usage.sort(1, True, stable=True)[1][:, :N // rate].sort(1)[0]``, without a sort
    ==============  ===================================================================================

    Args:
        memory: fp16, bf16, fp32 or fp64; any strides, so ``x.transpose(0, 1)`` of a time-first ``x`` is read in place
            (but the convolutions copy a memory that is not contiguous, as do all if its last dimension is not).
        rate: steps that become one; divides ``N``.
        mode: as above.
        weight: conv: ``(d, d, rate)``; dilated_conv: one ``(d, d, 2)`` for each dilated layer, then ``(d, d, rate)``.
        bias: conv: ``(d,)``; dilated_conv: one of these, or None, for each weight. Default: none.
        dilation: dilated_conv: the distance between the two steps that each layer sees. A layer is causal and keeps the
            length, with zeros before the first step, where DeepMind's sonnet code has none and so loses steps.
        usage: most_used: ``(B, N)``, the attention each step has received, compared in fp32; the older of equals stays,
            NaN counts as the largest. It gets no gradient.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose. On each of
            them the convolutions are torch's matrix products.

    Returns:
        A new contiguous tensor of memory's dtype; under autocast, that of its products for the convolutions. Same
        input, same bits. A second derivative of mean, max and most_used exists on the eager backend alone.

    Raises:
        ValueError: a wrong rank, shape, device, rate, mode or backend, or an argument that the mode does not take.
        TypeError: a dtype that is not floating point, or two different ones.

    Source: arXiv 1911.05507, section 3.2; sonnet v1 ``nets/transformer.py`` (PoolCompressor, ConvCompressor).
    """
    check_options(rate, mode, dilation)
    _check_memory(memory, rate)
    _check_usage(usage, memory, mode)
    layers = _check_layers(memory, rate, mode, weight, bias, dilation)
    chosen = choose(FORWARD, backend, memory)
    if mode in CONVOLUTIONS:
        return convolve(memory, rate, *layers)
    if chosen == "eager":
        return compress_reference(memory, usage, rate, mode)
    return Compress.apply(memory, usage, rate, mode, chosen)
