"""Dropout, alone and of a ReLU, forward and backward, against torch's in eager PyTorch and compiled.

Bytes: forward reads the input and writes the result; backward reads the gradient, after a ReLU the result too, and
writes a gradient. No mask. The candidates draw masks of their own, so their results are not compared: the tests do.
"""

import pytest
import torch
import torch.nn.functional as F

import par_xl

FULL = {  # (B, T, d): a layer of the small Transformer-XL of the recipes, its inner layer, and a large one
    "cpu": [((8, 128, 256), torch.float32), ((8, 128, 1024), torch.float32), ((16, 512, 1024), torch.float32)],
    "cuda": [((64, 128, 256), torch.bfloat16), ((64, 512, 4096), torch.bfloat16)],
}
CASES = FULL["cuda" if torch.cuda.is_available() else "cpu"]
OURS = "triton" if torch.cuda.is_available() else "native"
IDS = ["x".join(map(str, shape)) + "-" + str(dtype).removeprefix("torch.") for shape, dtype in CASES]


@pytest.mark.parametrize("relu", [False, True], ids=["dropout", "relu"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward_backward(race, device, shape, dtype, relu):
    size = torch.Size(shape).numel() * dtype.itemsize
    sets = max(1, -(-(256 << 20) // size)) if device == "cuda" else 1  # enough to leave the L2 behind
    inputs = [
        tuple(torch.randn(shape, device=device).to(dtype).requires_grad_(needed) for needed in (True, False))
        for _ in range(sets)
    ]

    def theirs(x):
        return F.dropout(F.relu(x) if relu else x, 0.1)

    def step(function):
        return lambda x, grad: torch.autograd.grad(function(x), x, grad)

    candidates = {
        "eager": step(theirs),
        "torch.compile": step(torch.compile(theirs)),
        OURS: step(lambda x: par_xl.dropout(x, 0.1, relu=relu, backend=OURS)),
    }
    race(candidates, inputs, OURS, tolerance=None, nbytes=(5 if relu else 4) * size, memory=True)
