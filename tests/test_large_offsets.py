"""Offsets beyond 32 bits: every op whose kernels take strides, on views that reach past 2**31 elements.

The memory behind a view is mapped, not reserved: only the pages that hold its elements are there. compressed_attention
runs rel_attention's kernels; mix and dropout copy such views before their kernels, which take no strides.
"""

import mmap
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import par_xl
from par_xl.testing import leaves, make_inputs

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
DTYPE = torch.float16
BATCH, HEADS, STEPS, WIDTH = 3, 3, 4, 8


def attention(randn):
    heads = lambda steps: randn(BATCH, HEADS, steps, WIDTH)  # noqa: E731
    made = dict(q=heads(STEPS), k=heads(STEPS), v=heads(STEPS), r=randn(HEADS, 2 * STEPS - 1, WIDTH))
    return made | dict(content_bias=randn(HEADS, WIDTH), memory=(heads(STEPS - 1), heads(STEPS - 1)))


def compression(mode):
    def case(randn):
        given = dict(memory=randn(BATCH, 2 * STEPS, WIDTH), rate=2, mode=mode)
        if mode == "most_used":
            given["usage"] = randn(BATCH, 2 * STEPS).detach()
        elif mode.endswith("conv"):
            dilated = mode == "dilated_conv"
            given |= dict(weight=[randn(WIDTH, WIDTH, 2) for _ in range(1 + dilated)])
            given |= dict(dilation=(1,)) if dilated else {}
        return given

    return case


def update(mode):
    def case(randn):
        lengths = dict(compressed=STEPS, memory_length=STEPS, compressed_length=STEPS, rate=2)
        given = dict(state=randn(BATCH, 2 * STEPS, WIDTH), hidden=randn(BATCH, STEPS, WIDTH), **lengths)
        return given | (dict(fresh=randn(BATCH, STEPS // 2, WIDTH)) if mode == "fresh" else dict(mode=mode))

    return case


def adaptive(randn):
    """A head of 4 classes and two tails, of 3 and 5 classes and half and a quarter of the width."""
    tables = dict(weights=[randn(6, WIDTH), randn(3, WIDTH // 2), randn(5, WIDTH // 4)])
    tables["projections"] = [None, randn(WIDTH // 2, WIDTH), randn(WIDTH // 4, WIDTH)]
    return dict(input=randn(12, WIDTH), target=torch.arange(12), cutoffs=(4, 7), **tables)


CASES = {
    "ar_tar": (
        par_xl.ar_tar_loss,
        lambda randn: {name: randn(BATCH, 3 * STEPS, WIDTH) for name in ("output", "raw_output")},
    ),
    "rel_attention": (partial(par_xl.rel_attention, return_received=True), attention),
    **{
        f"compress-{mode}": (par_xl.compress, compression(mode))
        for mode in ("mean", "max", "most_used", "conv", "dilated_conv")
    },
    **{f"update_memory-{mode}": (par_xl.update_memory, update(mode)) for mode in ("mean", "max", "fresh")},
    "adaptive_nll": (par_xl.adaptive_nll, adaptive),
}


def far(x, reach):
    """The same values with all dimensions but the last so far apart that offsets need more than 32 bits."""
    if not x.is_floating_point() or x.dim() < 2:
        return x
    strides = [1] * x.dim()
    for dim, size in enumerate(x.shape[:-1]):
        # Where multiples of the large parts meet, the small ones keep the rows apart.
        strides[dim] = (2**31 if reach == "stride" else 3 * 2**30 // (size - 1)) + (8**dim << 6)
    n_elements = 1 + sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, n_elements * x.itemsize, flags=flags)
    view = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, strides)
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


def result(op, inputs, backend, place):
    """The outputs and the gradients, with all inputs and the output's gradient where ``place`` puts them."""
    inputs = tree_map_only(torch.Tensor, place, inputs)
    out, *others = tree_leaves(op(**inputs, backend=backend))
    gradient = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    others = [x for x in others if isinstance(x, torch.Tensor)]
    return out, *others, *torch.autograd.grad(out, leaves(inputs), place(gradient))


@pytest.mark.parametrize("reach", ["stride", "offset"])
@pytest.mark.parametrize("name", CASES)
def test_views_that_reach_past_32_bits(name, reach, backend):
    """Either the strides themselves need more than 32 bits, or only their products with an index do."""
    op, case = CASES[name]
    inputs = make_inputs(case, DTYPE, "cpu")
    results = (result(op, inputs, backend, place) for place in (lambda x: far(x, reach), lambda x: x))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)
