"""TransformerXL: memory, windows, lengths, decoding, checkpointing, compilation, and training on two processes."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from par_xl.models import ModelOutput, TransformerXL, TransformerXLConfig
from par_xl.models.generation import Decoder, KeyValueCache

V, B, T, LAYERS, D = 40, 2, 6, 2, 12
TYPES = [0, 1, 2, 3]
SMALL = dict(vocab_size=V, n_layer=LAYERS, n_head=2, d_model=D, d_head=6, d_inner=16, max_klen=64)
CLUSTERS = dict(cutoffs=(10, 20), div_val=2, tie_projs=(False, True, True))


def make(**options):
    """A model in fp64 and evaluation mode whose weights are far from zero."""
    torch.manual_seed(0)
    model = TransformerXL(TransformerXLConfig(**{**SMALL, "mem_len": T, **CLUSTERS, **options})).double().eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "layer_norm.weight" in name else 0.0, 0.3)
    return model


@pytest.fixture
def text():
    return torch.randint(V, (B, 4 * T + 1), generator=torch.Generator().manual_seed(1))


def read(model, text, lengths, memory=None):
    """The outputs of consecutive segments, joined: nll, hidden, the last memory."""
    outputs, start = [], 0
    for n in lengths:
        outputs.append(model(text[:, start : start + n], text[:, start + 1 : start + n + 1], memory))
        memory, start = outputs[-1].memory, start + n
    nll, hidden = (torch.cat([getattr(o, name) for o in outputs], 1) for name in ("nll", "hidden"))
    return nll, hidden, memory


def gradients(model, text, **kwargs):
    output = model(text[:, :T], text[:, 1 : T + 1], **kwargs)
    return output.loss, *torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)


# Results and memory


@pytest.mark.parametrize("attn_type", TYPES)
def test_output_has_the_shapes_of_the_design(text, attn_type):
    model = make(attn_type=attn_type, mem_len=9)
    output = model(text[:, :T], text[:, 1 : T + 1])
    assert isinstance(output, ModelOutput)
    assert output.hidden.shape == (B, T, D) and output.nll.shape == (B, T)
    torch.testing.assert_close(output.loss, output.nll.mean())
    assert output.memory.shape == (LAYERS, B, T, D) and not output.memory.requires_grad
    assert model(text[:, :T], None, output.memory).memory.shape == (LAYERS, B, 9, D)
    assert model(text[:, :T]).loss is None
    log_prob = model.log_prob(output.hidden)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(B, T, dtype=torch.float64))
    torch.testing.assert_close(log_prob.gather(2, text[:, 1 : T + 1, None])[..., 0], -output.nll)
    assert torch.equal(model.predict(output.hidden), log_prob.argmax(-1))
    everything = gradients(model, text, memory=output.memory)
    assert all(g is not None and torch.isfinite(g).all() for g in everything)


@pytest.mark.parametrize("options", [{}, {"clamp_len": 7}, {"pre_lnorm": True, "untie_r": True}, {"attn_type": 1}])
def test_streaming_equals_full_context(text, options):
    model = make(mem_len=4 * T, **options)
    nll, hidden, _ = read(model, text, [4 * T])
    streamed = read(model, text, [T, 1, 2 * T - 1, T])
    torch.testing.assert_close(streamed[0], nll)
    torch.testing.assert_close(streamed[1], hidden)


@pytest.mark.parametrize("options", [{"clamp_len": 5}, {"attn_type": 1, "max_klen": 6}])
def test_distances_that_count_as_one_have_one_row(text, options, monkeypatch):
    """The positions end where all farther distances are the same, which changes neither loss nor gradients."""
    model, results = make(mem_len=2 * T, **options), []
    for n_rows in (6, 3 * T):
        assert len(model.positions(3 * T, torch.float64)[0][1][0]) == n_rows
        memory = model(text[:, T : 3 * T]).memory
        results.append(gradients(model, text, memory=memory))
        monkeypatch.setattr(TransformerXL, "_clamp_len", lambda self: None)
    torch.testing.assert_close(*results)


def test_dropout_makes_clamped_rows_differ():
    """Each distance has a mask of its own, as upstream, and so a row of its own."""
    model = make(clamp_len=5, dropout=0.5).train()
    rows = model.positions(3 * T, torch.float64)[0][1][0]
    assert len(rows) == 3 * T and len(rows[: 3 * T - 5].unique(dim=0)) > 1
    assert model.attention_options() == {"window": None, "clamp_len": None}


@pytest.mark.parametrize("attn_type", TYPES)
def test_memory_is_what_the_layers_read_and_is_left_alone(text, attn_type):
    """Upstream's types 2 and 3 add positions to the cached tensors in place, again at every segment."""
    model = make(attn_type=attn_type, mem_len=3 * T)
    first = model(text[:, :T])
    before = first.memory.clone()
    second = model(text[:, T : 2 * T], None, first.memory)
    assert torch.equal(first.memory, before)
    assert torch.equal(second.memory[:, :, :T], before)
    embedded = model.word_emb(text[:, T : 2 * T])
    torch.testing.assert_close(second.memory[0, :, T:], embedded)


@pytest.mark.parametrize("same_length", ["exclusive", "inclusive"])
def test_same_length_reaches_exactly_so_far(text, same_length):
    """One layer, so that what a query sees is what its result depends on."""
    model, at = make(n_layer=1, same_length=same_length, mem_len=4), 9
    reach = 3 if same_length == "exclusive" else 4
    hidden = model(text[:, : at + 1]).hidden[:, at]
    for distance in range(1, at + 1):
        changed = text[:, : at + 1].clone()
        changed[:, at - distance] = (changed[:, at - distance] + 1) % V
        assert torch.equal(model(changed).hidden[:, at], hidden) == (distance > reach), distance


def test_same_length_without_a_memory_is_finite(text):
    """Upstream masks every key then, and its softmax gives NaN."""
    output = make(same_length="exclusive", mem_len=0)(text[:, :T], text[:, 1 : T + 1])
    assert torch.isfinite(output.nll).all() and output.memory.shape[2] == 0


def test_ext_len_keeps_repeated_steps_out_of_the_memory(text):
    """Upstream swaps two arguments here and keeps the first segment whole."""
    model = make(ext_len=2, mem_len=5)
    first = model(text[:, :4], text[:, 3:5])
    assert first.hidden.shape == (B, 2, D) and first.nll.shape == (B, 2)
    assert torch.equal(first.memory[0], model.word_emb(text[:, :2]))
    second = model(text[:, 2:6], text[:, 5:7], first.memory)
    torch.testing.assert_close(second.memory[0], model.word_emb(text[:, :4]))
    short = model(text[:, :1], None, second.memory)
    assert torch.equal(short.memory, second.memory)


def test_a_longer_memory_in_evaluation(text):
    model = make(mem_len=2, clamp_len=5)
    trained = {name: x.clone() for name, x in model.state_dict().items()}
    model.reset_lengths(mem_len=4 * T, same_length="off", clamp_len=0)
    nll, _, memory = read(model, text, [T] * 4)
    assert memory.shape[2] == 4 * T
    fresh = make(mem_len=4 * T)
    fresh.load_state_dict(trained)
    torch.testing.assert_close(nll, read(fresh, text, [4 * T])[0])
    model.reset_lengths(mem_len=3)
    assert model(text[:, :1], None, memory).memory.shape[2] == 3
    with pytest.raises(ValueError, match="tgt_len"):
        model.reset_lengths(tgt_len=3)


def test_empty_and_zero_starts_differ(text):
    empty = make(mem_len=5)
    zeros = make(mem_len=5, memory_start="zeros")
    assert empty.init_memory(3).shape == (LAYERS, 3, 0, D) and zeros.init_memory(3).shape == (LAYERS, 3, 5, D)
    assert not zeros.init_memory(3).any()
    targets = text[:, 1 : T + 1]
    assert torch.equal(empty(text[:, :T], targets).nll, empty(text[:, :T], targets, empty.init_memory(B)).nll)
    with_zeros = empty(text[:, :T], targets, zeros.init_memory(B)).nll
    assert torch.equal(zeros(text[:, :T], targets).nll, with_zeros)
    assert not torch.allclose(empty(text[:, :T], targets).nll, with_zeros)


def test_gradients_against_finite_differences(text):
    model = make(n_layer=1, mem_len=3, vocab_size=6, cutoffs=(3,), tie_projs=(True, False))
    model.config.clamp_len = 4
    tokens = text[:, : T + 1] % 6
    memory = model(tokens[:, :3]).memory
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, given, (tokens[:, 3:T], tokens[:, 4:], memory)).loss

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_dropout_is_of_training_alone(text):
    model = make(dropout=0.2, dropatt=0.3)
    assert torch.equal(model(text).hidden, model(text).hidden)
    model.train()
    assert not torch.equal(model(text).hidden, model(text).hidden)


def test_bad_calls_are_named(text):
    model = make()
    for arguments, name in [
        ((text[0],), "tokens"),
        ((text[:, :0],), "tokens"),
        ((text[:, :2], text[:, :3]), "targets"),
        ((text, None, model.init_memory(B + 1)), "memory"),
    ]:
        with pytest.raises(ValueError, match=name):
            model(*arguments)
    for options, name in [
        ({"attn_type": 4}, "attn_type"),
        ({"attn_type": 1, "max_klen": 0}, "max_klen"),
        ({"attn_type": 2, "untie_r": True}, "untie_r"),
        ({"mem_len": -1}, "mem_len"),
        ({"same_length": "yes"}, "same_length"),
        ({"memory_start": "ones"}, "memory_start"),
    ]:
        with pytest.raises(ValueError, match=name):
            make(**options)


def test_named_configurations():
    base = TransformerXLConfig.named("wt103-base")
    assert (base.n_layer, base.d_model, base.d_head, base.mem_len, base.vocab_size) == (16, 410, 41, 150, 267735)
    with torch.device("meta"):  # 151 million parameters, as in the paper's table 1
        model = TransformerXL(base)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 151
    assert TransformerXLConfig.named("enwik8-large", vocab_size=27, mem_len=3800).mem_len == 3800
    with pytest.raises(ValueError, match="wt103-base"):
        TransformerXLConfig.named("wt104")


# Weights


def test_state_dict_and_ties(text):
    model = make(dropout=0.1)
    other = make(dropout=0.1)
    nn.init.zeros_(other.r_w_bias)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(text).hidden, model(text).hidden)
    for each in (model, copy.deepcopy(model)):
        assert all(a.weight is b.weight for a, b in zip(each.crit.out_layers, each.word_emb.emb_layers, strict=True))
        projections = zip(each.crit.out_projs, each.word_emb.emb_projs, strict=True)
        assert [a is b for a, b in projections] == [False, True, True]
    untied = make(tie_weight=False, tie_projs=())
    assert untied.crit.out_layers[0].weight is not untied.word_emb.emb_layers[0].weight
    assert not {id(p) for p in untied.crit.parameters()} & {id(p) for p in untied.word_emb.parameters()}


def test_initial_weights():
    torch.manual_seed(0)
    model = TransformerXL(replace(TransformerXLConfig(**SMALL), vocab_size=2000, d_inner=200))
    assert 0.019 < model.word_emb.emb_layers[0].weight.std() < 0.021
    assert not model.layers[0].pos_ff.CoreNet[0].bias.any()
    assert abs(model.layers[0].pos_ff.layer_norm.weight.mean() - 1) < 0.02


# Decoding


@pytest.mark.parametrize("attn_type", [0, 1])
@pytest.mark.parametrize("options", [{}, {"same_length": "exclusive"}, {"pre_lnorm": True, "clamp_len": 3}])
def test_decoding_step_by_step_equals_one_pass(text, attn_type, options):
    """The cache holds mem_len steps, far fewer than the text has: one pass with that window."""
    model = make(attn_type=attn_type, mem_len=4, **options)
    read_before = model(text[:, :3]).memory
    decoder = Decoder(model, read_before)
    steps = torch.cat([decoder.step(tokens) for tokens in text[:, 3:].split((2, *[1] * (4 * T - 4)), 1)], 1)
    if not options.get("same_length"):
        model.reset_lengths(same_length="inclusive")
    torch.testing.assert_close(steps[:, 2:], model(text).hidden[:, 5:])


@pytest.mark.parametrize("attn_type", TYPES)
def test_generation_feeds_its_own_tokens(text, attn_type):
    model = make(attn_type=attn_type, mem_len=4 * T).train()
    generated = model.generate(text[:, :3], 5, temperature=0)
    assert model.training and generated.shape == (B, 8) and torch.equal(generated[:, :3], text[:, :3])
    model.eval()
    for n in range(3, 8):
        if attn_type in (0, 1):  # absolute positions count from the end of a segment: one pass is another text
            assert torch.equal(model.predict(model(generated[:, :n]).hidden)[:, -1], generated[:, n])
    memory = model(text[:, :6]).memory
    with_memory = model.generate(text[:, 6:7], 1, memory=memory, temperature=0)
    assert torch.equal(with_memory[:, 1], model.predict(model(text[:, 6:7], None, memory).hidden)[:, 0])


def test_sampling(text):
    model = make()

    def draw(**options):
        return model.generate(text[:, :2], 12, generator=torch.Generator().manual_seed(3), **options)

    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(temperature=3.0))
    assert torch.equal(draw(temperature=1e-6), model.generate(text[:, :2], 12, temperature=0))
    assert torch.equal(draw(top_k=1), model.generate(text[:, :2], 12, temperature=0))
    best = model.log_prob(model(text[:, :2]).hidden)[:, -1].topk(3).indices
    firsts = torch.cat([model.generate(text[:, :2], 1, top_k=3)[:, 2:] for _ in range(40)], 1)
    assert all(set(row.tolist()) == set(words.tolist()) for row, words in zip(firsts, best, strict=True))
    for options in ({"temperature": -1.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="negative"):
            draw(**options)
    with pytest.raises(ValueError, match="prompt"):
        model.generate(text[0], 1)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_key_value_cache_keeps_the_last_steps(limit):
    steps = torch.arange(60.0).view(1, 1, 60, 1)
    cache, seen = KeyValueCache(steps[:, :, :7], -steps[:, :, :7], limit), 7
    for n in (1, 1, 1, 2, 8, 3, 1, 1, 4, 1, 1, 1, 1):
        new = steps[:, :, seen : seen + n]
        cache.append(new, -new)
        seen += n
        expected = steps[:, :, seen - limit : seen]
        assert len(cache) == limit
        assert torch.equal(cache.read()[0], expected) and torch.equal(cache.read()[1], -expected)


# Training at scale


@pytest.mark.parametrize("attn_type", TYPES)
def test_activation_checkpointing_keeps_loss_and_gradients(text, attn_type):
    model = make(attn_type=attn_type, dropout=0.1, dropatt=0.1).train()
    torch.manual_seed(5)
    expected = gradients(model, text)
    model.config = replace(model.config, activation_checkpointing=True)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    torch.testing.assert_close(gradients(model, text), expected)
    assert len(calls) == 2  # once forward, once more for the backward


@pytest.mark.parametrize("attn_type", TYPES)
def test_a_layer_compiles_into_one_graph(text, attn_type):
    model = make(attn_type=attn_type).float()
    layer, window = model.layers[0], (4, 0)
    _, relative = model.positions(2 * T, torch.float32)[0]
    relative = tuple(None if x is None else x.detach() for x in relative)
    x, mems = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if attn_type == 0 else "aot_eager")
    results = []
    for run in (layer, compiled):
        out = run(x, *relative, mems=mems, window=window)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_half_precision(text):
    model = make().float()
    nll = read(model, text, [T, T])[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _, memory = read(model, text, [T, T])
    assert mixed.dtype == torch.float32 and memory.dtype == torch.float32
    torch.testing.assert_close(mixed, nll, atol=0.3, rtol=0.1)
    half = read(model.bfloat16(), text, [T, T])
    assert half[0].dtype == torch.float32 and half[2].dtype == torch.bfloat16
    torch.testing.assert_close(half[0], nll, atol=0.5, rtol=0.1)


def _joint(model, streams):
    """Loss and gradients of the second segment, the first having filled the memory; in one process."""
    model = copy.deepcopy(model)
    memory = model(streams[:, :T]).memory
    loss = model(streams[:, T : 2 * T], streams[:, T + 1 : 2 * T + 1], memory).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _train_on_two(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    streams = torch.randint(V, (2 * B, 2 * T + 1), generator=torch.Generator().manual_seed(7))
    mine = streams[rank * B : (rank + 1) * B]
    model = make()
    expected = _joint(model, streams)

    def step(parallel):
        memory = parallel(mine[:, :T]).memory  # its own streams, its own memory
        parallel(mine[:, T : 2 * T], mine[:, T + 1 : 2 * T + 1], memory).loss.backward()

    replicated = DistributedDataParallel(copy.deepcopy(model))
    step(replicated)
    torch.testing.assert_close({n: p.grad for n, p in replicated.module.named_parameters()}, expected)

    for layer in model.layers:
        fully_shard(layer)
    step(fully_shard(model))
    torch.testing.assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters()}, expected)
    (Path(path) / f"rank-{rank}-done").touch()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_the_joint_batch():
    """DDP and FSDP on gloo, every rank with its own streams and memory."""
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(_train_on_two, (path,), nprocs=2)
        assert len(list(Path(path).glob("rank-*-done"))) == 2
