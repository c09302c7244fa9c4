"""Relative-position attention with memory against every way of writing it, forward and backward.

A visible pair of query and key takes 6 D FLOP forward (two score products and one with the values) and, with the scores
recomputed, 16 D backward. The first candidate is the best eager layout (NVIDIA's DeepLearningExamples); plain SDPA has
no positions at all and is the floor of what the op could take.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import par_xl

FULL = {  # (B, H, Q, M, D)
    "cpu": [((4, 8, 256, 256, 64), torch.float32), ((2, 8, 512, 512, 64), torch.float32)],
    "cuda": [((64, 16, 512, 1600, 64), torch.bfloat16), ((16, 8, 512, 512, 64), torch.bfloat16)],
}
LONG, CLAMP = (1, 8, 512, 1600, 64), 400
GPU = torch.cuda.is_available()
CASES = FULL["cuda" if GPU else "cpu"]
KERNELS = ["native", "triton"] if GPU else ["native"]
WITH_BACKWARD = ["triton"] if GPU else ["native"]  # the CUDA kernel is a forward alone
IDS = ["x".join(map(str, shape)) + "-" + str(dtype).removeprefix("torch.") for shape, dtype in CASES]
TARGETS = {
    ("forward", (4, 8, 256, 256, 64)): "2.5 times eager, at most 1.6 times the time of plain SDPA",
    ("backward", (2, 8, 512, 512, 64)): "4 times eager, and faster than every peer",
}


def joined(k, v, k_memory, v_memory):
    return torch.cat((k_memory, k), 2), torch.cat((v_memory, v), 2)


def future(q, k):
    queries, keys = q.shape[2], k.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)


def position_scores(q, r, position_bias):
    """(B, H, Q, K), shifted: pad a column, reshape, drop a row."""
    raw = F.pad((q + position_bias[:, None]) @ r.mT, (1, 0))
    batch, heads, queries, keys = raw.shape
    return raw.view(batch, heads, keys, queries)[:, :, 1:].reshape(batch, heads, queries, keys - 1)


def eager(q, k, v, r, u, w, k_memory, v_memory, return_received=False):
    k, v = joined(k, v, k_memory, v_memory)
    score = ((q + u[:, None]) @ k.mT + position_scores(q, r, w)) * q.shape[3] ** -0.5
    weights = score.masked_fill(future(q, k), -torch.inf).softmax(3)
    return (weights @ v, weights.sum(2)) if return_received else weights @ v


def sdpa_mask(q, k, v, r, u, w, k_memory, v_memory):
    """NeMo's and Hugging Face's way: the position scores are SDPA's additive mask."""
    k, v = joined(k, v, k_memory, v_memory)
    mask = (position_scores(q, r, w) * q.shape[3] ** -0.5).masked_fill(future(q, k), -torch.inf)
    return F.scaled_dot_product_attention(q + u[:, None], k, v, attn_mask=mask)


@cache
def causal_blocks(queries, keys, device):
    return create_block_mask(lambda b, h, i, j: j <= i + keys - queries, None, None, queries, keys, device=device)


compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, r, u, w, k_memory, v_memory):
    """FlexAttention with captured position scores, which must be a tensor in memory. On the CPU it has no backward."""
    k, v = joined(k, v, k_memory, v_memory)
    queries, keys = q.shape[2], k.shape[2]
    raw = (q + w[:, None]) @ r.mT * q.shape[3] ** -0.5

    def add_position(score, b, h, i, j):
        return score + raw[b, h, i, (j - i + queries - 1).clamp(max=keys - 1)]

    mask = causal_blocks(queries, keys, q.device)
    return compiled_flex(q + u[:, None], k, v, score_mod=add_position, block_mask=mask)


def plain_sdpa(q, k, v, r, u, w, k_memory, v_memory):
    k, v = joined(k, v, k_memory, v_memory)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~future(q, k))


def ours(backend, **options):
    def call(q, k, v, r, u, w, k_memory, v_memory):
        return par_xl.rel_attention(q, k, v, r, u, w, memory=(k_memory, v_memory), backend=backend, **options)

    return call


def make_inputs(shape, dtype, device, distances=None):
    """Enough sets to leave the L2 behind on a GPU, one on the CPU. ``distances``: rows of r, else one for each key."""
    batch, heads, queries, memory, width = shape
    keys = queries + memory

    def randn(*size):
        return torch.randn(size, device=device).to(dtype).requires_grad_()

    def one():
        q, k, v = (randn(batch, heads, queries, width) for _ in range(3))
        r, *biases = (randn(heads, *n, width) for n in ((distances or keys,), (), ()))
        old_keys, old_values = (randn(batch, heads, memory, width) for _ in range(2))
        return q, k, v, r, *biases, old_keys, old_values, torch.ones_like(q)

    size = 2 * batch * heads * keys * width * dtype.itemsize
    return [one() for _ in range(max(1, -(-(256 << 20) // size)) if device == "cuda" else 1)]


def a_row_for_each_key(call):
    """``call`` with the last of the clamped distances repeated: what the clamp alone saves."""

    def run(q, k, v, r, u, w, k_memory, v_memory):
        distance = torch.arange(k.shape[2] + k_memory.shape[2] - 1, -1, -1, device=r.device)
        return call(q, k, v, r[:, CLAMP - distance.clamp(max=CLAMP)], u, w, k_memory, v_memory)

    return run


def timed(call, backward):
    """The output, and with ``backward`` the gradients of all inputs from that of the output, which comes last."""

    def run(*inputs):
        *inputs, grad = inputs
        with torch.set_grad_enabled(backward):
            out = call(*inputs)
        return (out, *torch.autograd.grad(out, inputs, grad, materialize_grads=True)) if backward else out

    return run


def candidates(backend, backward):
    peers = {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False), "SDPA mask": sdpa_mask}
    if GPU or not backward:
        peers["FlexAttention"] = flex
    rivals = {name: timed(call, backward) for name, call in {**peers, backend: ours(backend)}.items()}
    return rivals, {"plain SDPA": timed(plain_sdpa, backward)}


def pairs(shape):
    batch, heads, queries, memory, _ = shape
    return batch * heads * (queries * memory + queries * (queries + 1) // 2)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward(race, device, shape, dtype, backend):
    inputs, (rivals, floor) = make_inputs(shape, dtype, device), candidates(backend, False)
    flops, target = 6 * shape[4] * pairs(shape), TARGETS.get(("forward", shape), "")
    race(rivals, inputs, backend, floors=floor, tolerance=2e-2, flops=flops, target=target)


@pytest.mark.parametrize("backend", WITH_BACKWARD)
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=IDS)
def test_forward_backward(race, device, shape, dtype, backend):
    inputs, (rivals, floor) = make_inputs(shape, dtype, device), candidates(backend, True)
    flops, target = 22 * shape[4] * pairs(shape), TARGETS.get(("backward", shape), "")
    race(rivals, inputs, backend, floors=floor, tolerance=2e-2, flops=flops, target=target, memory=True)


@pytest.mark.parametrize("backend", WITH_BACKWARD)
def test_long_memory(race, device, backend):
    dtype = torch.bfloat16 if GPU else torch.float32
    inputs, (rivals, floor) = make_inputs(LONG, dtype, device), candidates(backend, True)
    flops, target = 22 * LONG[4] * pairs(LONG), "a tenth of eager's peak, beyond the results"
    race(rivals, inputs, backend, floors=floor, tolerance=2e-2, flops=flops, target=target, memory=True)


@pytest.mark.parametrize("backend", WITH_BACKWARD)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_clamped(race, device, backend, backward):
    inputs = make_inputs(LONG, torch.bfloat16 if GPU else torch.float32, device, distances=CLAMP + 1)
    rivals = {
        "eager": a_row_for_each_key(eager),
        "unclamped": a_row_for_each_key(ours(backend)),
        backend: ours(backend, clamp_len=CLAMP),
    }
    rivals = {name: timed(call, backward) for name, call in rivals.items()}
    race(rivals, inputs, backend, tolerance=2e-2)


@pytest.mark.parametrize("backend", WITH_BACKWARD)
def test_received(race, device, backend):
    """The forward, with the attention that each key received."""
    inputs = make_inputs(*CASES[0], device)
    calls = {"eager": partial(eager, return_received=True), backend: ours(backend, return_received=True)}
    race({name: timed(call, False) for name, call in calls.items()}, inputs, backend, tolerance=2e-2)
