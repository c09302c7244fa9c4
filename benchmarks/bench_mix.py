"""The mixture of a stochastic block, forward and backward, against the published lines in eager PyTorch and compiled.

Bytes: forward reads the input and two branches and writes the result; backward reads these three and the gradient and
writes three gradients.
"""

import pytest
import torch

import par_xl

FULL = {  # (B, T, d): the published project's small and default configurations, and a wide one
    "cpu": [((32, 32, 128), torch.float32), ((8, 128, 256), torch.float32), ((8, 512, 1024), torch.float32)],
    "cuda": [((32, 32, 128), torch.bfloat16), ((64, 128, 256), torch.bfloat16), ((32, 512, 1024), torch.bfloat16)],
}
CASES = FULL["cuda" if torch.cuda.is_available() else "cpu"]
KERNELS = ["triton"] if torch.cuda.is_available() else ["native"]
IDS = ["x".join(map(str, shape)) + "-" + str(dtype).removeprefix("torch.") for shape, dtype in CASES]


def make_inputs(shape, dtype, device):
    """Enough sets to leave the L2 behind on a GPU, one on the CPU."""
    size = 3 * torch.Size(shape).numel() * dtype.itemsize
    sets = max(1, -(-(256 << 20) // size)) if device == "cuda" else 1

    def one():
        stream = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
        parameters = [torch.rand(n, device=device) for n in (3, *[shape[-1]] * 4)]
        return tuple(x.requires_grad_() for x in stream + parameters)

    return [one() for _ in range(sets)]


def published(x, attended, dense, weights, gamma_0, beta_0, gamma_1, beta_1):
    first = torch.nn.functional.layer_norm(x + attended, gamma_0.shape, gamma_0.to(x.dtype), beta_0.to(x.dtype))
    second = torch.nn.functional.layer_norm(x + dense, gamma_1.shape, gamma_1.to(x.dtype), beta_1.to(x.dtype))
    return weights[0] * first + weights[1] * second + weights[2] * x


def candidates(ours, backward):
    def step(function):
        if backward:
            return lambda *inputs: torch.autograd.grad(function(*inputs).sum(), inputs)
        return lambda *inputs: function(*(x.detach() for x in inputs))

    return {
        "eager": step(published),
        "torch.compile": step(torch.compile(published)),
        ours: step(lambda *inputs: par_xl.mix(*inputs, backend=ours)),
    }


@pytest.mark.parametrize("ours", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward(race, device, shape, dtype, ours):
    inputs = make_inputs(shape, dtype, device)
    race(candidates(ours, False), inputs, ours, tolerance=1e-2, nbytes=4 * inputs[0][0].nbytes)


@pytest.mark.parametrize("ours", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward_backward(race, device, shape, dtype, ours):
    inputs = make_inputs(shape, dtype, device)
    race(candidates(ours, True), inputs, ours, tolerance=1e-2, nbytes=11 * inputs[0][0].nbytes, memory=True)
