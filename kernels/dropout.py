"""Dropout in Triton. A program owns BLOCK Philox counters, and for each of the four words BLOCK contiguous elements."""

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _apply(x, y, word, i, inside, threshold, factor, RELU: tl.constexpr):
    value = tl.load(x + i, mask=inside, other=0)
    wide = value.to(factor.dtype)
    if RELU:
        wide = tl.where(wide < 0, 0.0, wide)  # NaN stays
    wide = tl.where(word.to(tl.int64) >= threshold, wide * factor, 0.0)
    tl.store(y + i, wide.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _factor(scale, x):
    return tl.full([1], scale, tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)


@triton.jit
def _dropout(
    x, seed, y, size, plane, threshold: tl.int64, scale: tl.float64, BLOCK: tl.constexpr, RELU: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """y_i = keep_i f(x_i) scale, where i = w plane + c and word w of the counter c keeps"""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = _factor(scale, x)
    first, second, third, fourth = tl.randint4x(tl.load(seed), c, ROUNDS)
    end = tl.minimum(size, plane)
    _apply(x, y, first, c, c < end, threshold, factor, RELU)
    _apply(x, y, second, c + plane, (c < plane) & (c + plane < size), threshold, factor, RELU)
    _apply(x, y, third, c + 2 * plane, (c < plane) & (c + 2 * plane < size), threshold, factor, RELU)
    _apply(x, y, fourth, c + 3 * plane, (c < plane) & (c + 3 * plane < size), threshold, factor, RELU)


@triton.jit
def _relu_backward(grad, out, dx, size, scale: tl.float64, BLOCK: tl.constexpr):
    """dx_i = [out_i > 0] grad_i scale; a NaN that was kept lets the gradient pass, as torch's ReLU does"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = _factor(scale, grad)
    g = tl.load(grad + i, mask=i < size, other=0).to(factor.dtype)
    y = tl.load(out + i, mask=i < size, other=0).to(factor.dtype)
    tl.store(dx + i, tl.where(y <= 0, 0.0, g * factor).to(dx.dtype.element_ty), mask=i < size)


def forward(x, seed, y, plane, threshold, scale, relu, rounds):
    """Fills ``y``; all contiguous."""
    if x.numel():
        grid = (triton.cdiv(plane, BLOCK),)
        _dropout[grid](x, seed, y, x.numel(), plane, threshold, scale, BLOCK=BLOCK, RELU=relu, ROUNDS=rounds)


def relu_backward(grad, out, dx, scale):
    """Fills ``dx``; all contiguous."""
    if grad.numel():
        _relu_backward[(triton.cdiv(grad.numel(), 2 * BLOCK),)](grad, out, dx, grad.numel(), scale, BLOCK=2 * BLOCK)
