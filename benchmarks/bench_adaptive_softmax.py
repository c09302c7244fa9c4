"""Adaptive softmax, forward and backward, against torch's module, a full softmax and the matrix products alone.

FLOPs: three products (logits, d_input, d_weight) of each token with the head, its tail and the projection of that tail.
"""

import pytest
import torch
import torch.nn.functional as F

import par_xl

SHAPES = {  # N, d, V, cutoffs; div 4, targets by Zipf's law
    "cpu": [(2048, 512, 33278, (4000, 10000)), (1024, 512, 267735, (20000, 40000, 200000))],
    "cuda": [(16384, 1024, 267735, (19997, 39997, 199997))],
}["cuda" if torch.cuda.is_available() else "cpu"]
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
OURS = "triton" if torch.cuda.is_available() else "native"


def zipf(tokens, classes, device):
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(1 / torch.arange(1.0, classes + 1), tokens, replacement=True, generator=generator)
    return y.to(device)


def products(module, x, y):
    """Every product of the forward and the backward, on matrices that are there already, and nothing else."""
    pairs = [(x.detach(), module.head.weight.detach())]
    ends = module.cutoffs
    for (projection, out), begin, end in zip(module.tail, ends, ends[1:], strict=False):
        rows = x.detach()[(y >= begin) & (y < end)]
        pairs += [(rows, projection.weight.detach()), (rows @ projection.weight.detach().t(), out.weight.detach())]
    memory = [(x.new_empty(len(a), len(w)), torch.empty_like(a), torch.empty_like(w)) for a, w in pairs]

    def run(*_):
        for (a, w), (z, da, dw) in zip(pairs, memory, strict=True):
            torch.mm(a, w.t(), out=z)
            torch.mm(z, w, out=da)
            torch.mm(z.t(), a, out=dw)

    return run, 6 * sum(a.numel() * len(w) for a, w in pairs)


@pytest.mark.parametrize(("n", "d", "classes", "cutoffs"), SHAPES, ids=[f"{s[0]}x{s[1]}-V{s[2]}" for s in SHAPES])
def test_forward_backward(race, device, n, d, classes, cutoffs):
    """The full softmax and the head alone run as they are: their results are other losses, so they return ours."""
    torch.manual_seed(0)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(d, classes, cutoffs, device=device, dtype=DTYPE)
    ours = par_xl.nn.AdaptiveLogSoftmaxWithLoss(d, classes, cutoffs, device=device, dtype=DTYPE, backend=OURS)
    ours.load_state_dict(theirs.state_dict())
    full = torch.nn.Linear(d, classes, bias=False, device=device, dtype=DTYPE)
    x, y = torch.randn(n, d, device=device, dtype=DTYPE, requires_grad=True), zipf(n, classes, device)
    compiled = torch.compile(theirs)
    only, flops = products(theirs, x, y)
    truth = None

    def step(module, forward):
        return lambda x, y: torch.autograd.grad(forward(module, x, y), [x, *module.parameters()])

    def other(function):
        return lambda x, y: (function(x, y), truth)[1]

    loss = lambda module, x, y: module(x, y).loss  # noqa: E731
    candidates = {
        "torch module": step(theirs, loss),
        OURS: step(ours, loss),
        "torch.compile": step(compiled, loss),
        "products alone": other(only),
        "full softmax": other(step(full, lambda module, x, y: F.cross_entropy(module(x), y))),
        "linear_cross_entropy, head": other(
            step(theirs.head, lambda m, x, y: F.linear_cross_entropy(x, m.weight, y.clamp(max=cutoffs[0])))
        ),
    }
    truth = candidates["torch module"](x, y)
    race(candidates, [(x, y)], OURS, tolerance=1e-2, flops=flops, memory=True)
