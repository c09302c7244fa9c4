"""What trains a compressor: the auxiliary losses, which gradient goes where, and back-propagation through time."""

import pytest
import torch
from test_compressive_memory import new_memory
from torch import nn

import par_xl
from par_xl.nn import AttentionReconstructionLoss, AutoEncodingLoss, reduce_layers
from par_xl.testing import peak_memory


class Layer(nn.Module):
    """Queries, keys and values of two heads, and the loss of what they read."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def weights(self):
        return self.query.weight, self.key.weight, self.value.weight


@pytest.fixture
def evicted():
    memory = new_memory("conv", start="zero")
    memory.update(torch.randn(3, 8, 6))
    return memory, memory.update(torch.randn(3, 4, 6))


def gradients(loss, *tensors):
    return [
        g is not None and bool(g.any())
        for g in torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
    ]


@pytest.mark.parametrize("free", [None, "stop_hidden", "stop_old", "stop_weights"])
def test_where_attention_reconstruction_sends_gradients(free, evicted):
    """As published into the compressor alone; each flag opens one more way. ``detach_`` on a weight would freeze it."""
    memory, out = evicted
    layer, hidden = Layer(), torch.randn(3, 4, 6, requires_grad=True)
    old = out.rows.clone().requires_grad_()
    function = AttentionReconstructionLoss(2, **({free: False} if free else {}))
    tensors = *memory.compressor.weights, hidden, old, *layer.weights()
    loss = function(hidden, old, out.compressed, *layer.weights())
    wanted = [True, free == "stop_hidden", free == "stop_old", *[free == "stop_weights"] * 3]
    assert gradients(loss, *tensors) == wanted
    assert all(weight.requires_grad for weight in layer.weights())


def test_attention_reconstruction_is_the_published_expression(evicted):
    """Scaled content attention, no mask, over the evicted steps alone."""
    _, out = evicted
    layer, hidden = Layer(), torch.randn(3, 4, 6)

    def read(x):
        q, k, v = (
            f(y).view(3, -1, 2, 3) for f, y in zip((layer.query, layer.key, layer.value), (hidden, x, x), strict=True)
        )
        p = torch.einsum("bihd,bjhd->bhij", q * 3**-0.5, k).softmax(-1)
        return torch.einsum("bhij,bjhd->bhid", p, v)

    error = (read(out.rows) - read(out.compressed)).square()
    for reduction in ("mean", "sum"):
        loss = par_xl.nn.attention_reconstruction_loss(
            hidden, out.rows, out.compressed, *layer.weights(), 2, reduction=reduction
        )
        torch.testing.assert_close(loss, getattr(error, reduction)())


def test_attention_reconstruction_keeps_no_matrix_of_queries_times_steps():
    """Forward and backward, on the CPU too."""
    hidden, old, compressed = (torch.randn(1, n, 64, requires_grad=True) for n in (1024, 2048, 1024))
    weights, matrices = [torch.randn(64, 64) for _ in range(3)], 4 * 4 * 1024 * 2048
    loss = AttentionReconstructionLoss(4)
    peak = peak_memory(lambda: loss(hidden, old, compressed, *weights).backward(), hidden.device)
    assert peak < matrices


def test_auto_encoding_is_the_published_expression(evicted):
    memory, out = evicted
    function = AutoEncodingLoss(6, 2)
    old = out.rows.clone().requires_grad_()
    loss = function(old, out.compressed)
    decoded = function.decoder(out.compressed.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(loss, (decoded - old).square().mean())
    assert gradients(loss, *memory.compressor.weights, function.decoder.weight, old) == [True, True, False]
    summed = AutoEncodingLoss(6, 2, stop_old=False, reduction="sum")
    loss = summed(old, out.compressed)
    decoded = summed.decoder(out.compressed.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(loss, (decoded - old).square().sum())
    assert gradients(loss, *memory.compressor.weights, summed.decoder.weight, old) == [True, True, True]


def test_bptt_trains_the_compressor_through_the_task():
    """Without it the task sends nothing into the compressor; ``detach`` truncates it."""
    for bptt in (False, True):
        memory = new_memory("conv", bptt=bptt)
        for _ in range(4):
            evicted = memory.update(torch.randn(3, 4, 6))
        assert memory.rows.requires_grad == bptt and not evicted.rows.requires_grad
        if bptt:
            assert gradients(memory.rows[:, : memory.compressed].sum(), *memory.compressor.weights) == [True]
            assert gradients(memory.rows[:, memory.compressed :].sum(), *memory.compressor.weights) == [False]
            memory.detach()
            assert not memory.rows.requires_grad


def test_reduction_over_layers():
    losses = [torch.tensor(1.0), torch.tensor(3.0)]
    assert reduce_layers(losses, "mean") == 2 and reduce_layers(losses, "sum") == 4
    with pytest.raises(ValueError, match="reduction must be"):
        reduce_layers(losses, "max")


@pytest.mark.parametrize("steps", [0, 2])
def test_bad_input(steps):
    old, compressed, weights = torch.zeros(2, 2 * steps, 6), torch.zeros(2, steps, 6), [torch.zeros(6, 6)] * 3
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum", not \'none\''):
        AutoEncodingLoss(6, 2, reduction="none")(old, compressed)
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum", not \'none\''):
        AttentionReconstructionLoss(2, reduction="none")(old, old, compressed, *weights)
    with pytest.raises(ValueError, match="hidden, old and compressed must have one batch size, not 2, 1 and 2"):
        AttentionReconstructionLoss(2)(old, old[:1], compressed, *weights)
    with pytest.raises(ValueError, match=rf"old must have shape \(2, {2 * steps}, 6\), not \(1, {2 * steps}, 6\)"):
        AutoEncodingLoss(6, 2)(old[:1], compressed)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype, reduction):
    """A square of 300 does in fp16, and so does a sum of squares."""
    old, compressed = torch.full((2, 8, 6), 300.0), torch.randn(2, 4, 6)
    module, layer = AutoEncodingLoss(6, 2, reduction=reduction), Layer()
    reconstruction = AttentionReconstructionLoss(2, reduction=reduction)
    for function, inputs in (
        (module, (old, compressed)),
        (reconstruction, (compressed, old, compressed, *layer.weights())),
    ):
        exact = function(*inputs)
        loss = function.to(dtype)(*[x.to(dtype) for x in inputs])
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_nothing_was_evicted():
    """The first segments: the loss is 0 and can be differentiated."""
    memory, layer = new_memory("conv"), Layer()
    out = memory.update(torch.randn(3, 4, 6))
    assert AttentionReconstructionLoss(2)(torch.randn(3, 4, 6), out.rows, out.compressed, *layer.weights()) == 0
    assert AutoEncodingLoss(6, 2)(out.rows, out.compressed) == 0
