"""accelerate() on the relative attention of ESPnet and NeMo, rebuilt here from the maths."""

import copy
import math
import pickle

import pytest
import torch
from test_rel_modules import D_MODEL, HEADS, by_distance, positions, random_
from torch import nn

import par_xl

B, T, CACHE = 3, 7, 9
WIDTH = D_MODEL // HEADS


class Upstream(nn.Module):
    """The parts that both have; counts the calls that it computes itself."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.h, self.d_k, self.calls, self.cache_drop_size, self.zero_triu = HEADS, WIDTH, 0, None, False
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            setattr(self, name, nn.Linear(D_MODEL, D_MODEL))
        self.linear_pos = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.zeros(HEADS, WIDTH)) for _ in range(2))

    def rel_shift(self, x, n_keys):
        return by_distance(x, n_keys)

    def compute(self, query, key, value, pos_emb, hidden):
        self.calls += 1
        inputs = self.linear_q(query), self.linear_k(key), self.linear_v(value), self.linear_pos(pos_emb)
        q, k, v, r = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in inputs)
        by_row = (q + self.pos_bias_v[:, None]) @ r.mT
        scores = (q + self.pos_bias_u[:, None]) @ k.mT + self.rel_shift(by_row, k.shape[2])
        hidden = torch.zeros(()).bool() if hidden is None else hidden[:, None]
        weights = (scores / math.sqrt(WIDTH)).masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
        return self.linear_out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))


class Espnet(Upstream):
    def forward(self, query, key, value, pos_emb, mask):
        return self.compute(query, key, value, pos_emb, None if mask is None else mask == 0)


class Nemo(Upstream):
    def forward(self, query, key, value, mask, pos_emb, cache=None):
        if cache is not None:
            n_kept = query.shape[1] - self.cache_drop_size
            key = value = torch.cat((cache, key), 1)
            cache = torch.cat((cache[:, n_kept:], query[:, :n_kept]), 1)
        out = self.compute(query, key, value, pos_emb, mask)
        return out if cache is None else (out, cache)


class Legacy(Espnet):
    """Has ESPnet's call."""


class Wenet(Upstream):
    """Has ESPnet's name."""

    def forward(self, query, key, value, mask, pos_emb, cache=None):
        raise NotImplementedError


Espnet.__name__ = Wenet.__name__ = "RelPositionMultiHeadedAttention"
Nemo.__name__ = Nemo.__qualname__ = "RelPositionMultiHeadAttention"
RelPositionMultiHeadAttention = Nemo  # where pickle looks
Legacy.__name__ = "LegacyRelPositionMultiHeadedAttention"


def both(kind, **options):
    """Upstream's layer, and a model with its twin."""
    theirs = random_(kind(**options)).double()
    ours = nn.ModuleList([copy.deepcopy(theirs)])
    parameters = dict(ours.named_parameters())
    swapped = par_xl.accelerate(ours)
    assert list(swapped) == ["0"] and swapped["0"] is ours[0] and isinstance(ours[0], kind)
    after = dict(ours.named_parameters())
    assert list(after) == list(parameters) and all(after[name] is x for name, x in parameters.items())
    return theirs, ours[0]


def call(layer, x, mask, *cache, pos_emb=None):
    n_keys = x.shape[1] + sum(c.shape[1] for c in cache)
    pos_emb = positions(n_keys, n_keys)[None] if pos_emb is None else pos_emb
    last = (pos_emb, mask) if isinstance(layer, Espnet) else (mask, pos_emb, *cache)
    return layer(x, x, x, *last)


def assert_same(theirs, ours, *arguments, fused, **options):
    x = torch.randn(B, T, D_MODEL, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in (theirs, ours):
        layer.calls = 0
        out = call(layer, x, *arguments, **options)
        first = out[0] if isinstance(out, tuple) else out
        results.append((out, torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(*results)
    assert ours.calls == (0 if fused else 1)


def padding(n_keys=T, lengths=(7, 3, 5)):
    """Which keys are real, ``(B, 1, K)``."""
    return (torch.arange(n_keys) < n_keys - T + torch.tensor(lengths)[:, None])[:, None]


def near(left, right, n_keys=T):
    """A window, ``(T, K)``."""
    distance = torch.arange(T)[:, None] + (n_keys - T) - torch.arange(n_keys)
    return (distance <= left) & (distance >= -right)


def chunks(size):
    """Every frame sees its own chunk and what came before."""
    chunk = torch.arange(T) // size
    return chunk[:, None] >= chunk


def hole():
    keeps = padding().clone()
    keeps[1, 0, 1] = False
    return keeps


KEPT = {
    "none": (None, True),
    "padding": (padding(), True),
    "an empty sequence": (padding(lengths=(7, 0, 5)), True),
    "of all pairs": (padding() & padding().mT, True),
    "padding, for all": (padding()[2:], True),
    "window": (near(2, 1)[None].expand(B, T, T), True),
    "causal, for all": (near(T, 0)[None], True),
    "all but the farthest": (near(T - 2, T - 2)[None], True),
    "the past alone": (near(T, -1)[None], False),
    "window of padded pairs": (near(3, 0) & padding() & padding().mT, True),
    "the future alone": (near(-1, T)[None].expand(B, T, T), True),
    "the far future alone": (near(-2, T)[None].expand(B, T, T), False),
    "a hole": (hole(), False),
    "chunks": (chunks(3)[None] & padding(), False),
    "padding in front": (padding().flip(2), False),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", [Espnet, Nemo])
def test_a_twin_computes_what_its_layer_does(kind, name):
    keeps, fused = KEPT[name]
    mask = keeps if keeps is None or kind is Espnet else ~keeps
    assert_same(*both(kind), mask, fused=fused)


def test_espnets_mask_may_be_of_numbers_and_change_in_place():
    theirs, ours = both(Espnet)
    mask = padding().int() * 2
    assert_same(theirs, ours, mask, fused=True)
    mask[0, 0, -1] = 0
    assert_same(theirs, ours, mask, fused=True)
    mask[0, 0, 0] = 0
    assert_same(theirs, ours, mask, fused=False)
    with torch.inference_mode():
        x, mask = torch.randn(B, T, D_MODEL, dtype=torch.float64), padding().int()
        for _ in range(2):
            torch.testing.assert_close(call(ours, x, mask), call(theirs, x, mask))
            mask[0, 0, -1] = 0


def test_layers_with_other_ideas_of_a_mask_may_share_it():
    mask = near(2, 0)[None]
    assert_same(*both(Espnet), mask, fused=True)
    assert_same(*both(Nemo), mask, fused=False)


def test_an_empty_batch():
    theirs, ours = both(Espnet)
    x = torch.randn(0, T, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(call(ours, x, padding()[:0]), call(theirs, x, padding()[:0]))


def test_positions_that_the_kernel_does_not_take():
    theirs, ours = both(Espnet)
    assert_same(theirs, ours, padding(), pos_emb=torch.randn(B, 2 * T - 1, D_MODEL, dtype=torch.float64), fused=False)
    ours.calls = 0
    x = torch.randn(B, T, D_MODEL, dtype=torch.float64)
    call(ours, x, None, pos_emb=positions(T + 1, T + 1)[None])  # their sizes do not fit: for their code to say
    assert ours.calls == 1


@pytest.mark.parametrize("left", [CACHE - 1, T + CACHE])
def test_nemos_cache(left):
    theirs, ours = both(Nemo)
    theirs.cache_drop_size = ours.cache_drop_size = 2  # set by the encoder, after the swap
    cache = torch.randn(B, CACHE, D_MODEL, dtype=torch.float64)
    n_keys = CACHE + T
    keeps = padding(n_keys) & near(left, 0, n_keys)
    assert_same(theirs, ours, ~keeps, cache, fused=True)
    keeps[1, :, :2] = False  # a cache that is not full
    assert_same(theirs, ours, ~keeps, cache, fused=False)


def test_nemos_stream_is_one_pass():
    _, ours = both(Nemo)
    ours.cache_drop_size = 0
    x = torch.randn(B, CACHE + 2 * T, D_MODEL, dtype=torch.float64)
    hidden = torch.ones(x.shape[1], x.shape[1]).tril().triu(-CACHE)[None] == 0
    cache = x[:, :CACHE]
    parts = [call(ours, cache, hidden[:, :CACHE, :CACHE])]
    for start in (CACHE, CACHE + T):
        end = start + T
        out, cache = call(ours, x[:, start:end], hidden[:, start:end, start - CACHE : end], cache)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), call(ours, x, hidden))
    assert torch.equal(cache, x[:, -CACHE:]) and ours.calls == 0


def test_dropout_is_of_the_weights_in_training_alone():
    theirs, ours = both(Nemo, dropout=0.4)
    x = torch.randn(1, T, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(call(ours.eval(), x, None), expected := call(theirs.eval(), x, None))
    ours.train()
    torch.manual_seed(0)
    drawn = torch.stack([call(ours, x, None) for _ in range(800)])
    theirs.train()
    others = torch.stack([call(theirs, x, None) for _ in range(800)])
    assert (drawn.mean(0) - expected).abs().max() < 5 * (drawn.std(0) / 800**0.5).max()
    torch.testing.assert_close(drawn.std(0), others.std(0), atol=0.05, rtol=0.2)


def test_layers_of_other_functions_are_left_alone():
    causal, extra = Espnet(), Nemo()
    causal.zero_triu = True
    extra.q_norm = nn.LayerNorm(WIDTH)
    model = nn.ModuleList([Legacy(), Wenet(), causal, extra, par_xl.nn.RelPositionMultiHeadAttention(HEADS, D_MODEL)])
    before = list(model)
    assert par_xl.accelerate(model) == {} and all(a is b for a, b in zip(model, before, strict=True))
    twins = nn.ModuleList([Espnet(), Nemo()])
    assert len(par_xl.accelerate(twins)) == 2 and par_xl.accelerate(twins) == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_twin_can_be_copied_and_pickled(duplicate):
    _, ours = both(Nemo)
    other = duplicate(ours)
    x = torch.randn(B, T, D_MODEL, dtype=torch.float64)
    assert type(other) is type(ours) and torch.equal(call(other, x, None), call(ours, x, None)) and other.calls == 0
    assert other.linear_q.weight is not ours.linear_q.weight


def test_a_layers_own_parts_keep_their_modes():
    layer = Espnet(dropout=0.5)
    layer.dropout.eval()  # frozen by hand
    model = nn.ModuleList([layer])
    par_xl.accelerate(model)
    assert model[0].training and not model[0].dropout.training
