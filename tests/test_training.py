"""par_xl.training: the callback's rules against hand-written training steps, exact resumption, averaging, files."""

import os
import signal
import warnings
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from par_xl.data import Corpus, load_corpus
from par_xl.models import AWDLSTM, AWDLSTMConfig
from par_xl.training import (
    NTASGD,
    RECIPES,
    History,
    LanguageModel,
    LanguageModelData,
    RNNTrainer,
    SafetensorsCheckpointIO,
    fit,
    override,
    plot_losses,
    train_awd_lstm,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
B, D, V = 3, 4, 7


def trainer(*callbacks, **options):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, logger=False)
    defaults = dict(accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0)
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


class TupleModel(nn.Module):
    """A model of fastai's kind: (logits, raw outputs by layer, dropped outputs by layer), state behind reset()."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.last = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.mask = (torch.arange(D) % 2) * 2.0  # a fixed dropout mask
        self.resets = 0

    def reset(self):
        self.resets += 1

    def forward(self, tokens):
        raws = [self.embedding(tokens), torch.tanh(self.first(self.embedding(tokens)))]
        outputs = [raw * self.mask for raw in raws]
        return self.last(outputs[-1]), raws, outputs


class TupleModule(L.LightningModule):
    def __init__(self, lr=0.5):
        super().__init__()
        self.model, self.lr, self.seen, self.losses = TupleModel(), lr, [], []

    def training_step(self, batch, _):
        prediction = self.model(batch[0])
        self.seen.append(type(prediction))
        loss = F.cross_entropy(prediction.flatten(0, 1), batch[1].flatten())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.seen.append(type(self.model(batch[0])))

    def on_train_batch_end(self, outputs, batch, _):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def batch(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, steps), generator=generator), torch.randint(V, (B, steps), generator=generator)


def sgd_by_hand(model, batches, bptt, alpha, beta, lr=0.5, accumulate=1):
    """awd-lstm-lm's training step, batch first."""
    losses = []
    for i, (tokens, targets) in enumerate(batches):
        prediction, raws, outputs = model(tokens)
        loss = F.cross_entropy(prediction.flatten(0, 1), targets.flatten())
        losses.append(loss.item())
        loss = loss + alpha * outputs[-1].pow(2).mean()
        if tokens.shape[1] > 1:
            loss = loss + beta * (raws[-1][:, 1:] - raws[-1][:, :-1]).pow(2).mean()
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= lr * tokens.shape[1] / bptt * p.grad
                        p.grad = None
    return losses


def assert_same_parameters(one, other, **tolerance):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class TestRNNTrainer:
    @pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.7, 0.0), (0.0, 3.0), (0.0, 0.0)])
    def test_is_awd_lstms_training_step(self, alpha, beta):
        """AR on the dropped and TAR on the raw output of the last layer along time, and the rate scaled by T/bptt."""
        batches = [batch(6, 0), batch(10, 1), batch(3, 2)]
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=8, alpha=alpha, beta=beta)).fit(module, loader(batches))
        losses = sgd_by_hand(by_hand, batches, 8, alpha, beta)
        assert_same_parameters(module.model, by_hand)
        # what is reported is the cross-entropy alone
        assert module.losses == pytest.approx(losses, rel=1e-6)

    def test_a_window_of_one_step(self):
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=2, alpha=2, beta=1)).fit(module, loader([batch(1)]))
        sgd_by_hand(by_hand, [batch(1)], 2, 2, 1)
        assert_same_parameters(module.model, by_hand)
        assert all(p.isfinite().all() for p in module.parameters())

    def test_gradient_accumulation(self):
        batches = [batch(5, seed) for seed in range(4)]
        module, by_hand = TupleModule(), TupleModel()
        trainer(RNNTrainer(bptt=5), accumulate_grad_batches=2).fit(module, loader(batches))
        sgd_by_hand(by_hand, batches, 5, 2.0, 1.0, accumulate=2)
        assert_same_parameters(module.model, by_hand)

    def test_the_penalty_is_multiplied_by_the_fp16_scaler(self):
        module, callback = TupleModule(), RNNTrainer(bptt=5)
        module.log = lambda *_: None
        scaler = SimpleNamespace(scale=lambda x: 1024 * x)
        fake = SimpleNamespace(accumulate_grad_batches=1, precision_plugin=SimpleNamespace(scaler=scaler))
        callback.setup(fake, module, "fit")
        prediction = module.model(batch(5)[0])
        loss = 1024 * F.cross_entropy(prediction.flatten(0, 1), batch(5)[1].flatten())
        callback.on_before_backward(fake, module, loss)
        loss.backward()
        by_hand = TupleModel()
        sgd_by_hand(by_hand, [batch(5)], 5, 2.0, 1.0, lr=1.0)
        with torch.no_grad():
            for p in module.model.parameters():
                p -= p.grad / 1024
        assert_same_parameters(module.model, by_hand)

    def test_only_the_true_output_reaches_the_steps(self):
        module = TupleModule()
        trainer(RNNTrainer(5), num_sanity_val_steps=1).fit(module, loader([batch(5)]), loader([batch(5)]))
        assert module.seen == [torch.Tensor] * 3
        assert isinstance(module.model(batch(5)[0]), tuple)  # the hook is gone after the run

    def test_resets_at_each_epoch_and_validation(self):
        module = TupleModule()
        trainer(RNNTrainer(5), max_epochs=3, val_check_interval=2).fit(
            module, loader([batch(5)] * 4), loader([batch(5)])
        )
        assert module.model.resets == 3 + 3 * 2

    def test_the_rate_is_restored_before_a_scheduler_sees_it(self):
        class Scheduled(TupleModule):
            rates = []

            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

            def on_train_batch_start(self, *_):
                self.rates.append(self.optimizers().param_groups[0]["lr"])

        module = Scheduled()
        trainer(RNNTrainer(bptt=10)).fit(module, loader([batch(5), batch(20), batch(10)]))
        assert module.rates == [0.5, 0.25, 0.125]

    def test_with_awd_lstm_and_its_output_object(self):
        torch.manual_seed(0)
        model = AWDLSTM(AWDLSTMConfig(V, 6, 8, n_layers=2, weight_drop=0.0))
        by_hand = AWDLSTM(AWDLSTMConfig(V, 6, 8, n_layers=2, weight_drop=0.0))
        by_hand.load_state_dict(model.state_dict())

        class Seed(L.Callback):
            def on_train_batch_start(self, *_):
                torch.manual_seed(1)

        trainer(RNNTrainer(bptt=5), Seed()).fit(LanguageModel(model, optimizer="sgd", lr=0.5), loader([batch(5)]))
        torch.manual_seed(1)
        output = by_hand(*batch(5))
        raw, dropped = output.raw_outputs[-1], output.outputs[-1]
        assert not torch.equal(raw, dropped)
        (output.loss + 2 * dropped.pow(2).mean() + raw.diff(dim=1).pow(2).mean()).backward()
        torch.optim.SGD(by_hand.parameters(), 0.5).step()
        assert_same_parameters(model, by_hand)

    def test_a_step_that_does_not_call_the_model_is_an_error(self):
        module = TupleModule()
        module.training_step = lambda batch: module.model.last(torch.ones(D)).sum()
        with pytest.raises(RuntimeError, match="model was not called"):
            trainer(RNNTrainer(5)).fit(module, loader([batch(5)]))


@pytest.fixture
def fastai(monkeypatch):
    """par_xl.training.fastai on the real fastai, or else on the one class that it imports."""
    import importlib
    import sys

    try:
        import fastai.callback.core  # noqa: F401
    except ImportError:
        for name in ("fastai", "fastai.callback", "fastai.callback.core"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(Callback=object, __path__=[]))
    monkeypatch.delitem(sys.modules, "par_xl.training.fastai", raising=False)
    yield importlib.import_module("par_xl.training.fastai")
    sys.modules.pop("par_xl.training.fastai", None)


def test_fastai_callback_is_awd_lstms_training_step(fastai):
    """Driven through the events of fastai's Learner._do_one_batch in their order."""
    batches = [batch(6, 0), batch(10, 1), batch(1, 2)]
    model, by_hand = TupleModel(), TupleModel()
    callback = fastai.RNNTrainer(bptt=8)
    learn = callback.learn = SimpleNamespace(model=model, opt=SimpleNamespace(hypers=[{"lr": 0.5}]), training=True)
    callback.before_train()
    losses = []
    for tokens, targets in batches:
        learn.xb, learn.pred = (tokens,), model(tokens)
        callback.after_pred()
        learn.loss_grad = F.cross_entropy(learn.pred.flatten(0, 1), targets.flatten())
        losses.append(learn.loss_grad.item())
        callback.after_loss()
        learn.loss_grad.backward()
        callback.before_step()
        with torch.no_grad():
            for p in model.parameters():
                p -= learn.opt.hypers[0]["lr"] * p.grad
                p.grad = None
        callback.after_step()
        assert learn.opt.hypers[0]["lr"] == 0.5
    assert losses == pytest.approx(sgd_by_hand(by_hand, batches, 8, 2.0, 1.0))
    assert_same_parameters(model, by_hand)
    learn.training = False
    callback.before_validate()
    learn.pred, before = model(batches[0][0]), torch.tensor(1.0)
    callback.after_pred()
    learn.loss_grad = before
    callback.after_loss()
    assert learn.loss_grad is before and model.resets == 2


def test_fastai_missing_is_said():
    with pytest.raises(ImportError, match=r"par_xl\[fastai\]"):
        try:
            import fastai.callback.core  # noqa: F401

            pytest.skip("fastai is installed")
        except ImportError:
            import par_xl.training.fastai  # noqa: F401


@pytest.fixture(scope="module")
def corpus():
    whole = load_corpus("human-numbers")
    return Corpus(whole.vocabulary, whole.train[:1501], whole.valid[:301])


def small_awd_lstm(corpus):
    torch.manual_seed(0)
    return AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), 8, 8, n_layers=2))


class TestLanguageModel:
    def test_metrics_are_over_all_tokens(self, corpus):
        """The mean over tokens, not over windows: the last window of the split is shorter."""
        model = small_awd_lstm(corpus)
        run = trainer()
        data = LanguageModelData(corpus, batch_size=4, bptt=20)
        (metrics,) = run.validate(LanguageModel(model), data, verbose=False)
        tokens = corpus.valid[:300].view(4, 75).long()
        targets = corpus.valid[1:301].view(4, 75).long()
        output = model.eval()(tokens, targets)
        assert metrics["val_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert metrics["val_perplexity"] == pytest.approx(output.loss.exp().item(), rel=1e-5)
        assert metrics["val_accuracy"] == pytest.approx((model.predict(output.hidden) == targets).float().mean().item())

    def test_memory_is_carried_through_an_epoch_and_empty_at_the_next(self, corpus):
        class Spy(L.Callback):
            memories = []

            def on_train_batch_start(self, trainer, module, *_):
                self.memories.append(module._memory.get(True))

            def on_train_batch_end(self, trainer, module, *_):
                self.after = module._memory[True]

            def on_validation_end(self, trainer, module):
                assert module._memory[True] is self.after  # training's own memory outlives a validation

        spy = Spy()
        run = trainer(spy, max_epochs=2, val_check_interval=5)
        run.fit(LanguageModel(small_awd_lstm(corpus)), LanguageModelData(corpus, batch_size=5, bptt=30))
        assert [memory is None for memory in spy.memories] == ([True] + [False] * 9) * 2
        assert spy.memories[1][0][0].shape == (1, 5, 8)

    def test_one_cycle_has_exactly_the_steps_of_random_windows(self, corpus):
        module = LanguageModel(small_awd_lstm(corpus), lr=0.1, schedule="one-cycle")
        data = LanguageModelData(corpus, batch_size=4, bptt=12, random_length=True)

        class LastRate(L.Callback):
            def on_train_batch_start(self, trainer, *_):
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]

        run = trainer(last := LastRate(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
        run.fit(module, data)
        assert run.global_step == data.total_steps(3)
        assert len({data._streams(corpus.train, True).windows(epoch) for epoch in range(9)}) > 1
        assert last.rate == pytest.approx(0.1 / 25 / 1e4)

    def test_unknown_names_are_errors(self, corpus):
        with pytest.raises(ValueError, match="adamw.*'adam'"):
            LanguageModel(small_awd_lstm(corpus), optimizer="adam")
        with pytest.raises(ValueError, match="one-cycle.*'cosine'"):
            LanguageModel(small_awd_lstm(corpus), schedule="cosine")
        with pytest.raises(ValueError, match="no test split"):
            LanguageModelData(corpus, 4, 5).test_dataloader()


class InterruptAt(L.Callback):
    """A Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


RUN = dict(epochs=3, batch_size=4, bptt=12, random_length=True, d_model=8, d_hidden=8, dropout=0.5)
EXACT = {
    "one-cycle": override(RECIPES["human-numbers"], RUN),
    "nt-asgd": override(RECIPES["wikitext-2"], {**RUN, "epochs": 4, "lr": 60, "nonmono": 1}),
}


@pytest.fixture(scope="module", params=EXACT)
def uninterrupted(request, corpus, tmp_path_factory):
    recipe = EXACT[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, history = train_awd_lstm(corpus, recipe, tmp_path_factory.mktemp("whole"), devices=1)
    return recipe, model, history


@pytest.mark.parametrize("where", ["start", "middle", "last step of an epoch", "first step of an epoch", "late"])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(uninterrupted, corpus, tmp_path, where):
    """Weights, losses, accuracies and counts, to the bit, wherever Ctrl-C came."""
    recipe, expected, history = uninterrupted
    ends = [int(v["step"]) for v in history.valid]
    step = {
        "start": 0,
        "middle": ends[0] // 2,
        "last step of an epoch": ends[0] - 1,
        "first step of an epoch": ends[1],
        "late": ends[-1] - 3,
    }[where]
    handler = signal.getsignal(signal.SIGINT)

    def run(callbacks=(), **options):
        L.seed_everything(recipe.seed, verbose=False)
        model = AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), **recipe.model))
        callbacks = [RNNTrainer(recipe.bptt, recipe.alpha, recipe.beta), *callbacks]
        return model, fit(model, corpus, recipe, tmp_path, callbacks=callbacks, devices=1, **options)

    with pytest.raises(SystemExit):
        run([InterruptAt(step)])
    assert signal.getsignal(signal.SIGINT) is handler
    torch.rand(17), L.seed_everything(99, verbose=False)  # nothing of this process may matter
    model, resumed = run(resume=tmp_path / "interrupted.ckpt")
    assert resumed.train == history.train and resumed.valid == history.valid and resumed.tokens == history.tokens
    assert_same_parameters(model, expected, rtol=0, atol=0)


def test_resuming_from_the_end_of_an_epoch(uninterrupted, corpus, tmp_path):
    recipe, expected, history = uninterrupted
    with pytest.raises(SystemExit):
        model = AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), **recipe.model))
        L.seed_everything(recipe.seed, verbose=False)
        model = AWDLSTM(AWDLSTMConfig(len(corpus.vocabulary), **recipe.model))
        callbacks = [RNNTrainer(recipe.bptt), InterruptAt(int(history.valid[1]["step"]) + 3)]
        fit(model, corpus, recipe, tmp_path, callbacks=callbacks, devices=1)
    model, resumed = train_awd_lstm(corpus, recipe, tmp_path, devices=1, resume=tmp_path / "last.ckpt")
    assert resumed.train == history.train and resumed.valid == history.valid
    assert_same_parameters(model, expected, rtol=0, atol=0)


def test_a_second_interrupt_stops_at_once(corpus, tmp_path):
    class Twice(L.Callback):
        def on_before_backward(self, *_):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    recipe = replace(EXACT["one-cycle"])
    with pytest.raises(SystemExit):
        model = small_awd_lstm(corpus)
        fit(model, corpus, recipe, tmp_path, callbacks=[RNNTrainer(12), Twice()], devices=1)
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_files_of_a_run(uninterrupted, corpus, tmp_path):
    recipe, _, _ = uninterrupted
    model, history = train_awd_lstm(corpus, replace(recipe, epochs=1), tmp_path, devices=1)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "vocabulary.txt").read_text().split() == corpus.vocabulary.words
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("best", "last"):
        assert (tmp_path / f"{name}.ckpt").exists()
        loaded = AWDLSTM(model.config)
        safetensors.torch.load_model(loaded, tmp_path / f"{name}.safetensors")
        assert_same_parameters(loaded, model, rtol=0, atol=0)
        assert loaded.decoder.weight is loaded.encoder.weight
    assert len(history.valid) == 1 and history.tokens == 4 * (1500 // 4)
    assert set(history.valid[0]) == {"step", "val_loss", "val_perplexity", "val_accuracy"}


def test_safetensors_are_removed_with_their_checkpoint(tmp_path):
    io = SafetensorsCheckpointIO()
    io.save_checkpoint({"state_dict": {"model.w": torch.ones(2), "other": torch.ones(1)}}, tmp_path / "a.ckpt")
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == {"w"}
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


class Scripted(L.LightningModule):
    """One weight, a constant gradient of -1 and given validation losses."""

    def __init__(self, losses):
        super().__init__()
        self.w, self.script, self.evaluated = nn.Parameter(torch.zeros(())), list(losses), []

    def training_step(self, *_):
        return -self.w

    def validation_step(self, *_):
        self.evaluated.append(self.w.item())
        self.log("val_loss", self.script[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


class TestNTASGD:
    def run(self, losses, nonmono):
        module = Scripted(losses)
        train, valid = loader([torch.zeros(1)] * 2), loader([torch.zeros(1)])
        trainer(NTASGD(nonmono), max_epochs=len(losses)).fit(module, train, valid)
        return module

    def test_averages_from_the_trigger_on(self):
        """w is the step number: 4 is worse than 3 two before, so steps 9 .. 12 are averaged."""
        module = self.run([3.0, 2.0, 2.5, 4.0, 9.0, 9.0], nonmono=2)
        assert module.evaluated == [2, 4, 6, 8, (9 + 10) / 2, (9 + 10 + 11 + 12) / 4]
        assert module.w.item() == (9 + 10 + 11 + 12) / 4

    def test_does_nothing_while_the_loss_falls(self):
        module = self.run([3.0, 2.0, 2.5, 2.9], nonmono=2)
        assert module.evaluated == [2, 4, 6, 8] and module.w.item() == 8

    def test_the_best_before_the_last_few_counts(self):
        """After four validations only the first counts for nonmono = 3 (awd-lstm-lm: len > nonmono)."""
        assert self.run([3.0, 1.0, 1.0, 2.9, 2.0, 2.0, 2.0], nonmono=3).evaluated[-1] == (13 + 14) / 2
        assert self.run([3.0, 1.0, 1.0, 2.9, 2.0, 0.9, 0.9], nonmono=3).evaluated[-1] == 14

    def test_is_torchs_asgd(self):
        """The average of torch.optim.ASGD(t0=0, lambd=0), which leaves out its first step."""
        p = nn.Parameter(torch.tensor(7.0))
        asgd = torch.optim.ASGD([p], lr=1.0, t0=0, lambd=0, alpha=0)
        for _ in range(5):
            p.grad = torch.tensor(-1.0)
            asgd.step()
        module = self.run([3.0, 2.0, 2.5, 4.0, 9.0, 9.0], nonmono=2)
        assert asgd.state[p]["ax"].item() == module.w.item()


def test_plot_of_several_runs(tmp_path):
    histories = {}
    for name in ("a", "b"):
        histories[name] = History()
        histories[name].train, histories[name].valid = [(10, 3.0), (20, 2.0)], [{"step": 20, "val_loss": 2.5}]
    plot_losses(histories, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_override():
    recipe = override(RECIPES["wikitext-2"], {"lr": "1e-2", "random_length": "false", "d_model": "32", "epochs": 2})
    assert (recipe.lr, recipe.random_length, recipe.epochs) == (0.01, False, 2)
    assert recipe.model == {"dropout_hidden": 0.2, "d_model": 32}
    assert RECIPES["wikitext-2"].lr == 30.0 and "d_model" not in RECIPES["wikitext-2"].model
    for bad, message in (({"depth": "3"}, "no option 'depth'"), ({"lr": "fast"}, "lr must be of type float")):
        with pytest.raises(ValueError, match=message):
            override(recipe, bad)
    with pytest.raises(ValueError, match="no option 'vocab_size'"):
        override(recipe, {"vocab_size": "3"})
