"""Attention layers, adaptive embedding and position encodings against plain re-computations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from par_xl.nn import (
    AdaptiveEmbedding,
    MultiHeadAttn,
    RelLearnableMultiHeadAttn,
    RelPartialLearnableMultiHeadAttn,
    RelPositionMultiHeadAttention,
    sinusoids,
)

B, T, M, D_MODEL, HEADS, WIDTH = 2, 5, 3, 12, 2, 4
SIZES = HEADS, D_MODEL, WIDTH


def random_(module):
    """Weights that make every term of a result visible."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.4)
    return module


def by_distance(scores_by_row, n_keys):
    """(B, H, Q, P) to (B, H, Q, K), entry by entry: distance d has row K - 1 - d (a future without a row: any)."""
    n_queries, n_rows = scores_by_row.shape[2:]
    columns = [[min(j - i + n_queries - 1, n_rows - 1) for j in range(n_keys)] for i in range(n_queries)]
    return torch.stack([scores_by_row[:, :, i, row] for i, row in enumerate(columns)], 2)


def attend(scores, visible, v):
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v


def heads(x):
    return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def causal(left=None):
    distance = torch.arange(T)[:, None] + M - torch.arange(M + T)
    return (distance >= 0) & (distance <= (M + T if left is None else left))


def expected_layer(layer, w, mems, scores, left=None):
    """The layer around ``scores(q, k)``, with memory and segment concatenated."""
    both = torch.cat((mems, w), 1)
    source = F.layer_norm(both, (D_MODEL,), *layer.layer_norm.parameters()) if layer.pre_lnorm else both
    q, k, v = (heads(x) for x in (source @ layer.qkv_net.weight.T).chunk(3, -1))
    out = attend(scores(q[:, :, M:], k) / math.sqrt(WIDTH), causal(left), v)
    out = w + out.transpose(1, 2).flatten(2) @ layer.o_net.weight.T
    return out if layer.pre_lnorm else F.layer_norm(out, (D_MODEL,), *layer.layer_norm.parameters())


def assert_same_gradients(actual, expected, inputs):
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    pairs = (torch.autograd.grad(x, inputs, weight, retain_graph=True) for x in (actual, expected))
    for got, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.fixture
def states():
    return tuple(torch.randn(B, n, D_MODEL, dtype=torch.float64, requires_grad=True) for n in (T, M))


@pytest.mark.parametrize("left", [None, 2])
@pytest.mark.parametrize("untie_r", [False, True])
@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_rel_partial_learnable(states, pre_lnorm, untie_r, left):
    layer = random_(RelPartialLearnableMultiHeadAttn(*SIZES, pre_lnorm=pre_lnorm, untie_r=untie_r)).double()
    w, mems = states
    r, u, v = (torch.randn(*s, dtype=torch.float64) for s in ((M + T, D_MODEL), (HEADS, WIDTH), (HEADS, WIDTH)))
    given = () if untie_r else (u.requires_grad_(), v.requires_grad_())
    u, v = (layer.r_w_bias, layer.r_r_bias) if untie_r else given

    def scores(q, k):
        rows = heads((r @ layer.r_net.weight.T)[None])
        position = by_distance((q + v[:, None]) @ rows.mT, M + T)
        return (q + u[:, None]) @ k.mT + position

    actual = layer(w, r, *given, mems=mems, window=None if left is None else (left, 0))
    assert_same_gradients(actual, expected_layer(layer, w, mems, scores, left), [w, mems, u, v, *layer.parameters()])


def test_rel_learnable(states):
    layer = random_(RelLearnableMultiHeadAttn(*SIZES)).double()
    w, mems = states
    r, u, c = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True)
        for s in ((M + T, HEADS, WIDTH), (HEADS, WIDTH), (M + T, HEADS))
    )

    def scores(q, k):
        by_row = q @ r.transpose(0, 1).mT + c.T[:, None]
        return (q + u[:, None]) @ k.mT + by_distance(by_row, M + T)

    expected = expected_layer(layer, w, mems, scores)
    assert_same_gradients(layer(w, r, u, c, mems), expected, [w, mems, r, u, c, *layer.parameters()])


@pytest.mark.parametrize("kind", [RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn])
def test_clamped_distances_share_a_row(states, kind):
    layer, (w, mems) = random_(kind(*SIZES)).double(), states
    rows = 3 - torch.arange(M + T - 1, -1, -1).clamp(max=3)
    shapes = ((4, D_MODEL), (HEADS, WIDTH), (HEADS, WIDTH))
    if kind is RelLearnableMultiHeadAttn:
        shapes = (4, HEADS, WIDTH), (HEADS, WIDTH), (4, HEADS)
    r, u, x = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    expected = layer(w, r[rows], u, x[rows] if kind is RelLearnableMultiHeadAttn else x, mems)
    assert_same_gradients(layer(w, r, u, x, mems, clamp_len=3), expected, [w, mems, r, u, x, *layer.parameters()])


@pytest.mark.parametrize("left", [None, 2])
def test_attention_without_positions_normalises_keys_and_values_alone(states, left):
    layer = random_(MultiHeadAttn(*SIZES, pre_lnorm=True)).double()
    w, mems = states
    both = F.layer_norm(torch.cat((mems, w), 1), (D_MODEL,), *layer.layer_norm.parameters())
    q, (k, v) = heads(w @ layer.q_net.weight.T), (heads(x) for x in (both @ layer.kv_net.weight.T).chunk(2, -1))
    out = attend(q @ k.mT / math.sqrt(WIDTH), causal(left), v)
    expected = w + out.transpose(1, 2).flatten(2) @ layer.o_net.weight.T
    actual = layer(w, mems, window=None if left is None else (left, 0))
    assert_same_gradients(actual, expected, [w, mems, *layer.parameters()])


def test_biases_are_needed_exactly_once():
    w, r, bias = torch.randn(B, T, D_MODEL), torch.randn(T, D_MODEL), torch.randn(HEADS, WIDTH)
    for given in ((None, None), (bias, None), (None, bias)):
        with pytest.raises(ValueError, match="must both be given"):
            RelPartialLearnableMultiHeadAttn(*SIZES)(w, r, *given)
    for given in ((bias, bias), (bias, None), (None, bias)):
        with pytest.raises(ValueError, match="must not be given"):
            RelPartialLearnableMultiHeadAttn(*SIZES, untie_r=True)(w, r, *given)


def test_dropout_is_of_training_alone():
    layer = random_(RelPartialLearnableMultiHeadAttn(*SIZES, 0.3, 0.4, untie_r=True))
    w, r = torch.randn(B, T, D_MODEL), torch.randn(T, D_MODEL)
    assert not torch.equal(layer(w, r), layer(w, r))
    layer.eval()
    assert torch.equal(layer(w, r), layer(w, r))


@pytest.mark.parametrize("kind", [RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn, MultiHeadAttn])
def test_autocast(kind):
    layer = random_(kind(*SIZES))
    w, mems, bias = torch.randn(B, T, D_MODEL), torch.randn(B, M, D_MODEL), torch.randn(HEADS, WIDTH)
    positions = {
        RelPartialLearnableMultiHeadAttn: (torch.randn(M + T, D_MODEL), bias, bias),
        RelLearnableMultiHeadAttn: (torch.randn(M + T, HEADS, WIDTH), bias, torch.randn(M + T, HEADS)),
        MultiHeadAttn: (),
    }[kind]
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(w, *positions, mems=mems)
    torch.testing.assert_close(actual.float(), layer(w, *positions, mems=mems), atol=0.1, rtol=0.1)


# Speech encoders


def speech(**options):
    return random_(RelPositionMultiHeadAttention(HEADS, D_MODEL, **options)).double()


def positions(n_keys, n_queries):
    return sinusoids(torch.arange(n_keys - 1, -n_queries, -1), D_MODEL, interleaved=True, dtype=torch.float64)


def expected_speech(layer, x, visible):
    split = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(linear(x)) for linear in (layer.linear_q, layer.linear_k, layer.linear_v))
    n = x.shape[1]
    rows = split(layer.linear_pos(positions(n, n))[None])
    by_row = (q + layer.pos_bias_v[:, None]) @ rows.mT
    scores = (q + layer.pos_bias_u[:, None]) @ k.mT + by_distance(by_row, n)
    out = attend(scores / math.sqrt(D_MODEL // HEADS), visible, v)
    return layer.linear_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("context", [(None, None), (2, 1), (3, 0)])
def test_speech_attention_with_padding(context):
    layer, x = speech(context=context), torch.randn(B, 7, D_MODEL, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([7, 4])
    distance = torch.arange(7)[:, None] - torch.arange(7)
    left, right = (99 if limit is None else limit for limit in context)
    visible = ((distance <= left) & (distance >= -right)) & (torch.arange(7) < lengths[:, None, None])[:, None]
    real = torch.arange(7) < lengths[:, None]
    padding_mask = ~real
    visible = visible | (distance == 0) & padding_mask[:, None, :, None]  # not NaN, where nothing is compared
    for options in ({"lengths": lengths}, {"padding_mask": padding_mask}, {"padding_mask": padding_mask.byte()}):
        actual = layer(x, positions(7, 7)[None], **options)
        assert torch.isfinite(actual).all()
        assert_same_gradients(actual[real], expected_speech(layer, x, visible)[real], [x, *layer.parameters()])
    with pytest.raises(ValueError, match="not both"):
        layer(x, positions(7, 7), lengths=lengths, padding_mask=padding_mask)
    with pytest.raises(ValueError, match="behind"):
        layer(x, positions(7, 7), padding_mask=padding_mask.flip(1))


@pytest.mark.parametrize("left", [3, None])
def test_streaming_is_one_pass(left):
    layer, x = speech(context=(left, 0)), torch.randn(B, 10, D_MODEL, dtype=torch.float64)
    cache, parts = x[:, :0], []
    for chunk in x.split((4, 1, 2, 3), 1):
        n_keys = cache.shape[1] + chunk.shape[1]
        out, cache = layer.stream(chunk, positions(n_keys, chunk.shape[1]), cache)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, positions(10, 10)))
    assert torch.equal(cache, x if left is None else x[:, -left:])


def test_speech_attention_shares_biases_and_has_the_names_of_nemo_and_espnet():
    first = speech()
    second = RelPositionMultiHeadAttention(HEADS, D_MODEL, pos_bias_u=first.pos_bias_u, pos_bias_v=first.pos_bias_v)
    assert second.pos_bias_u is first.pos_bias_u and second.pos_bias_v is first.pos_bias_v
    linear = {f"linear_{x}.{y}" for x in ("q", "k", "v", "out") for y in ("weight", "bias")}
    assert set(first.state_dict()) == {*linear, "linear_pos.weight", "pos_bias_u", "pos_bias_v"}
    with pytest.raises(ValueError, match="multiple"):
        RelPositionMultiHeadAttention(5, D_MODEL)


# Embedding and encodings


@pytest.mark.parametrize(("cutoffs", "div_val", "d_embed"), [((), 1, 12), ((), 1, 8), ((5, 9), 1, 8), ((5, 9), 2, 8)])
def test_adaptive_embedding(cutoffs, div_val, d_embed):
    embedding = random_(AdaptiveEmbedding(14, d_embed, D_MODEL, cutoffs, div_val)).double()
    tables = [layer.weight for layer in embedding.emb_layers]
    projections = list(embedding.emb_projs) or [torch.eye(D_MODEL, dtype=torch.float64)]
    table = torch.cat([t @ p.T for t, p in zip(tables, projections, strict=True)]) * math.sqrt(D_MODEL)
    tokens = torch.tensor([[0, 4, 5, 8], [9, 13, 4, 4]])
    assert_same_gradients(embedding(tokens), table[tokens], list(embedding.parameters()))
    for outside in (-1, 14):
        with pytest.raises(IndexError):
            embedding(torch.tensor([[outside]]))


def test_adaptive_embedding_refuses_bad_cutoffs():
    for cutoffs in ([5, 5], [9, 5], [0], [14]):
        with pytest.raises(ValueError, match="cutoffs"):
            AdaptiveEmbedding(14, 8, D_MODEL, cutoffs, 2)
    with pytest.raises(ValueError, match="div_val 4 leaves tail 2 of 2 no feature: 8 / 4"):
        AdaptiveEmbedding(14, 8, D_MODEL, [5, 9], 4)


def test_sinusoids_are_exact_where_bf16_cannot_count():
    distances = torch.arange(4000)
    rows = sinusoids(distances, 8, dtype=torch.bfloat16)
    exact = sinusoids(distances, 8, dtype=torch.float64)
    frequencies = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    angles = distances[:, None] * frequencies
    torch.testing.assert_close(exact, torch.cat((angles.sin(), angles.cos()), 1), atol=1e-10, rtol=0)
    assert rows.dtype == torch.bfloat16
    assert (rows.double() - exact).abs().max() < 2**-8  # positions in bf16 would be off by up to 16 steps
    interleaved = sinusoids(distances, 8, interleaved=True)
    assert torch.equal(interleaved, sinusoids(distances, 8).view(-1, 2, 4).transpose(1, 2).flatten(1))
    with pytest.raises(ValueError, match="even"):
        sinusoids(distances, 7)
