"""par_xl.training.search: what the search finds, that it resumes to the bit, and what it leaves behind."""

import json
import os
import subprocess
import sys
from functools import partial, partialmethod

import lightning as L
import pytest
import torch
from training_helpers import IGNORED, InterruptAt, assert_same_parameters, small_corpus, trainer

from par_xl.data import Corpus, Vocabulary
from par_xl.models import ParConfig, ParSuperNet
from par_xl.training import (
    SEARCH_RECIPES,
    ArchitectureSearch,
    LanguageModelData,
    StopWhenStable,
    architecture_history,
    override,
    search_par,
)
from par_xl.training import search as search_module
from par_xl.training.architecture_pictures import CHOICES

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(*IGNORED)]

SMALL = dict(
    n_layer=2, n_head=2, d_model=8, d_inner=8, mem_len=8, batch_size=4, bptt=12, epochs=3, warmup=0, freeze=5,
    eval_every=10,
)  # fmt: skip
VARIANTS = {
    "two optimizers": {},
    "held out": dict(held_out=0.1, architecture_share=1.0),
    "held out, seldom": dict(held_out=0.1, architecture_share=0.2, freeze=2),
    "hard": dict(hard=True),
    "one optimizer": dict(two_optimizers=False, max_steps=55),
    "bf16-mixed": {},
}


@pytest.fixture(scope="module")
def corpus():
    return small_corpus()


def small(**options):
    return override(SEARCH_RECIPES["human-numbers"], {**SMALL, **options})


def network(corpus):
    return ParSuperNet(ParConfig(len(corpus.vocabulary), n_layer=2, n_head=2, d_model=8, d_inner=8, mem_len=8))


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than these searches."""
    for name in ("plot_architecture", "animate_architecture"):
        monkeypatch.setattr(architecture_history, name, lambda *_: None)


INTERRUPTED = [("two optimizers", 3), ("two optimizers", 19), ("held out", 19), ("held out", 33), ("hard", 33)]
INTERRUPTED += [("one optimizer", 31), ("one optimizer", 54), ("bf16-mixed", 33)]
# Every 5th step reads one of 4 held-out windows: the next is the first again; twice, with no such step in between
INTERRUPTED += [("held out, seldom", 22), ("held out, seldom", 12, 13)]


def fit_interrupted(fit, step, *arguments, callbacks, **options):
    return fit(*arguments, callbacks=[*callbacks, InterruptAt(step)], **options)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("interrupted", INTERRUPTED, ids=str)
def test_a_resumed_search_gives_the_numbers_of_an_uninterrupted_one(corpus, tmp_path, monkeypatch, interrupted):
    """Weights, probabilities at every step and losses, to the bit.

    A validation follows every 10th step; an epoch has 32 steps, "held out" 29; "one optimizer" ends after 55.
    """
    variant, *steps = interrupted
    recipe = small(**VARIANTS[variant])
    how = {"devices": 1, "precision": variant if variant == "bf16-mixed" else "32-true"}
    expected, history = search_par(corpus, recipe, tmp_path / "whole", **how)
    snapshots = json.loads((tmp_path / "whole" / "architecture.json").read_text())
    assert len({str(p) for p in snapshots["probabilities"]}) > 10
    out, fit, how["resume"] = tmp_path / "stopped", search_module.fit, None
    for step in steps:
        with monkeypatch.context() as patch:
            patch.setattr(search_module, "fit", partial(fit_interrupted, fit, step))
            with pytest.raises(SystemExit):
                search_par(corpus, recipe, out, **how)
        how["resume"] = out / "interrupted.ckpt"
        torch.rand(17), L.seed_everything(99, verbose=False)  # nothing of this process may matter
    model, resumed = search_par(corpus, recipe, out, **how)
    assert resumed.train == history.train and resumed.valid == history.valid
    assert json.loads((out / "architecture.json").read_text()) == snapshots
    assert_same_parameters(model, expected, rtol=0, atol=0)


def copying(generator, length):
    """Blocks of 8 random tokens, each followed by itself: windows of 8 need their memory to copy."""
    return torch.randint(16, (length // 16, 1, 8), generator=generator).expand(-1, 2, -1).flatten().int()


def mapping(generator, length):
    """Each token is a fixed function of the one before, but for one in five, which is random."""
    function = torch.randperm(32, generator=generator).tolist()
    fresh = torch.rand(length, generator=generator) < 0.2
    tokens = torch.randint(32, (length,), generator=generator).tolist()
    for i in range(1, length):
        tokens[i] = tokens[i] if fresh[i] else function[tokens[i - 1]]
    return torch.tensor(tokens, dtype=torch.int32)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("task", "n_words", "keeps"), [(copying, 16, True), (mapping, 32, False)])
def test_attention_is_kept_where_it_is_needed_and_dropped_where_not(tmp_path, task, n_words, keeps, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = task(generator, 20_000)
    corpus = Corpus(Vocabulary(map(str, range(n_words))), tokens[:19_200], tokens[19_200:])
    options = dict(
        n_layer=2, n_head=1, d_model=16, d_inner=64, mem_len=8, dropout=0, batch_size=16, bptt=8, epochs=2,
        lr=1e-2, warmup=0, architecture_lr=0.1, architecture_share=1.0, freeze=20, seed=seed,
    )  # fmt: skip
    recipe = override(SEARCH_RECIPES["human-numbers"], options)
    model, _ = search_par(corpus, recipe, tmp_path, devices=1)
    attention = model.probabilities()[:, 0]
    assert ("s" in model.derive()) == keeps
    assert (attention.max() > 0.9) if keeps else (attention.max() < 0.25), attention  # from 1/3


def probabilities_by_step(folder):
    record = json.loads((folder / "architecture.json").read_text())
    return dict(zip(record["steps"], record["probabilities"], strict=True))


@pytest.mark.usefixtures("no_pictures")
def test_the_architecture_learns_when_it_should(corpus, tmp_path):
    """Not for the first 8 steps, then at every fifth; in all steps with a single optimiser."""
    search_par(corpus, small(freeze=8, max_steps=30, architecture_share=0.2), tmp_path / "two", devices=1)
    seen = probabilities_by_step(tmp_path / "two")
    changed = [step for step in range(1, 31) if seen[step] != seen[step - 1]]
    assert changed == [13, 18, 23, 28]
    every = small(freeze=2, architecture_share=1.0)
    assert [step for step in range(6) if every.architecture_learns(step)] == [2, 3, 4, 5]
    recipe = small(two_optimizers=False, freeze=8, max_steps=5)
    search_par(corpus, recipe, tmp_path / "one", devices=1)
    seen = probabilities_by_step(tmp_path / "one")
    assert all(seen[step] != seen[step - 1] for step in range(1, 6))


class Gradients(L.Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        model = module.model
        self.steps.append([p.grad is not None for p in (model.choice.pi, model.layers[0].pos_ff.CoreNet[0].weight)])


@pytest.mark.parametrize("held_out", [False, True])
def test_gradients_come_when_they_should(corpus, held_out):
    model = network(corpus)
    recipe = small(freeze=2, architecture_share=0.5, schedule="constant", dropout=0.0)
    module = ArchitectureSearch(model, recipe, corpus.valid if held_out else None)
    gradients = Gradients()
    trainer(gradients, max_steps=6).fit(module, LanguageModelData(corpus, 4, 12))
    assert gradients.steps == [[step in (3, 5), True] for step in range(6)]


class Norms(L.Callback):
    """The gradients of the weights and of the architecture, and their norms, as the optimiser got them."""

    def __init__(self):
        self.gradients, self.norms = [], []

    def on_train_batch_end(self, trainer, module, *_):
        parts = module.model.weight_parameters(), module.model.architecture_parameters()
        self.gradients.append([torch.cat([p.grad.flatten() for p in part]) for part in parts])
        self.norms.append([float(g.norm()) for g in self.gradients[-1]])


def test_each_batch_teaches_whom_it_should(corpus):
    """The held-out tokens give the weights no gradient, and the weights' batch gives the architecture none."""
    other = Corpus(corpus.vocabulary, corpus.train.flip(0), corpus.valid.flip(0))

    def gradients(train, held_out):
        torch.manual_seed(0)
        model = network(corpus)
        seen, recipe = Norms(), small(freeze=0, architecture_share=1.0, dropout=0.0)
        trainer(seen, max_steps=1).fit(
            ArchitectureSearch(model, recipe, held_out.valid), LanguageModelData(train, 4, 12)
        )
        return seen.gradients[0]

    weights, architecture = gradients(corpus, corpus)
    for train, held_out in ((other, corpus), (corpus, other)):
        same_weights, same_architecture = map(torch.equal, gradients(train, held_out), (weights, architecture))
        assert (same_weights, same_architecture) == (train is corpus, held_out is corpus)


@pytest.mark.usefixtures("no_pictures")
def test_gradients_are_clipped_apart(corpus, tmp_path, monkeypatch):
    fit, norms = search_module.fit, Norms()
    monkeypatch.setattr(
        search_module, "fit", lambda *args, callbacks, **options: fit(*args, callbacks=[*callbacks, norms], **options)
    )
    search_par(corpus, small(max_steps=3, freeze=0, architecture_share=1.0, clip=1e-5), tmp_path, devices=1)
    assert norms.norms == [pytest.approx([1e-5, 1e-5], rel=1e-2)] * 3


def test_the_architecture_has_an_optimiser_of_its_own(corpus):
    model = network(corpus)
    options = dict(architecture_lr=0.3, architecture_decay=0.2, lr=0.1, weight_decay=0.01, schedule="constant")
    for two, expected in ((True, [(0.1, 0.01), (0.3, 0.2)]), (False, [(0.1, 0.01)])):
        optimizer = ArchitectureSearch(model, small(two_optimizers=two, **options)).configure_optimizers()
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == expected
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        assert not two or optimizer.param_groups[1]["params"] == [model.choice.pi]


class Seen(L.Callback):
    """The dtypes of a step, and what it logs beside the probabilities that it is to log."""

    def on_train_start(self, trainer, module):
        self.dtypes, self.logged = set(), []
        model = module.model
        for part in (model.choice, model.layers[0].pos_ff.CoreNet[0], model.layers[0].dec_attn.qkv_net):
            part.register_forward_hook(lambda part, _, out: self.dtypes.add((type(part).__name__, out.dtype)))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        pi = module.model.choice.pi
        self.dtypes |= {("pi", pi.dtype), ("its gradient", pi.grad.dtype)}
        shown = [trainer.callback_metrics[f"block{i}/{choice}"] for i in (1, 2) for choice in CHOICES]
        self.logged.append((torch.stack(shown), pi.detach().softmax(1).flatten()))


def test_mixed_precision_leaves_the_choices_in_fp32(corpus):
    model = network(corpus)
    torch.nn.init.normal_(model.choice.pi)
    module, seen = ArchitectureSearch(model, small(freeze=0, architecture_share=1.0)), Seen()
    trainer(seen, max_steps=3, precision="bf16-mixed", log_every_n_steps=1).fit(
        module, LanguageModelData(corpus, 4, 12)
    )
    fp32, bf16 = torch.float32, torch.bfloat16
    assert seen.dtypes == {("RelaxedOneHot", fp32), ("pi", fp32), ("its gradient", fp32), ("Linear", bf16)}
    for shown, probabilities in seen.logged:
        torch.testing.assert_close(shown, probabilities)


@pytest.mark.usefixtures("no_pictures")
def test_a_compiled_search_is_the_search(corpus, tmp_path, monkeypatch):
    """Nothing is compiled for a validation, whose graph would change with the pattern."""
    with_gradients = []

    def backend(graph, _):
        with_gradients.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(ParSuperNet, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    recipe = small(epochs=1, n_layer=1)
    model, history = search_par(corpus, recipe, tmp_path / "plain", devices=1)
    compiled, again = search_par(corpus, recipe, tmp_path / "compiled", devices=1, compile=True)
    assert with_gradients and all(with_gradients)
    losses = [[loss for _, loss in run.train] for run in (again, history)]
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert_same_parameters(compiled, model)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="compile must be False with hard"):
        search_par(corpus, small(hard=True), tmp_path, compile=True)


@pytest.mark.usefixtures("no_pictures")
def test_temperature_falls_to_its_end_and_all_is_logged(corpus, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(architecture_history, "SNAPSHOTS", 6)
    recipe = small(max_steps=40, temperature_start=2.0, temperature_end=0.2)
    model, history = search_par(corpus, recipe, tmp_path, devices=1)
    assert model.temperature == pytest.approx(0.2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert logged["temperature"] == pytest.approx([2 * 0.1 ** (step / 39) for step in (9, 19, 29, 39)])
    names = [f"block{i}/{choice}" for i in (1, 2) for choice in ("attention", "dense", "identity")]
    names += ["train_loss", "val_perplexity", "lr-AdamW/weights", "lr-AdamW/architecture"]
    assert set(names) <= set(logged)
    assert [v["step"] for v in history.valid] == [10, 20, 30, 40]
    assert list(probabilities_by_step(tmp_path)) == [0, 6, 12, 18, 24, 30, 36, 40]


def test_stops_when_the_architecture_is_stable():
    class Model:
        patterns = iter(["ss", "ss", "sf", "sf", "ff", "ff", "ff", "ff"])

        def derive(self):
            return next(self.patterns)

    class Stub:
        should_stop, model = False, Model()

    stub, callback = Stub(), StopWhenStable(2, freeze=2)
    for stub.global_step in range(1, 10):
        callback.on_validation_end(stub, stub)
        if stub.should_stop:
            break
        restored = StopWhenStable(2, freeze=2)
        restored.load_state_dict(callback.state_dict())
        callback = restored
    assert stub.global_step == 9  # frozen: 1 and 2; then ss, ss, sf, sf, ff, ff, ff


@pytest.mark.usefixtures("no_pictures")
def test_a_stable_search_ends_early(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(architecture_history, "SNAPSHOTS", 4)
    recipe = small(patience=2, freeze=5, architecture_lr=1e-6, two_optimizers=True)
    _, history = search_par(corpus, recipe, tmp_path, devices=1)
    assert [v["step"] for v in history.valid] == [10, 20, 30]
    assert list(probabilities_by_step(tmp_path)) == [0, 24, 30] and (tmp_path / "last.safetensors").exists()


def test_options_are_checked(corpus, tmp_path):
    for bad, message in (
        ({"temperature": "cosine"}, "temperature must be one of constant, linear, exponential"),
        ({"temperature_end": 0.0}, "temperatures must be positive"),
        ({"architecture_share": 0.0}, "architecture_share"),
        ({"held_out": 1.0}, "held_out"),
        ({"patience": -1}, "patience"),
        ({"architecture_lr": 0}, "architecture_lr must be positive"),
        ({"architecture_decay": -1}, "architecture_decay not negative"),
        ({"clip": -1}, "clip must be at least 0, not -1.0"),
        ({"max_steps": -3}, "max_steps must be at least 0, not -3"),
        ({"eval_every": -2}, "eval_every must be at least 0, not -2"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**bad)
    for bad, message in (
        ({"freeze": 20, "max_steps": 20}, "freeze must be below the number of steps, 20, not 20"),
        ({"held_out": 0.002}, "held_out must leave more than 4 tokens, one a stream, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            search_par(corpus, small(**bad), tmp_path, devices=1)


RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from test_search import small
from training_helpers import small_corpus
import par_xl.models.par as par
from par_xl.training import architecture_history, search_par
import lightning as L, os

architecture_history.plot_architecture = architecture_history.animate_architecture = lambda *_: None
draw, samples = par.RelaxedOneHot.forward, []
def spy(self, *arguments):
    sample = draw(self, *arguments)
    if self.training:
        samples.append(sample.detach().clone())
    return sample
par.RelaxedOneHot.forward = spy
options = dict(max_steps=12, freeze=2, batch_size=2, eval_every=6, hard=sys.argv[2] == "hard")
model, _ = search_par(small_corpus(), small(**options), sys.argv[1], devices=2)
weight = model.layers[0].pos_ff.CoreNet[0].weight
state = {"samples": torch.stack(samples), "pi": model.choice.pi.detach(), "weight": weight.detach()}
torch.save(state, sys.argv[1] + "/rank" + os.environ.get("LOCAL_RANK", "0"))
"""


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_two_ranks_draw_the_same_samples_and_stay_alike(tmp_path, kind):
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, tmp_path / "ranks.py", tmp_path, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert len(one["samples"]) == 12
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert not torch.equal(one["pi"], torch.zeros_like(one["pi"]))
