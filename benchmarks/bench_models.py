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
from par_xl.models import (
    CompressiveConfig,
    CompressiveTransformer,
    ParConfig,
    ParSuperNet,
    ParTransformerXL,
    TransformerXL,
    TransformerXLConfig,
    par_pattern,
)

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


def compete(race, make, batch, length, device, target, upstream=True):
    """The candidates agree without dropout, whose masks differ, and race with it, as models are trained.

    ``make(dropout)`` is a model whose memory starts full. They agree in fp64 where there are kernels for it: in fp32 a
    ReLU's input next to 0 may fall on either side.
    """
    vocab_size = make(0.0).config.vocab_size
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)  # Zipf's law: rare words are rare
    tokens = torch.multinomial(frequencies, batch * (length + 1), replacement=True).view(batch, length + 1).to(device)

    def candidates(dropout, dtype):
        torch.manual_seed(0)
        model = make(dropout).to(device, dtype)
        found = {"upstream": training_step(with_upstream_attention(model), "eager")} if upstream else {}
        found |= {name: training_step(model, name) for name in ("eager", "auto")}
        return found, (tokens[:, :-1], tokens[:, 1:], random_memory(model, batch))

    exact, tolerance = (torch.float64, 1e-6) if device == "cpu" else (torch.float32, 1e-2)
    compare(*candidates(0.0, exact), tolerance)
    found, inputs = candidates(0.1, torch.bfloat16 if device == "cuda" else torch.float32)
    race(found, [inputs], "auto", tolerance=None, memory=True, target=target)


def random_memory(model, batch):
    """The full memory that the model starts with, with random rows."""
    memory = model.init_memory(batch)
    if torch.is_tensor(memory):
        return torch.randn_like(memory)
    return [(torch.randn_like(rows), *others) for rows, *others in memory]


@pytest.mark.parametrize("case", CASES)
def test_transformer_xl_training_step(race, device, case):
    sizes, batch, length = CASES[case]

    def make(dropout):
        full = dict(mem_len=length, memory_start="zeros")
        return TransformerXL(TransformerXLConfig(**WORDS, **sizes, **full, dropout=dropout))

    compete(race, make, batch, length, device, "1.5 times eager")


COMPRESSIVE = {  # name: (configuration, batch); its segment is its memory
    "cpu": {
        "6x256, 128+128+128, batch 8": (
            CompressiveConfig(**WORDS, **FULL["cpu"]["6x256, 128+128, batch 8"][0], mem_len=128, compressed_len=128),
            8,
        )
    },
    "cuda": {"wt103, 512+512+1500, batch 4": (CompressiveConfig.named("wt103"), 4)},
}["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("case", COMPRESSIVE)
def test_compressive_training_step(race, device, case):
    """With the compression of the oldest memories and its loss."""
    config, batch = COMPRESSIVE[case]

    def make(dropout):
        return CompressiveTransformer(replace(config, memory_start="zeros", dropout=dropout))

    compete(race, make, batch, config.mem_len, device, "twice as fast as eager, in half the memory", upstream=False)


SUPERNETS = {  # name: (configuration, batch, length of the segment)
    "6x128, 16+32, batch 32": (ParConfig.named("wikitext-2-small"), 32, 32),
    "12x256, 128+128, batch 8": (ParConfig.named("wikitext-2", mem_len=128, cutoffs=(250, 2500)), 8, 128),
}


@pytest.mark.parametrize("case", SUPERNETS)
def test_supernet_training_step(race, device, case):
    config, batch, length = SUPERNETS[case]

    def make(dropout):
        return ParSuperNet(replace(config, memory_start="zeros", dropout=dropout))

    compete(race, make, batch, length, device, "1.5 times eager at 12 blocks")


PATTERNS = {  # name: (length of segment and memory, batch)
    "12x256, 128+128, batch 8": (128, 8),
    "12x256, 512+512, batch 2": (512, 2),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_par_training_step(race, device, case):
    """The paper's pattern of attention and dense blocks against Transformer-XL's, and against attention alone."""
    length, batch = PATTERNS[case]
    patterns = {"all attention": "s" * 12, "interleaved": par_pattern(12, "interleaved"), "par": par_pattern(12)}
    candidates = {}
    for name, pattern in patterns.items():
        torch.manual_seed(0)
        model = ParTransformerXL(ParConfig.named("wikitext-2", mem_len=length, pattern=pattern, memory_start="zeros"))
        model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        candidates[name] = own_memory(model, batch, training_step(model, "auto"))
    tokens = torch.randint(model.config.vocab_size, (batch, length + 1), device=device)
    race(candidates, [(tokens[:, :-1], tokens[:, 1:])], "par", tolerance=None, memory=True)


def own_memory(model, batch, step):
    """``step`` with a memory of the model's own size: only attention has one."""
    memory = random_memory(model, batch)
    return lambda tokens, targets: step(tokens, targets, memory)
