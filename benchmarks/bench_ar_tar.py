"""AR/TAR, forward and backward, against the upstream lines in eager PyTorch and under torch.compile.

Bytes: forward reads both tensors; backward reads both and writes both gradients.
"""

import pytest
import torch

import par_xl

FULL = {  # (B, T, d), the shapes of a word-level AWD-LSTM and of wide models
    "cpu": [((64, 70, 1150), torch.float32), ((32, 512, 1024), torch.float32), ((64, 70, 1150), torch.bfloat16)],
    "cuda": [((64, 512, 2048), torch.bfloat16), ((70, 80, 400), torch.bfloat16), ((64, 70, 1150), torch.float32)],
}
CASES = FULL["cuda" if torch.cuda.is_available() else "cpu"]
KERNELS = ["native", "triton"] if torch.cuda.is_available() else ["native"]
IDS = ["x".join(map(str, shape)) + "-" + str(dtype).removeprefix("torch.") for shape, dtype in CASES]


def upstream(output, raw):
    """awd-lstm-lm's and fastai's lines (fastai's ``.float()`` matters in half precision alone)."""
    ar = 2.0 * output.float().pow(2).mean()
    return ar + 1.0 * (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()


def make_inputs(shape, dtype, device):
    """Enough pairs to leave the L2 behind on a GPU, one on the CPU."""
    size = 2 * torch.Size(shape).numel() * dtype.itemsize
    sets = max(1, -(-(256 << 20) // size)) if device == "cuda" else 1
    return [tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)) for _ in range(sets)]


def candidates(backends, backward):
    def step(loss):
        if backward:
            return lambda x, raw: torch.autograd.grad(loss(x, raw), (x, raw))
        return lambda x, raw: loss(x.detach(), raw.detach())

    def on(backend):
        return lambda x, raw: par_xl.ar_tar_loss(x, raw, backend=backend)

    return {
        "eager": step(upstream),
        "torch.compile": step(torch.compile(upstream)),
        **{b: step(on(b)) for b in backends},
    }


@pytest.mark.parametrize("ours", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward(race, device, shape, dtype, ours):
    inputs = make_inputs(shape, dtype, device)
    nbytes = 2 * inputs[0][0].nbytes
    race(candidates([ours], False), inputs, ours, tolerance=1e-2, nbytes=nbytes, read_only=True)


@pytest.mark.parametrize("ours", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward_backward(race, device, shape, dtype, ours):
    inputs = make_inputs(shape, dtype, device)
    nbytes = 6 * inputs[0][0].nbytes
    race(candidates([ours], True), inputs, ours, tolerance=1e-2, nbytes=nbytes, memory=True)
