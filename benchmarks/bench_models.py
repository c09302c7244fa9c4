"""A training step of whole models, memory included: this library against the same model with upstream's attention.

"upstream" has the eager lines of NVIDIA's Transformer-XL for attention (concatenated memory, pad-and-view shift, masked
softmax) and adaptive softmax in plain PyTorch; "eager" is this library's own reference backend.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timing import compare

import par_xl
from par_xl.models import ParConfig, ParSuperNet, TransformerXL, TransformerXLConfig

WORDS = dict(vocab_size=33278, cutoffs=(2000, 10000), div_val=2, tie_projs=(False, True, True))
FULL = {  # name: (configuration, batch, length of the segment)
    "cpu": {"6x256, 128+128, batch 8": (dict(n_layer=6, n_head=8, d_model=256, d_head=32, d_inner=1024), 8, 128)},
    "cuda": {
        "6x256, 128+128, batch 8": (dict(n_layer=6, n_head=8, d_model=256, d_head=32, d_inner=1024), 8, 128),
        "16x512, 192+192, batch 32": (dict(n_layer=16, n_head=8, d_model=512, d_head=64, d_inner=2048), 32, 192),
        "18x1024, 384+384, batch 16": (dict(n_layer=18, n_head=16, d_model=1024, d_head=64, d_inner=4096), 16, 384),
    },
}
CASES = FULL["cuda" if torch.cuda.is_available() else "cpu"]


def upstream_attention(q, k, v, r, content_bias, position_bias, *, memory, window, clamp_len, scale, dropout_p):
    """rel_attention as NVIDIA's mem_transformer.py computes it; these models have no window and clamp no distance."""
    assert window is None and clamp_len is None
    k, v = (torch.cat((m, x), 2) for m, x in zip(memory, (k, v), strict=True))
    n_queries, n_keys = q.shape[2], k.shape[2]
    position = (q + position_bias[:, None]) @ r.mT
    position = F.pad(position, (1, 0)).view(*q.shape[:2], n_keys + 1, n_queries)[:, :, 1:].view_as(position)
    scores = ((q + content_bias[:, None]) @ k.mT + position) * scale
    future = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(1 + n_keys - n_queries)
    return F.dropout(scores.masked_fill(future, -torch.inf).softmax(3), dropout_p) @ v


def with_upstream_attention(model):
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.dec_attn.attention = upstream_attention
    return model


def training_step(model, backend):
    parameters = list(model.parameters())

    def step(tokens, targets, memory):
        if isinstance(model, ParSuperNet):
            model.generator.manual_seed(0)  # every candidate's blocks mix alike
        with par_xl.use_backend(backend):
            return torch.autograd.grad(model(tokens, targets, memory).loss, parameters)

    return step


def compete(race, make, batch, length, n_memory, device, target):
    """The candidates agree without dropout, whose masks differ, and race with it, as models are trained.

    They agree in fp64 where there are kernels for it: in fp32 a ReLU's input next to 0 may fall on either side.
    """
    config = make(0.0).config
    frequencies = 1 / torch.arange(1, config.vocab_size + 1, dtype=torch.float64)  # Zipf's law: rare words are rare
    tokens, targets = (torch.multinomial(frequencies, batch * length, replacement=True) for _ in range(2))

    def candidates(dropout, dtype=torch.float32):
        torch.manual_seed(0)
        model = make(dropout).to(device, dtype)
        return {
            "upstream": training_step(with_upstream_attention(model), "eager"),
            "eager": training_step(model, "eager"),
            "auto": training_step(model, "auto"),
        }

    memory = torch.randn(config.n_layer, batch, n_memory, config.d_model, device=device)
    inputs = tokens.view(batch, length).to(device), targets.view(batch, length).to(device), memory
    exact, tolerance = (torch.float64, 1e-6) if device == "cpu" else (torch.float32, 1e-2)
    compare(candidates(0.0, exact), (*inputs[:2], memory.to(exact)), tolerance)
    race(candidates(0.1), [inputs], "auto", tolerance=None, memory=True, target=target)


@pytest.mark.parametrize("case", CASES)
def test_transformer_xl_training_step(race, device, case):
    sizes, batch, length = CASES[case]

    def make(dropout):
        return TransformerXL(TransformerXLConfig(**WORDS, **sizes, mem_len=length, dropout=dropout))

    compete(race, make, batch, length, length, device, "1.5 times eager")


SUPERNETS = {  # name: (configuration, batch, length of the segment)
    "6x128, 16+32, batch 32": (ParConfig.named("wikitext-2-small"), 32, 32),
    "12x256, 128+128, batch 8": (ParConfig.named("wikitext-2", mem_len=128, cutoffs=(250, 2500)), 8, 128),
}


@pytest.mark.parametrize("case", SUPERNETS)
def test_supernet_training_step(race, device, case):
    config, batch, length = SUPERNETS[case]

    def make(dropout):
        return ParSuperNet(replace(config, dropout=dropout))

    compete(race, make, batch, length, config.mem_len, device, "1.5 times eager at 12 blocks")
