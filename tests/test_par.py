"""ParSuperNet and ParTransformerXL: the mix, its temperature, what is derived, what is computed and what is kept."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from par_xl.models import ParConfig, ParSuperNet, ParTransformerXL, TransformerXL, TransformerXLConfig, par_pattern

V, B, T, D = 40, 2, 6, 12
SMALL = dict(vocab_size=V, n_head=2, d_model=D, d_inner=16, dropout=0.0, mem_len=T)
CLUSTERS = dict(cutoffs=(10, 20), div_val=2, tie_projs=(False, True, True))
PATTERNS = ["sfsf", "s-fs", "ff-f", "----"]
pytestmark = pytest.mark.usefixtures("one_thread")


def randomise(model):
    """fp64 and weights that are far from zero."""
    for name, parameter in model.double().named_parameters():
        nn.init.normal_(parameter, 1.0 if "layer_norm.weight" in name else 0.0, 0.3)
    return model


def supernet(pattern="", **options):
    """A SuperNet, of whose four blocks a pattern's branches are the likely ones."""
    torch.manual_seed(0)
    model = randomise(ParSuperNet(ParConfig(**{**SMALL, "n_layer": 4, **options})))
    with torch.no_grad():
        for i, part in enumerate(pattern):
            model.choice.pi[i, "sf-".index(part)] += 20
    return model


@pytest.fixture
def text():
    return torch.randint(V, (B, 4 * T + 1), generator=torch.Generator().manual_seed(1))


def read(model, text, memory=None):
    """Two segments: nll, and the last memory."""
    first = model(text[:, :T], text[:, 1 : T + 1], memory)
    second = model(text[:, T : 2 * T], text[:, T + 1 : 2 * T + 1], first.memory)
    return torch.cat((first.nll, second.nll), 1), second.memory


def gradients(model, text, memory=None):
    loss = model(text[:, :T], text[:, 1 : T + 1], memory).loss
    return loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


# The plain model


@pytest.mark.parametrize("options", [CLUSTERS, {"untie_r": False, "same_length": "inclusive"}, {"pre_lnorm": True}])
def test_interleaved_is_transformer_xl(text, options):
    par = randomise(ParTransformerXL("sfsfsf", **{**SMALL, **options}))
    whole = TransformerXL(
        TransformerXLConfig(**{**SMALL, "untie_r": True, "d_head": 6, "n_layer": 3, **options})
    ).double()
    names = {
        f"layers.{2 * i + j}.{part}.": f"layers.{i}.{part}."
        for i in range(3)
        for j, part in enumerate(("dec_attn", "pos_ff"))
    }
    state = {}
    for name, x in par.state_dict().items():
        prefix = ".".join(name.split(".")[:3]) + "."
        state[name.replace(prefix, names.get(prefix, prefix))] = x
    whole.load_state_dict(state)
    for a, b in zip(read(par, text), read(whole, text), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(par.generate(text[:, :4], 5, temperature=0), whole.generate(text[:, :4], 5, temperature=0))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_is_of_the_attentions(text, pattern):
    model = randomise(ParTransformerXL(pattern, **SMALL)).eval()
    output = model(text[:, :T], text[:, 1 : T + 1])
    assert output.memory.shape == (pattern.count("s"), B, T, D) and output.nll.shape == (B, T)
    if not pattern.count("s"):
        assert not any(
            "r_w_bias" in name for name, _ in ParTransformerXL(pattern, untie_r=False, **SMALL).named_parameters()
        )
    streamed, _ = read(model, text)
    model.reset_lengths(mem_len=2 * T)
    torch.testing.assert_close(streamed, model(text[:, : 2 * T], text[:, 1 : 2 * T + 1]).nll)
    generated = model.generate(text[:, :3], 4, temperature=0)
    for n in range(3, 7):
        assert torch.equal(model.predict(model(generated[:, :n]).hidden)[:, -1], generated[:, n])
    assert all(g is not None and torch.isfinite(g).all() for g in gradients(model, text))


def test_identity_costs_nothing():
    count = {p: sum(x.numel() for x in ParTransformerXL(p, **SMALL).parameters()) for p in ("sf", "s-f-", "-")}
    assert count["sf"] == count["s-f-"] > count["-"]


def test_patterns_of_the_paper():
    assert par_pattern(12) == "sfffsfffffff" and par_pattern(6, ratio=3) == "sfsfff"
    paper = par_pattern(32)
    assert paper.count("s") == 6 and "s" not in paper[22:] and paper.startswith("sff")
    assert par_pattern(7, "interleaved") == "sfsfsfs" and par_pattern(2) == "sf"
    for n in range(1, 40):
        for ratio in (1.5, 2, 2.7, 5):
            pattern = par_pattern(n, ratio=ratio)
            assert len(pattern) == n and pattern.count("s") == max(1, int(n / ratio))
            assert set(pattern[-(-2 * n // 3) :]) <= {"f"}
    assert ParTransformerXL("par", **SMALL).config.pattern == par_pattern(12)
    assert ParConfig(pattern="interleaved", n_layer=3, **SMALL).pattern == "sfs"
    for arguments, options, name in [((0,), {}, "n_layer"), ((3, "pra"), {}, "rule"), ((3,), {"ratio": 1.4}, "ratio")]:
        with pytest.raises(ValueError, match=name):
            par_pattern(*arguments, **options)


def test_configurations():
    small = ParConfig.named("wikitext-2-small")
    assert (small.n_layer, small.d_model, small.d_head, small.mem_len, small.cutoffs) == (6, 128, 32, 16, (250, 2500))
    assert ParConfig.named("wikitext-2", vocab_size=7).n_layer == 12
    assert replace(small, pattern="sfsfs-").n_layer == 6
    for options, name in [
        ({"pattern": "sx"}, "pattern"),
        ({"pattern": "sf", "n_layer": 3}, "pattern"),
        ({"d_model": 9}, "d_model"),
        ({"attn_type": 1, "max_klen": 4, "untie_r": False}, "attn_type"),
    ]:
        with pytest.raises(ValueError, match=name):
            ParConfig(**{**SMALL, **options})
    with pytest.raises(ValueError, match="wikitext-2-small"):
        ParConfig.named("wikitext-3")
    for make in (lambda: ParTransformerXL(small), lambda: ParSuperNet(replace(small, pattern="sfsfsf"))):
        with pytest.raises(ValueError, match="pattern"):
            make()
    with pytest.raises(ValueError, match="dropout"):
        ParTransformerXL(replace(small, pattern="sfsfsf"), dropout=0.5)


# The mix


@pytest.mark.parametrize("options", [CLUSTERS, {"untie_r": False}, {"pre_lnorm": True}])
def test_a_block_mixes_its_branches_by_one_sample(text, options):
    model = supernet(**options)
    memory = model(text[:, :T]).memory
    state = model.generator.get_state()
    output = model(text[:, T : 2 * T], None, memory)
    generator = torch.Generator()
    generator.set_state(state)
    weights = model.choice(model.temperature, generator)
    x = model.word_emb(text[:, T : 2 * T])
    _, relative = model.positions(2 * T, x.dtype)[0]
    for layer, mems, after, w in zip(model.layers, memory, output.memory, weights, strict=True):
        torch.testing.assert_close(after, x)
        x = w[0] * layer.dec_attn(x, *relative, mems=mems) + w[1] * layer.pos_ff(x) + w[2] * x
    torch.testing.assert_close(output.hidden, x)
    w = torch.tensor([0.3, 0.9, 0.2], dtype=x.dtype, requires_grad=True)  # the formula holds whatever their sum
    wanted = w[0] * layer.dec_attn(x, *relative, mems=mems) + w[1] * layer.pos_ff(x) + w[2] * x
    got = layer(x, *relative, mems=mems, weights=w, choice=None)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), w)[0] for out in (got, wanted)))


@pytest.mark.parametrize("options", [{}, {"untie_r": False}, {"pre_lnorm": True}])
def test_gradients_against_finite_differences(text, options):
    model = supernet(n_layer=2, vocab_size=6, mem_len=3, **options)
    tokens = text[:, : T + 1] % 6
    memory = model(tokens[:, :3]).memory
    names, values = zip(*model.named_parameters(), strict=True)
    model.temperature = 0.7

    def loss(*parameters):
        model.generator.manual_seed(2)
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, given, (tokens[:, 3:T], tokens[:, 4:], memory)).loss

    assert "choice.pi" in names and torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_samples_differ_by_pass_and_tend_to_the_derived_model(text):
    model = supernet()
    assert not torch.equal(model(text).hidden, model(text).hidden)
    model.temperature = 1e-9
    with torch.no_grad():
        model.choice.pi.mul_(1e6)  # whatever the noise, the most likely choice
    torch.testing.assert_close(read(model, text)[0], read(model.derived(), text)[0])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "options", [CLUSTERS, {"untie_r": False, "hard": True}, {"pre_lnorm": True, "same_length": "inclusive"}]
)
def test_evaluation_is_the_derived_model(text, pattern, options):
    model = supernet(pattern, **options).eval()
    state = model.generator.get_state()
    assert model.derive() == pattern
    derived = model.derived()
    assert isinstance(derived, ParTransformerXL) and not derived.training
    nll, memory = read(model, text)
    assert torch.equal(nll, read(model, text)[0]) and torch.equal(nll, read(derived, text)[0])
    assert memory.shape == (4, B, T, D) and torch.equal(model.generator.get_state(), state)
    generated = model.generate(text[:, :3], 5, temperature=0, memory=memory)
    kept = [i for i, part in enumerate(pattern) if part == "s"]
    assert torch.equal(generated, derived.generate(text[:, :3], 5, temperature=0, memory=memory[kept]))
    everything = model.state_dict()
    assert all(torch.equal(x, everything[name]) for name, x in derived.state_dict().items())
    with torch.no_grad():
        next(derived.parameters()).zero_()
    assert torch.equal(read(model, text)[0], nll)  # a copy


def test_deriving_leaves_the_random_numbers_alone():
    model = supernet("sf-s")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    derived = model.derived()
    assert torch.equal(torch.rand(3), expected)
    assert derived.crit.out_layers[0].weight is derived.word_emb.emb_layers[0].weight
    assert ParSuperNet(ParConfig(n_layer=3, **SMALL)).derive() == "sss"  # all equally likely


# Hard samples


@pytest.mark.parametrize("options", [{}, {"pre_lnorm": True}])
def test_hard_equals_soft_near_zero(text, options):
    soft, hard = supernet(**options), supernet(hard=True, **options)
    hard.load_state_dict(soft.state_dict())
    hard.temperature = soft.temperature = 1e-12
    for _ in range(5):  # other samples each time
        (loss, *grads), (hard_loss, *hard_grads) = gradients(soft, text), gradients(hard, text)
        torch.testing.assert_close(hard_loss, loss)
        for ours, theirs in zip(hard_grads, grads, strict=True):
            torch.testing.assert_close(theirs if ours is None else ours, theirs if ours is not None else 0 * theirs)


def test_hard_computes_the_chosen_branch_alone(text):
    model = supernet("s-fs", hard=True, n_layer=4)
    calls = []
    for i, layer in enumerate(model.layers):
        layer.dec_attn.register_forward_hook(lambda *_, i=i: calls.append(f"{i}s"))
        layer.pos_ff.register_forward_hook(lambda *_, i=i: calls.append(f"{i}f"))
    for training in (True, False):
        calls.clear()
        model.train(training)(text)
        assert calls == ["0s", "2f", "3s"]


def test_gradient_of_a_hard_sample(text):
    """What the class says: the others count as the identity."""
    model = supernet(n_layer=1, hard=True)
    memory, seen = torch.randn(1, B, T, D, dtype=torch.float64), set()
    for seed in range(20):
        model.generator.manual_seed(seed)
        weights = model.choice(model.temperature, torch.Generator().manual_seed(seed))[0]
        choice = int(weights.argmax())
        assert sorted(weights.tolist()) == [0, 0, 1]
        seen.add(choice)
        x = model.word_emb(text[:, :T]).detach()
        _, relative = model.positions(2 * T, x.dtype)[0]
        branch = [model.layers[0].dec_attn(x, *relative, mems=memory[0]), model.layers[0].pos_ff(x), x][choice]
        loss = model.crit(x + weights[choice] * (branch - x), text[:, 1 : T + 1]).mean()
        (expected,) = torch.autograd.grad(loss, model.choice.pi)
        ours = model(text[:, :T], text[:, 1 : T + 1], memory)
        torch.testing.assert_close(ours.loss, loss)
        (grad,) = torch.autograd.grad(ours.loss, model.choice.pi, allow_unused=True)
        torch.testing.assert_close(torch.zeros_like(expected) if grad is None else grad, expected)
        assert choice == 2 or expected.any()
    assert seen == {0, 1, 2}


def test_straight_through_has_the_gradient_of_all_branches(text):
    model = supernet(straight_through=True)
    (loss, *grads) = gradients(model, text)
    assert all(g is not None for g in grads)
    assert model.choice(1.0).detach().unique().tolist() == [0, 1]


# Around it


def test_parameters_are_two_groups():
    model = supernet(**CLUSTERS)
    architecture, weights = list(model.architecture_parameters()), list(model.weight_parameters())
    assert [p.shape for p in architecture] == [(4, 3)]
    assert {id(p) for p in weights} | {id(architecture[0])} == {id(p) for p in model.parameters()}
    assert len(weights) == len(list(model.parameters())) - 1
    fresh = ParSuperNet(ParConfig(n_layer=5, **SMALL))
    torch.testing.assert_close(fresh.probabilities(), torch.full((5, 3), 1 / 3))


def test_activation_checkpointing_keeps_loss_and_gradients(text):
    results = []
    for checkpointing in (False, True):
        model = supernet(dropout=0.1, activation_checkpointing=checkpointing)
        torch.manual_seed(5)
        results.append(gradients(model, text))
    torch.testing.assert_close(results[0], results[1])


def test_samples_go_on_after_a_state_dict(text):
    model, other = supernet(), supernet(seed=9)
    expected = supernet(seed=9)(text).hidden
    assert not torch.equal(model(text).hidden, expected)  # by the seed
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as path:
        third = supernet(seed=8)
        save_model(model, f"{path}/m.safetensors")
        load_model(third, f"{path}/m.safetensors")
    for _ in range(2):
        torch.manual_seed(int(torch.randint(1000, ())))  # torch's own numbers do not matter
        hidden = model(text).hidden
        assert all(torch.equal(m(text).hidden, hidden) for m in (other, twin, third))


def test_compiles(text):
    """Into one graph with torch's own random numbers; a generator breaks it, and a new temperature is no new graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = supernet(n_layer=2).float()
    memory = model(text[:, :T]).memory
    segment = text[:, T : 2 * T], text[:, T + 1 : 2 * T + 1], memory
    model.generator = None
    torch.manual_seed(3)
    expected = model(*segment).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    loss = compiled(*segment).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.choice.pi.grad.any()

    torch.compiler.reset()
    model.generator, counter = torch.Generator(), CompileCounterWithBackend("aot_eager")
    compiled, frames = torch.compile(model, backend=counter), []
    for step in range(6):
        model.temperature = 1.0 - 0.1 * step
        model.generator.manual_seed(step)
        loss = compiled(*segment).loss
        model.generator.manual_seed(step)
        torch.testing.assert_close(loss, model(*segment).loss)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"hard": True}, {"pre_lnorm": True}])
def test_half_precision(text, dtype, options):
    model = supernet(**options).float()
    model.generator.manual_seed(0)
    nll, _ = read(model, text)
    for mixed in (True, False):
        model = model if mixed else model.to(dtype)
        model.generator.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=mixed):
            half, memory = read(model, text)
        assert half.dtype == torch.float32 and memory.dtype == (torch.float32 if mixed else dtype)
        torch.testing.assert_close(half, nll, atol=0.5, rtol=0.1)
        half.mean().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        model.zero_grad()


def _search_on_two(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = supernet(hard=True, dropout=0.1)
    torch.manual_seed(100 + rank)  # everything else is another on each rank
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, memory = torch.optim.SGD(model.parameters(), 0.5), None
    for _ in range(4):
        text = torch.randint(V, (B, T + 1))
        output = parallel(text[:, :-1], text[:, 1:], memory)
        output.loss.backward()
        memory = output.memory
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.generator.get_state(), model.choice.pi.data), f"{path}/rank-{rank}")
    dist.destroy_process_group()


def test_two_processes_draw_the_same_architecture():
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(_search_on_two, (path,), nprocs=2)
        (state, pi), (other_state, other_pi) = (torch.load(Path(path) / f"rank-{rank}") for rank in range(2))
    assert torch.equal(state, other_state) and torch.equal(pi, other_pi)
