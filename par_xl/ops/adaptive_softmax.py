"""Adaptive softmax: the negative log-likelihood of each token, without the logits in memory.

The head is a softmax over the most frequent classes and one column for each of K tails; tail c is a softmax over its
own classes. With z = W P x + b for the weights, the projection and the biases of one softmax of C columns, and y its
target:

    nll(token) = loss(head; y, or the column of tail c) + [the target is in tail c] loss(tail c; y - first class of c)
    loss(z; y) = (1 - s) (lse - z_y) + s (lse - mean(z)) + w lse^2,   lse = log sum_c exp(z_c)
    dz_c       = g (softmax(z)_c (1 + 2 w lse) - (1 - s) [c = y] - s / C)

with label smoothing s, z-loss w and g the gradient of the token's nll. The gradient of a sum or a mean is known before
the loss is: then one pass makes the logits once and takes both from them. Otherwise the backward makes them again.

Grave et al.: Efficient softmax approximation for GPUs (arXiv 1609.04309). Label smoothing and z-loss stay within a
softmax, as in fairseq's adaptive loss: smoothing over all classes would need every tail for every token.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from par_xl.ops import adaptive_softmax_cpu
from par_xl.ops.adaptive_tables import (
    Options,
    Tables,
    check,
    check_counts,
    check_options,
    head_column,
    integer,
    integers,
    softmax_logits,
    softmaxes,
    unflatten,
)
from par_xl.ops.adaptive_targets import bad_target, check_targets
from par_xl.ops.large_results import to_be_filled
from par_xl.ops.registry import (
    Op,
    acc_dtype,
    choose,
    distinct,
    first_derivative_only,
    has_values,
    host_can_look,
    under_autocast,
    without_autocast,
)

GPU_WORKSPACE, CPU_WORKSPACE = 256 << 20, 28 << 20  # bytes of logits at a time


def _loss(z: Tensor, target: Tensor, options: Options) -> Tensor:
    z, smoothing = z.to(acc_dtype(z)), options.label_smoothing
    lse = z.logsumexp(1)
    loss = lse - (1 - smoothing) * z.gather(1, target[:, None])[:, 0]
    if smoothing:  # not 0 times a mean that one logit of -inf makes infinite
        loss = loss - smoothing * z.mean(1)
    return loss + options.z_loss * lse.square() if options.z_loss else loss


def adaptive_nll_reference(x: Tensor, target: Tensor, tables: Tables, options: Options) -> Tensor:
    """The specification, in plain PyTorch: ``(N, d)`` and ``(N,)`` in, ``(N,)`` out, in fp32 (fp64 for fp64).

    The matrix products round to the tables' dtype, as PyTorch's do; all else is in fp32.
    """
    ends, wide = options.ends, acc_dtype(x)
    head, *tails = softmaxes(tables, ends, tables.cluster_weight is not None)
    ignored = target == options.ignore_index
    outside = ((target < 0) | (target >= ends[-1])) & ~ignored
    column = target.masked_fill(ignored | outside, 0)
    nll = torch.zeros_like(target, dtype=wide)
    for i, softmax in enumerate(tails):
        inside = (target >= ends[i]) & (target < ends[i + 1]) & ~ignored
        column = torch.where(inside, head_column(i, ends, options.descending), column)
        # An empty tail passes through as well: its parameters then have zero gradients, not none. Where it is not known
        # which tokens are inside, all pass through, and the others add 0.
        rows = inside.nonzero()[:, 0] if has_values(inside) else torch.arange(len(inside), device=inside.device)
        of_tail = (target[rows] - ends[i]).clamp(0, ends[i + 1] - ends[i] - 1)
        losses = _loss(softmax_logits(x[rows], softmax), of_tail, options)
        nll = nll.index_add(0, rows, torch.where(inside[rows], losses, 0.0))
    nll = nll + _loss(softmax_logits(x, head), column, options)
    return nll.masked_fill(ignored, 0.0).masked_fill(outside, torch.nan)


def _fake_forward(x, *_):
    return x.new_empty(x.shape[0], dtype=acc_dtype(x))


def _fake_backward(grad, x, target, weights, biases, projections, cluster_weight, cluster_bias, *others):
    needed, wide = others[-2], acc_dtype(x)
    inputs = (x, *weights, *biases, *projections, cluster_weight, cluster_bias)
    gradients = [
        x.new_empty(t.shape if need else 0, dtype=wide)  # contiguous, whatever the strides of t
        for t, need in zip(inputs, needed, strict=True)
    ]
    return _fake_forward(x), gradients


# The backward takes the gradient of every token's nll, and returns the nll as well as the gradients of x, weights,
# biases, projections, cluster_weight and cluster_bias, in fp32 (fp64 for fp64), empty where they are not needed.
_INPUTS = (
    "Tensor x, Tensor target, Tensor[] weights, Tensor?[] biases, Tensor?[] projections, Tensor? cluster_weight,"
    " Tensor? cluster_bias, int[] ends, bool descending, int ignore_index, float label_smoothing, float z_loss,"
    " int workspace"
)
FORWARD = Op(f"adaptive_nll_forward({_INPUTS}, str backend) -> Tensor nll", _fake_forward)
BACKWARD = Op(
    f"adaptive_nll_backward(Tensor grad, {_INPUTS}, bool[] needed, str backend) -> (Tensor nll, Tensor[] gradients)",
    _fake_backward,
)


def _prepared(run: Callable, grad: Tensor | None, x: Tensor, target: Tensor, *inputs: Any) -> tuple[Tensor, list]:
    """Call ``run`` with the softmaxes as views and with the outputs to be filled."""
    tables, options, needed = Tables(*inputs[:5]), Options(*inputs[5:11]), inputs[11]
    nll, gradients = _fake_backward(grad, x, target, *inputs, None)
    gradients = [to_be_filled(g) for g in gradients]
    separate = tables.cluster_weight is not None
    wanted = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    parameters = softmaxes(tables, options.ends, separate)
    outputs = softmaxes(unflatten(wanted[1:], len(options.ends)), options.ends, separate)
    if grad is not None:
        grad = grad.contiguous()  # that of a sum is one number, expanded
    with without_autocast(x):
        run(grad, x, target, parameters, outputs, nll, wanted[0], options)
    return nll, gradients


def _run_triton(grad, x, target, softmaxes, gradients, nll, dx, options, **replaced):
    from par_xl.kernels.adaptive_softmax import run

    if x.device.type == "cpu":  # the interpreter
        check_targets(target, options)
    bad = bad_target(x.device, options.ends[-1], options.ignore_index)
    bad.raise_if_written(options)
    run(grad, x, target, softmaxes, gradients, nll, dx, bad.word, options, **replaced)


def _run_native(grad, x, *others):
    if x.is_cuda:
        from par_xl.ops.adaptive_softmax_cuda import rows_in_place, sort

        _run_triton(grad, x, *others, sort=sort, rows_in_place=rows_in_place)
    else:
        adaptive_softmax_cpu.run(grad, x, *others)


def _no_triton(device: str, dtype: torch.dtype) -> str:
    missing = device == "cuda" and find_spec("triton") is None
    return "the tails of adaptive_nll are Triton kernels on a GPU, and triton is not installed" if missing else ""


def _losses(run: Callable, x: Tensor, target: Tensor, *inputs: Any) -> Tensor:
    nothing = [False] * (1 + len(Tables(*inputs[:5]).flat()))
    return _prepared(run, None, x, target, *inputs, nothing)[0]


@FORWARD.implement("native", lacks=_no_triton)
def _forward_native(*inputs):
    return _losses(_run_native, *inputs)


@BACKWARD.implement("native", lacks=_no_triton)
def _backward_native(*inputs):
    return _prepared(_run_native, *inputs)


@FORWARD.implement("triton")
def _forward_triton(*inputs):
    return _losses(_run_triton, *inputs)


@BACKWARD.implement("triton")
def _backward_triton(*inputs):
    return _prepared(_run_triton, *inputs)


class AdaptiveNLL(torch.autograd.Function):
    """``AdaptiveNLL.apply(x, target, options, reduction, differentiable, backend, *tables.flat())``.

    Returns the nll ``(N,)``, and its sum or mean unless the reduction is "none". See :func:`adaptive_nll`.
    """

    @staticmethod
    def forward(ctx, x, target, options, reduction, differentiable, backend, *tensors):
        tables = unflatten(tensors, len(options.ends))
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend, ctx.gradients = options, backend, None
        weight = None
        if reduction != "none":
            valid = target != options.ignore_index
            weight = valid.to(acc_dtype(x))
            if reduction == "mean":
                weight = weight / valid.sum().clamp(min=1)
        ctx.save_for_backward(x, target, weight, *tensors)
        if weight is None:
            return FORWARD(x, target, *tables, *options, backend)
        if differentiable:
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
            nll, ctx.gradients = BACKWARD(weight, x, target, *tables, *options, needed, backend)
        else:
            nll = FORWARD(x, target, *tables, *options, backend)
        return nll, torch.dot(nll, weight)

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_nll, d_loss=None):
        x, target, weight, *tensors = ctx.saved_tensors
        if x.is_cuda and has_values(x) and not torch.compiler.is_compiling():
            bad_target(x.device, ctx.options.ends[-1], ctx.options.ignore_index).raise_if_written(ctx.options)
        if d_nll is None and d_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]]
        gradients = ctx.gradients
        if d_nll is None and gradients is not None:
            gradients = _scaled(gradients, d_loss)
            if not torch.compiler.is_compiling():
                ctx.gradients = None  # they are the caller's now; a second backward makes its own
        else:
            grad = d_nll if d_loss is None else weight * d_loss + (0 if d_nll is None else d_nll)
            tables = unflatten(tensors, len(ctx.options.ends))
            gradients = BACKWARD(grad, x, target, *tables, *ctx.options, needed, ctx.backend)[1]
        inputs = (x, *tensors)
        dx, *others = [g.to(t.dtype) if need else None for g, t, need in zip(gradients, inputs, needed, strict=True)]
        return dx, None, None, None, None, None, *others


def _scaled(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return [g * factor for g in gradients]
    if host_can_look(factor) and factor.item() == 1:
        return gradients
    return [g.mul_(factor) for g in gradients]


def nll_and_loss(
    x: Tensor, target: Tensor, tables: Tables, cutoffs: Sequence[int], *, order: str = "ascending",
    ignore_index: int = -100, reduction: str = "none", label_smoothing: float = 0.0, z_loss: float = 0.0,
    workspace: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`adaptive_nll`'s values by token and their reduction (the same tensor for "none"), from one pass."""
    check_options(order, reduction, label_smoothing)
    check_counts(tables, cutoffs)
    last = len(tables.weights[-1]) + (cutoffs[-1] if cutoffs and len(tables.weights) > 1 else 0)
    ends = (*cutoffs, last)
    x, *flat = under_autocast(x, *tables.flat())
    tables = unflatten(flat, len(ends))
    check(x, target, tables, ends)
    default = CPU_WORKSPACE if x.device.type == "cpu" else GPU_WORKSPACE
    workspace = default if workspace is None else integer("workspace", workspace)
    if workspace < 0:
        raise ValueError(f"workspace must be a number of bytes, 0 or more, not {workspace}")
    ignore_index = integer("ignore_index", ignore_index)
    options = Options(ends, order == "descending", ignore_index, float(label_smoothing), float(z_loss), workspace)
    rows, flat_target = x.reshape(-1, x.shape[-1]), target.reshape(-1).long()
    chosen = choose(FORWARD, backend, x)
    if chosen == "eager":
        check_targets(flat_target, options)
        with without_autocast(x):
            nll = adaptive_nll_reference(rows, flat_target, tables, options)
            valid = (flat_target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
            loss = nll.sum() / valid
    elif reduction == "none":
        nll = AdaptiveNLL.apply(rows, flat_target, options, reduction, False, chosen, *distinct(tables.flat()))
    else:
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat))
        nll, loss = AdaptiveNLL.apply(
            rows, flat_target, options, reduction, differentiable, chosen, *distinct(tables.flat())
        )
    nll = nll.view(target.shape)
    return nll, nll if reduction == "none" else loss


def adaptive_nll(
    input: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    cutoffs: Sequence[int],
    *,
    biases: Sequence[Tensor | None] | None = None,
    projections: Sequence[Tensor | None] | None = None,
    cluster_weight: Tensor | None = None,
    cluster_bias: Tensor | None = None,
    order: str = "ascending",
    ignore_index: int = -100,
    reduction: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    workspace: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood under an adaptive softmax, in the order of the tokens, without the logits in memory.

    Equivalent, for ``asm = torch.nn.AdaptiveLogSoftmaxWithLoss(d, V, cutoffs)``, to ``-asm(input, target).output`` with
    ``weights=[asm.head.weight, *(t[1].weight for t in asm.tail)]`` and ``projections=[None, *(t[0].weight for t in
    asm.tail)]``. Without cutoffs it is ``F.cross_entropy(F.linear(input, weights[0], biases[0]), target,
    reduction="none")``. fp32 products follow :func:`torch.set_float32_matmul_precision` and
    ``torch.backends``; a CPU with AMX makes most of bf16 parts, where a number that is not finite gives NaN.

    Args:
        input: ``(..., d)``; fp16, bf16, fp32 or fp64, any strides.
        target: ``(...)`` int32 or int64, classes 0..V-1 by falling frequency.
        weights: ``(cutoffs[0] + K, d_0)`` for the head, whose last K rows are the columns of the K tails, then one
            ``(cutoffs[i] - cutoffs[i-1], d_i)`` for each tail, the last up to V. With ``cluster_weight``, the head's
            has ``cutoffs[0]`` rows, or a single ``(V, d_0)`` serves the head and all tails. Tables may be shared with
            others (an embedding): each argument gets its own gradient, and autograd adds them.
        cutoffs: increasing, the first class of each of the K tails; any sequence of integers, a tensor too.
        biases: as many as weights, one for each row of it, or None.
        projections: K + 1 of ``(d_i, d)`` as in ``nn.Linear``, or None where ``d_i = d``.
        cluster_weight, cluster_bias: ``(K, d_0)`` and ``(K,)``, the head's columns of the tails, apart from its table.
        order: of the head's tail columns: "ascending" (torch, Hugging Face) or "descending" (Transformer-XL, NVIDIA and
            awd-lstm: the last column is the first tail).
        ignore_index: the target of tokens without a loss, inside 0..V-1 or not.
        reduction: "none", "sum", or "mean" over the tokens that are not ignored.
        label_smoothing: weight of the uniform distribution, within the head and within the token's tail.
        z_loss: weight of ``lse^2``, of the head and of the token's tail.
        workspace: bytes of logits at a time; default 256 MB on a GPU, 28 MB on the CPU. At 0, and on the CPU below 80
            rows of them, no logits are in memory at all: the gradients' pass makes them again.
        backend: "eager", "native", "triton" or "auto"; default: what :func:`par_xl.use_backend` chose.

    Returns:
        The shape of ``target`` for "none", else 0-d; fp32 (fp64 for fp64). An ignored token has 0; a mean over no token
        is 0. Every parameter gets a gradient, zeros where no token needs it. Same input, same bits. A second derivative
        exists on the eager backend alone.

    Raises:
        ValueError: a wrong shape, device, cutoff, order, reduction, smoothing or backend, a width of 0 (d / div_val**i
            below 1), or a target that is no class. On a GPU the kernels give NaN for its token, and the error comes
            with the first later call or backward that finds the value there without waiting for it.
        TypeError: a dtype that is not floating point, two different ones, a target that is not int32 or int64, a weight
            that is no tensor, or a cutoff, ignore_index or workspace that is no integer.

    Source: arXiv 1609.04309; torch.nn.AdaptiveLogSoftmaxWithLoss; kimiyoung/transformer-xl
    ``ProjectedAdaptiveLogSoftmax``; salesforce/awd-lstm-lm ``SplitCrossEntropyLoss``.
    """
    weights, cutoffs = list(weights), integers("cutoffs", cutoffs)
    tables = Tables(
        weights,
        [None] * len(weights) if biases is None else list(biases),
        [None] * (len(cutoffs) + 1) if projections is None else list(projections),
        cluster_weight,
        cluster_bias,
    )
    return nll_and_loss(
        input, target, tables, cutoffs, order=order, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, z_loss=z_loss, workspace=workspace, backend=backend,
    )[1]  # fmt: skip
