"""Compression against torch's pooling and convolution, and the memory update against cat, slice and pool.

Bytes: pooling reads the memory and writes a ``rate``-th of it, backward the other way; the update reads and writes the
whole state, which its readers want in one piece, oldest first.
"""

import pytest
import torch
import torch.nn.functional as F

import par_xl
from par_xl.nn import CompressiveMemory, Compressor

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
KERNELS = ["native", "triton"] if GPU else ["native"]
BATCH, STEPS, WIDTH, RATE = 16, 512, 1024, 4


def transposed(pool):
    return lambda x: pool(x.transpose(1, 2)).transpose(1, 2)


def groups(x):
    return x.unflatten(1, (-1, RATE))


PEERS = {
    "mean": {"reshape": lambda x: groups(x).mean(2), "avg_pool1d": transposed(lambda m: F.avg_pool1d(m, RATE))},
    "max": {
        "reshape": lambda x: groups(x).max(2).values,
        "amax": lambda x: groups(x).amax(2),
        "max_pool1d": transposed(lambda m: F.max_pool1d(m, RATE)),
    },
}


@pytest.mark.parametrize("ours", KERNELS)
@pytest.mark.parametrize("mode", PEERS)
def test_pooling(race, device, mode, ours):
    sets = 8 if GPU else 1
    inputs = [(torch.randn(BATCH, STEPS, WIDTH, device=device, dtype=DTYPE).requires_grad_(),) for _ in range(sets)]
    grad = torch.randn(BATCH, STEPS // RATE, WIDTH, device=device, dtype=DTYPE)

    def step(function):
        return lambda x: torch.autograd.grad(function(x), x, grad)

    candidates = {name: step(peer) for name, peer in PEERS[mode].items()}
    candidates["torch.compile"] = step(torch.compile(PEERS[mode]["reshape"]))
    candidates[ours] = step(lambda x: par_xl.compress(x, RATE, mode, backend=ours))
    nbytes = 2 * inputs[0][0].nbytes * (RATE + 1) // RATE
    target = "as fast as the best peer, 3 times the transposed pool1d" if not GPU else "90 % of the copy bandwidth"
    race(candidates, inputs, ours, tolerance=1e-2, nbytes=nbytes, target=target)


@pytest.mark.parametrize("ours", KERNELS)
def test_conv(race, device, ours):
    x, weight = (torch.randn(*s, device=device, dtype=DTYPE) for s in ((4, STEPS, WIDTH), (WIDTH, WIDTH, RATE)))
    candidates = {
        "conv1d": lambda x, w: transposed(lambda m: F.conv1d(m, w, stride=RATE))(x),
        ours: lambda x, w: par_xl.compress(x, RATE, "conv", weight=w, backend=ours),
    }
    race(candidates, [(x, weight)], ours, tolerance=1e-2, flops=2 * x.numel() * WIDTH)


@pytest.mark.parametrize("ours", KERNELS)
def test_update(race, device, ours):
    """B 8, T 128, M = C = 1600, rate 4, d 1024: a step of a running memory, so each candidate keeps its own state."""
    batch, segment, length = 8, 128, 1600
    hidden = torch.randn(batch, segment, WIDTH, device=device, dtype=DTYPE)
    start = torch.zeros(batch, 2 * length, WIDTH, device=device, dtype=DTYPE)
    state = list(start.split(length, 1))

    def eager(hidden):
        compressed, memory = state
        fresh = groups(memory[:, :segment]).mean(2)
        state[:] = (
            torch.cat([compressed, fresh], 1)[:, -length:],
            torch.cat([memory, hidden], 1)[:, -length:],
        )
        return state[1][:, -segment:]

    memory = CompressiveMemory(Compressor(WIDTH, RATE), length, length).to(device, DTYPE)
    memory.reset(batch, "zero")

    def fused(hidden):
        with par_xl.use_backend(ours):
            memory.update(hidden)
        return memory.rows[:, -segment:]

    target = "5 times cat + slice" if not GPU else "1.3 times the byte floor"
    nbytes = 2 * start.nbytes
    race({"cat + slice": eager, ours: fused}, [(hidden,)], ours, tolerance=1e-2, nbytes=nbytes, target=target)
