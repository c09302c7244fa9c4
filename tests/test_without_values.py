"""Tensors without values, on the meta device and as torch's FakeTensors: shapes for memory planning and tracing.

Each op is checked by ``OpChecks.test_without_values``.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import par_xl
from par_xl import models
from par_xl.nn import RelPositionMultiHeadAttention
from par_xl.ops import compressed_attention

V, B, T = 17, 2, 6
SIZES = dict(vocab_size=V, n_layer=2, n_head=2, d_model=8, d_inner=16, mem_len=8, cutoffs=(5, 11), dropout=0.1)
MODELS = {
    "awd-lstm": lambda: models.AWDLSTM(models.AWDLSTMConfig(V, d_model=6, d_hidden=8, cutoffs=(5, 11))),
    "transformer-xl": lambda: models.TransformerXL(models.TransformerXLConfig(**SIZES, clamp_len=4)),
    "supernet": lambda: models.ParSuperNet(models.ParConfig(**SIZES)),
    **{
        f"compressive-{mode}": lambda mode=mode: models.CompressiveTransformer(
            models.CompressiveConfig(**SIZES, compressed_len=4, rate=2, compression=mode)
        )
        for mode in ("mean", "conv", "most_used")
    },
}


def check(function):
    """That shapes and dtypes of what ``function`` returns are the same with and without values."""

    def described():
        return [(x.shape, x.dtype) for x in tree_leaves(function()) if isinstance(x, torch.Tensor)]

    real = described()
    with FakeTensorMode():
        assert described() == real
    with torch.device("meta"):
        assert described() == real


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, train):
    def two_segments():
        model, tokens = MODELS[name]().train(train), torch.zeros(B, T, dtype=torch.long)
        first = model(tokens, tokens)
        second = model(tokens, tokens, first.memory)
        (first.loss + second.loss).backward()
        return first.loss, first.memory, second.loss, second.memory

    check(two_segments)


def test_padded_speech():
    def attend():
        layer = RelPositionMultiHeadAttention(2, 8)
        padding_mask = torch.zeros(B, T, dtype=torch.bool)
        out = layer(torch.zeros(B, T, 8), torch.zeros(2 * T - 1, 8), padding_mask=padding_mask)
        out.sum().backward()
        return out

    check(attend)


@pytest.mark.parametrize("chosen", ["eager", "auto"])
def test_compressed_attention(chosen):
    def attend():
        q, r, rows = (torch.zeros(*shape, 8, requires_grad=True) for shape in ((B, 2, T), (2, T), (2, 2 * T - 1)))
        out = compressed_attention(q, q, q, r, compressed=(q, q), compressed_r=rows, dropout_p=0.1, backend=chosen)
        return out, torch.autograd.grad(out.sum(), (q, r, rows))

    check(attend)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("chosen", ["eager", "native"])
def test_a_trace_of_adaptive_nll_computes_what_it_does(chosen, reduction):
    """Traced with FakeTensors, where nobody knows which tokens are in which tail."""
    x, head, *tails = torch.randn(7, 8), torch.randn(6, 8), torch.randn(3, 8), torch.randn(4, 8)
    targets = [torch.tensor(rows) for rows in ([0, 6, 5, 3, 10, 8, -100], [1, 2, 9, 9, 0, -100, 10])]

    def loss(x, head, first, second, target):
        return par_xl.adaptive_nll(
            x, target, [head, first, second], (4, 7), reduction=reduction, backend=chosen, label_smoothing=0.1
        )

    traced = make_fx(loss, tracing_mode="fake")(x, head, *tails, targets[0])
    for target in targets:
        torch.testing.assert_close(traced(x, head, *tails, target), loss(x, head, *tails, target))
